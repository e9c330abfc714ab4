"""Questions of a scene: positives find every object they name, negatives find none, and none can be argued about."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.pretrain.prompting import VISUAL, ask
from jobs.pretrain.words import HELD_OUT_ABSENT, KNOWN_ABSENT, absent_word
from sam3lora.data.synth.scenes import ALL_CONCEPTS, WORDS, draw_scene

CONCEPTS = {concept.prompt: concept for concept in ALL_CONCEPTS}


@pytest.mark.parametrize("seed", range(20))
def test_questions_are_true(seed):
    rng = np.random.default_rng(seed)
    objects = draw_scene(rng).objects
    questions = ask(objects, rng, positives=3, negatives=3)
    assert [bool(question.wanted) for question in questions] == [True] * 3 + [False] * 3
    for question in questions:
        concept = CONCEPTS.get(question.prompt)
        if concept is None:
            assert question.kind == "unknown"
            continue
        named = [number for number, thing in enumerate(objects) if concept.matches(thing)]
        assert question.wanted == named
        assert not concept.is_ambiguous_in(objects)


def test_exemplars_point_at_a_wanted_object():
    seen = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        objects = draw_scene(rng).objects
        for question in ask(objects, rng, exemplars=True):
            for number, label in question.exemplars:
                assert number in question.wanted
                assert label == 1
                seen.add(question.prompt == VISUAL)
    assert seen == {True, False}  # with a text and without one


def test_absent_words_name_nothing():
    # Held-out words are never trained on, and no absent word ends in a word of the scenes ("strawberry" does).
    rng = np.random.default_rng(0)
    assert not set(HELD_OUT_ABSENT) & set(KNOWN_ABSENT)
    assert not {*HELD_OUT_ABSENT, *KNOWN_ABSENT} & set(WORDS)
    for _ in range(300):
        assert absent_word(rng) not in CONCEPTS
