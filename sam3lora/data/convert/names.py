"""Lists of category names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3lora.data.prompts import prompt_key
from sam3lora.errors import UserError


def checked_names(names: Sequence[Any], source: str) -> list[str]:
    """Names stripped of white space.

    Raises:
        UserError: No name, or one that is not a text.
    """
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{source}: expected category names, got {list(names)!r}")
    return [name.strip() for name in names]


def read_names(path: Path) -> list[str]:
    """One name a line; empty lines at the end do not count.

    Raises:
        UserError: No name, or an empty line between names.
    """
    return checked_names(path.read_text(encoding="utf-8-sig").rstrip().splitlines(), str(path))


def order_names(found: Sequence[str], names: Sequence[str] | None, source: Path) -> list[str]:
    """Categories in the order of `names`, or as found.

    Raises:
        UserError: One was found that `names` lacks.
    """
    if names is None:
        return list(found)
    known = {prompt_key(name) for name in names}
    missing = [name for name in found if prompt_key(name) not in known]
    if missing:
        raise UserError(f"{source} has objects named {', '.join(missing)}, which --names lacks: {', '.join(names)}")
    return list(names)
