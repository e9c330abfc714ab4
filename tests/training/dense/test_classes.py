"""Which classes a dense run makes of the categories of its data."""

from __future__ import annotations

import pytest

from sam3lora.config.dense import DenseSection
from sam3lora.errors import UserError
from sam3lora.training.dense.classes import choose_classes


@pytest.mark.parametrize(
    ("settings", "categories", "mode", "names", "values"),
    [
        ({}, ["crack"], "binary", ("crack",), {"crack": 1}),
        ({}, ["crack", "Hole"], "multiclass", ("background", "crack", "Hole"), {"crack": 1, "hole": 2}),
        ({}, ["Background", "crack"], "binary", ("crack",), {"crack": 1}),
        ({"mode": "binary"}, ["crack", "hole"], "binary", ("foreground",), {"crack": 1, "hole": 1}),
        ({"foreground": ["HOLE"]}, ["crack", "hole"], "binary", ("hole",), {"hole": 1}),
        ({"mode": "multilabel"}, ["crack", "hole"], "multilabel", ("crack", "hole"), {"crack": 1, "hole": 2}),
        ({"mode": "multiclass"}, ["crack"], "multiclass", ("background", "crack"), {"crack": 1}),
    ],
)
def test_classes_of_categories(settings, categories, mode, names, values):
    classes = choose_classes(DenseSection(**settings), categories)
    assert (classes.mode, classes.names, dict(classes.labels.values)) == (mode, names, values)
    assert classes.labels.overlapping == (mode == "multilabel")


@pytest.mark.parametrize(
    ("settings", "categories", "words"),
    [
        ({}, ["background"], "none"),
        ({}, [f"c{number}" for number in range(255)], "255"),
        ({"foreground": ["pothole"]}, ["crack", "hole"], "pothole"),
    ],
)
def test_what_cannot_be_classes(settings, categories, words):
    with pytest.raises(UserError, match=words):
        choose_classes(DenseSection(**settings), categories)
