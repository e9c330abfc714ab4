"""Procedural scenes: what is drawn is what is labelled, and the same seed draws the same scene."""

from __future__ import annotations

import numpy as np
import pytest

from sam3lora.data.synth.scenes import (
    ALL_CONCEPTS,
    NATURAL,
    SHAPES,
    SHIFTED,
    Concept,
    SceneObject,
    concepts_of,
    draw_scene,
)


def _thing(noun: str, colour: str | None = None, texture: str | None = None) -> SceneObject:
    return SceneObject(noun, colour, texture, np.ones((4, 4), bool))


@pytest.mark.parametrize(("domain", "nouns"), [("base", {*SHAPES, *NATURAL}), ("shift", set(SHIFTED))])
def test_a_seed_gives_one_scene_of_the_domains_nouns(domain, nouns):
    # Everything comes from the generator; the shifted domain is new to the tiny model by construction.
    first, again, *others = (draw_scene(np.random.default_rng(seed), domain=domain) for seed in (3, 3, *range(4, 10)))
    assert np.array_equal(first.image_HW3, again.image_HW3)
    assert [thing.noun for thing in first.objects] == [thing.noun for thing in again.objects]
    assert not np.array_equal(first.image_HW3, others[0].image_HW3)
    assert {thing.noun for scene in others for thing in scene.objects} <= nouns
    assert not {*SHAPES, *NATURAL} & set(SHIFTED)


def test_masks_are_disjoint_and_visible():
    # A mask is what can be seen of an object: masks never overlap, and an object that is hidden is not labelled.
    for seed in range(12):
        scene = draw_scene(np.random.default_rng(seed), dense=True, max_objects=9)
        stacked = np.stack([thing.mask_HW for thing in scene.objects])
        assert stacked.sum(0).max() == 1
        assert stacked.any((1, 2)).all()


def test_the_painted_colour_is_the_named_one():
    # A plain blue object is bluer than red inside its mask.
    for seed in range(60):
        scene = draw_scene(np.random.default_rng(seed))
        for thing in scene.objects:
            if thing.colour == "blue" and thing.texture is None:
                mean = scene.image_HW3[thing.mask_HW].mean(0)
                assert mean[2] > mean[0] + 30
                return
    pytest.fail("no blue object in 60 scenes")


def test_concepts_match_what_they_name():
    red_star, blue_star, crack = _thing("star", "red", "striped"), _thing("star", "blue"), _thing("crack")
    names = {concept.prompt for concept in concepts_of(red_star)}
    assert names == {"star", "red thing", "red star", "striped thing"}
    assert [concept.prompt for concept in concepts_of(crack)] == ["crack"]
    assert Concept("shape", noun="star").matches(blue_star)
    assert not Concept("colour+shape", noun="star", colour="red").matches(blue_star)
    assert not Concept("colour", colour="black").matches(crack)
    assert len({concept.prompt for concept in ALL_CONCEPTS}) == len(ALL_CONCEPTS)


def test_ambiguous_colours_are_not_asked():
    # A berry may be called red, so "red thing" has no certain answer beside one; "blue thing" has.
    things = [_thing("berry"), _thing("star", "red")]
    assert Concept("colour", colour="red").is_ambiguous_in(things)
    assert not Concept("colour", colour="blue").is_ambiguous_in(things)
