"""Named sets of SAM 3's components, the values of the parameter `components`.

A value names a set, a component, or several of them joined by " + ": `detr + mask decoder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sam3lora.config import COMPONENTS
from sam3lora.tune.space.parameters import short

COMPONENTS_KEY = "components"
"""The parameter that stands for all `lora.apply_to_*` flags."""

BUILT_IN: dict[str, tuple[str, ...]] = {
    "vision": ("vision_encoder",),
    "text": ("text_encoder",),
    "geometry": ("geometry_encoder",),
    "encoder": ("detr_encoder",),
    "decoder": ("detr_decoder",),
    "mask decoder": ("mask_decoder",),
    "detr": ("detr_encoder", "detr_decoder"),
    "everything but text": tuple(name for name in COMPONENTS if name != "text_encoder"),
    "everything": COMPONENTS,
}


def components_of(name: str, own_sets: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """The components that a name stands for, in the order of `COMPONENTS`.

    Raises:
        ValueError: A part of the name is neither a set nor a component.
    """
    if name in own_sets:
        chosen = set(own_sets[name])
    else:
        chosen = set()
        for part in (part.strip() for part in name.split("+")):
            members = own_sets.get(part) or BUILT_IN.get(part) or ((part,) if part in COMPONENTS else None)
            if members is None:
                sets = ", ".join([*own_sets, *BUILT_IN])
                raise ValueError(
                    f'"{short(part)}" is neither a component nor a set of them; sets are {sets}; '
                    f"components are {', '.join(COMPONENTS)}. Join several by +, or name your own under component_sets"
                )
            chosen.update(members)
    return tuple(component for component in COMPONENTS if component in chosen)


def name_of(components: Iterable[str], own_sets: Mapping[str, Iterable[str]], preferred: Iterable[str] = ()) -> str:
    """A name of components: the first that fits of `preferred`, the space's own sets and the built-in ones, or several
    built-in ones joined by " + "."""
    wanted = tuple(component for component in COMPONENTS if component in set(components))
    for name in (*preferred, *own_sets, *BUILT_IN):
        if components_of(name, own_sets) == wanted:
            return name
    parts, left = [], set(wanted)
    for name, members in sorted(BUILT_IN.items(), key=lambda item: -len(item[1])):
        if set(members) <= left:
            parts.append((COMPONENTS.index(members[0]), name))
            left -= set(members)
    parts += [(COMPONENTS.index(component), component) for component in left]
    return " + ".join(name for _, name in sorted(parts))


def read_own_sets(written: Mapping[str, Any]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The sets of a search space file, and what is wrong with them, in words."""
    own_sets, problems = {}, []
    for name, components in written.items():
        if not isinstance(components, list | tuple):
            got = short(repr(components))
            problems.append(f'component_sets."{name}" should be a list of components, got {got}')
            continue
        own_sets[name] = tuple(map(str, components))
        unknown = [component for component in components if component not in COMPONENTS]
        if name in BUILT_IN or name in COMPONENTS:
            problems.append(f'component_sets."{name}" is built in: choose another name')
        elif "+" in name:
            problems.append(f'component_sets."{name}": a + joins sets: choose a name without it')
        elif not components:
            problems.append(f'component_sets."{name}" is empty: name some of {", ".join(COMPONENTS)}')
        elif unknown:
            known = ", ".join(COMPONENTS)
            problems.append(f'component_sets."{name}": "{short(str(unknown[0]))}" is not a component of {known}')
    return own_sets, problems
