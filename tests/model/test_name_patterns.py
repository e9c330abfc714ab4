"""Expressions on module names: the same names as Python's `re`, in linear time."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from sam3lora.model.adapter.name_patterns import MAX_EXPRESSION_CHARS, NamePattern, PatternError

NAMES = [
    "q_proj",
    "vision_encoder.backbone.layers.0.attention.q_proj",
    "vision_encoder.backbone.layers.11.mlp.fc1",
    "detr_decoder.layers.3.cross_attn.v_proj",
    "",
    ".",
    "a.b",
    "aab",
]


@pytest.mark.parametrize(
    "expression",
    [
        # what people write
        "q_proj",
        r".*\.q_proj",
        r".*decoder.*(self_attn|cross_attn).*(q|v)_proj$",
        r"^vision_encoder\.backbone\.layers\.(?:0|11)\..*",
        r".*\.layers\.[0-9]+\.(attention|mlp)\.\w+",
        r"(?:.*?(?:vision|image).*?(?:fc1|fc2).*?)|(?:.*[^.]_proj)",
        # empty, nested, repeated, and ends in the middle
        "",
        "a?b*|",
        "((a|aa)*b)+|(a*)*",
        "(^a|b$)*.*",
        "a$b|a^b|$|.*^",
        r"[a-c.]*|[^\d_]+",
        # marks that few know
        r"a{2}b{0,1}|(?P<name>a)\.b|[]a.b]+|\bq_proj\b",
        # would hold the interpreter
        r"(.*)*(a+)+b",
    ],
)
def test_the_same_names_as_re(expression):
    pattern = NamePattern(expression)
    quick = [name for name in NAMES if expression != r"(.*)*(a+)+b" or len(name) < 10]
    assert [pattern.matches(name) for name in quick] == [bool(re.fullmatch(expression, name)) for name in quick]


def test_random_expressions_match_the_same_names_as_re():
    generator = np.random.default_rng(0)

    def expression(depth: int) -> str:
        kind = generator.integers(7) if depth else 0
        if kind <= 1:
            return str(generator.choice(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", "1", "^", "$"]))
        if kind == 2:
            return f"(?:{expression(depth - 1)}|{expression(depth - 1)})"
        if kind == 3:
            return f"({expression(depth - 1)}){generator.choice(['*', '+', '?', '*?', '+?', '??'])}"
        return expression(depth - 1) + expression(depth - 1)

    names = ["".join(generator.choice(list("ab1."), length)) for length in (0, 1, 1, 2, 2, 3, 3, 4, 5, 6)]
    num_matches = 0
    for _ in range(400):
        text = expression(4)
        pattern = NamePattern(text)
        found = [pattern.matches(name) for name in names]
        assert found == [bool(re.fullmatch(text, name)) for name in names], text
        num_matches += sum(found)
    assert num_matches > 100  # the comparison is not of nothing with nothing


@pytest.mark.parametrize(
    "expression",
    [
        *("((", "a)", "*", "a**", r"(a)\1", "(?=a)", "(?!a)a", "[a", "[b-a]", "\\", "\ud800"),
        *("((a{1000}){1000}){1000}", "(" * 2000, "a" * (MAX_EXPRESSION_CHARS + 1)),
    ],
)
def test_other_expressions_are_refused(expression):
    with pytest.raises(PatternError):
        NamePattern(expression)


def test_no_expression_is_slow():
    # Each of these holds `re` for longer than a person waits; 1,500 names of 100 characters.
    names = [f"vision_encoder.layers.{number}.{'a' * 70}" for number in range(1500)]
    started = time.thread_time()
    for expression in (r"(.*)*(a+)+b", "(a|a)*" * 150 + "b", "(.?)*" * 190 + "b", "(.|.)+" * 160 + "(q|v)"):
        pattern = NamePattern(expression)
        assert not any(pattern.matches(name) for name in names)
    assert time.thread_time() - started < 60  # seconds would be a slow machine; `re` needs years
