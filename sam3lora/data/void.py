"""Void regions: the pixels of an image of which nothing is known, as value 255 marks them in mask images.

In a COCO file they are crowd regions (`iscrowd`) of a category named "void". Void may be any class, or none. As a crowd
of each class, it would be written once for each, and an image with a thin void line around its objects could no longer
teach a prompted model what it does not show. So void has a category of its own: label maps ignore its pixels whatever
their classes are, no prompt asks for it, and other programs read it as a category without objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOID = "void"


def is_void(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation of an index marks a void region, not a crowd of a class."""
    return bool(annotation["iscrowd"]) and annotation["category"].strip().casefold() == VOID
