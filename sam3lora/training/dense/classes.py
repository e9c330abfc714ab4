"""The classes of a dense run: the outputs of its head, and the value of each category in label maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sam3lora.config.dense import DenseSection
from sam3lora.data.label_maps import MOST_CLASSES, LabelMaps
from sam3lora.data.prompts import prompt_key
from sam3lora.errors import UserError
from sam3lora.model.dense.settings import BACKGROUND, Mode


@dataclass(frozen=True)
class DenseClasses:
    """`names` are those of the head's outputs, in their order; `labels` paint the targets."""

    mode: Mode
    names: tuple[str, ...]
    labels: LabelMaps


def choose_classes(dense: DenseSection, categories: Sequence[str]) -> DenseClasses:
    """The classes that a configuration makes of the categories of its data.

    A category of the name "background" is the background.

    Raises:
        UserError: No category is left, one that is named is not there, or there are too many.
    """
    named = [name for name in categories if prompt_key(name) != BACKGROUND]
    if not named:
        raise UserError("task dense needs a category other than background, and the data have none")
    if len(named) > MOST_CLASSES:
        raise UserError(
            f"task dense has at most {MOST_CLASSES} classes, the data have {len(named)}: set data.categories"
        )
    mode: Mode = dense.mode if dense.mode != "auto" else ("binary" if _is_binary(dense, named) else "multiclass")
    if mode == "binary":
        chosen = _foreground(dense, named)
        name = chosen[0] if len(chosen) == 1 else "foreground"
        return DenseClasses(mode, (name,), LabelMaps({prompt_key(one): 1 for one in chosen}))
    values = {prompt_key(name): number for number, name in enumerate(named, 1)}
    if mode == "multilabel":
        return DenseClasses(mode, tuple(named), LabelMaps(values, overlapping=True))
    return DenseClasses(mode, (BACKGROUND, *named), LabelMaps(values))


def _is_binary(dense: DenseSection, named: Sequence[str]) -> bool:
    return dense.foreground is not None or len(named) == 1


def _foreground(dense: DenseSection, named: Sequence[str]) -> list[str]:
    if dense.foreground is None:
        return list(named)
    known = {prompt_key(name): name for name in named}
    for name in dense.foreground:
        if prompt_key(name) not in known:
            raise UserError(
                f"dense.foreground names {name!r}, which the data do not have; they have {', '.join(named)}"
            )
    return [known[prompt_key(name)] for name in dense.foreground]
