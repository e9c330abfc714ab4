"""Kinds of parameters, tied expressions, texts for values, and component sets."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from sam3lora.config import COMPONENTS
from sam3lora.tune.space.component_sets import BUILT_IN, components_of, name_of
from sam3lora.tune.space.expressions import Expression
from sam3lora.tune.space.parameters import parse_parameter, value_text


def draws(written, count=2000):
    parameter = parse_parameter("x", written)
    rng = np.random.default_rng(3)
    return [parameter.draw(rng) for _ in range(count)]


@pytest.mark.parametrize(
    ("written", "is_numeric", "is_log"),
    [
        ({"uniform": [0.1, 0.3]}, True, False),
        ({"loguniform": [1.0e-5, 1.0e-2]}, True, True),
        ({"choice": [1, 2.5]}, True, False),
        ({"choice": [True, False]}, False, False),
        ({"grid": ["a"]}, False, False),
    ],
)
def test_a_range_is_filled_evenly_on_its_scale(written, is_numeric, is_log):
    parameter = parse_parameter("x", written)
    assert (parameter.kind, parameter.is_numeric, parameter.is_log) == (next(iter(written)), is_numeric, is_log)
    if "uniform" in parameter.kind:
        values, limits = np.array(draws(written)), written[parameter.kind]
        if is_log:
            values, limits = np.log10(values), np.log10(limits)
        assert np.histogram(values, bins=4, range=limits)[0].min() > 400
        assert limits[0] <= values.min() <= values.max() <= limits[1]


def test_choice_and_randint_draw_every_value_as_often():
    values = draws({"choice": [4, "a", [1, 2]]})
    assert min(values.count(option) for option in (4, "a", [1, 2])) > 550
    values = draws({"randint": [3, 5]})
    assert min(values.count(number) for number in (3, 4, 5)) > 550
    assert all(type(value) is int for value in values)


def test_drawn_numbers_are_short_and_stay_inside():
    low, high = 1.2345678e-4, 1.2345679e-4  # rounding alone would leave this range
    assert all(low <= value <= high for value in draws({"loguniform": [low, high]}, 20))
    assert all(len(str(value)) <= 8 for value in draws({"uniform": [0.1, 0.3]}, 50))


def test_labels_stand_for_values():
    parameter = parse_parameter("x", {"choice": {"few": ["a"], "many": ["a", "b"]}})
    assert parameter.label(["a", "b"]) == "many"
    assert parameter.label(["b"]) == "b"  # the base's own value may be none of them
    assert parameter.written() == {"choice": {"few": ["a"], "many": ["a", "b"]}}


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (5, "a fixed value goes under set"),
        ({}, "expected a kind such as"),
        ({"choice": [1], "grid": [1]}, "keep one"),
        ({"loguniforn": [1, 2]}, "did you mean loguniform"),
        ({"choice": []}, "choice is empty"),
        ({"choice": list(range(501))}, "at most 500"),
        ({"choice": 4}, "expects a list"),
        ({"grid": [4, 8, 4]}, "holds 4 twice"),
        ({"uniform": [0.2, 0.1]}, r"needs low < high, got \[0.2, 0.1\]"),
        ({"uniform": [0, math.inf]}, "two numbers"),
        ({"uniform": [False, True]}, "two numbers"),
        ({"loguniform": [0, 0.1]}, "needs low > 0, got 0: raise it, or write uniform"),
        ({"randint": [0.5, 3]}, "two whole numbers"),
        ({"tied": ["a"]}, "expects an expression"),
        ({"tied": "2 *"}, "is not an expression"),
        ({"tied": "open('x')"}, "is not allowed: use numbers, dotted keys"),
        ({"tied": "a.b[0]"}, "is not allowed"),
        ({"tied": "a if b else c"}, "is not allowed"),
        ({"tied": "1" + 100 * " + 1"}, "401 characters is too long, expected at most 200"),
        ({"randint": [0, 10**30]}, "two numbers .* of at most 9e\\+15"),
        ({"uniform": [-1.7e308, 1.7e308]}, "two numbers .* of at most 1e\\+300"),
        ({"choice": {1: "a", "1": "b"}}, "same label twice"),
    ],
)
def test_what_is_no_parameter_is_refused(written, words):
    with pytest.raises(ValueError, match=words):
        parse_parameter("x", written)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 * lora.rank", 16),
        ("lora.rank // 3 + lora.rank / 16", 2.5),
        ("-(1 - lora.rank) ** 2", -49),
        ("min(lora.rank, 4) + max(1, 2, 3)", 7),
        ("round(lora.rank / 3)", 3),
        ("int(lora.rank * 0.99)", 7),
        ("7", 7),
    ],
)
def test_expressions(text, expected):
    assert Expression.parse(text).evaluate({"lora.rank": 8}) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 / (a - 2)", "division by zero"),
        ("a ** 1000", "exponent 1000 is too large"),
        ("(-a) ** 0.5", "expected a finite number"),
        ("a * b", "b is 'x', expected a number"),
        ("1e308 * 10 * a", "finite"),
        ("((((10**64)**64)**64)**64)**a", "expected a finite number at every step"),
        ("round(a, -10**9)", "round to -1e\\+09 digits is too much"),
    ],
)
def test_an_expression_that_gives_no_number(text, words):
    with pytest.raises(ValueError, match=words):
        Expression.parse(text).evaluate({"a": 2, "b": "x"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2e-4, "2e-4"),
        (1.234e-5, "1.23e-5"),
        (0.05, "0.05"),
        (32.0, "32"),
        (0.0, "0"),
        (2.5e7, "2.5e7"),
        (12345.0, "12345"),
        (None, "none"),
        (False, "false"),
        ("cosine", "cosine"),
        (["a", "b"], "a, b"),
        ({"a": 1e-4}, "a: 1e-4"),
    ],
)
def test_value_text(value, text):
    assert value_text(value) == text


def test_component_sets_are_joined_by_plus_and_every_selection_has_a_name():
    assert components_of("mask decoder + detr", {}) == ("detr_encoder", "detr_decoder", "mask_decoder")
    assert components_of("detr_decoder + vision", {}) == ("vision_encoder", "detr_decoder")
    assert components_of("mine + text", {"mine": ("scoring",)}) == ("text_encoder", "scoring")
    own = {"heads": ("detr_decoder", "mask_decoder")}
    for count in range(1, len(COMPONENTS) + 1):
        for chosen in combinations(COMPONENTS, count):
            assert components_of(name_of(chosen, own), own) == chosen
    assert name_of(("detr_decoder", "mask_decoder"), own) == "heads"
    assert name_of(BUILT_IN["detr"] + ("mask_decoder",), own) == "detr + mask decoder"
    assert name_of(("detr_decoder",), own, ["detr_decoder"]) == "detr_decoder"
