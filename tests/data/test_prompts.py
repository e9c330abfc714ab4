"""Queries of an image: its categories as positives, and only absent prompts as negatives."""

from __future__ import annotations

from sam3lora.data.prompts import build_queries, sample_rng

NAMES = ("crack", "pothole", "root", "weed")


def record(*categories: str, crowd: tuple[str, ...] = ()) -> dict:
    rows = [(name, False) for name in categories] + [(name, True) for name in crowd]
    return {
        "image_id": 3,
        "annotations": [{"category": n, "category_id": NAMES.index(n), "iscrowd": c} for n, c in rows],
    }


def ask(rec, names=NAMES, epoch=0, **kwargs):
    return build_queries(rec, names, rng=sample_rng(0, epoch, rec["image_id"]), **kwargs)


def prompts(queries, positive):
    return [q.prompt for q in queries if q.is_positive == positive]


def test_one_positive_query_a_category_with_all_its_objects():
    queries = ask(record("root", "crack", "root"), num_negatives=0)
    assert [(q.prompt, q.annotation_rows) for q in queries] == [("crack", (1,)), ("root", (0, 2))]


def test_all_absent_categories_are_negatives_by_default():
    for everything in (None, -1):
        queries = ask(record("root"), num_negatives=everything)
        assert prompts(queries, True) == ["root"]
        assert sorted(prompts(queries, False)) == ["crack", "pothole", "weed"]


def test_sampled_negatives_are_absent_distinct_and_reproducible():
    seen = set()
    for epoch in range(30):
        negatives = prompts(ask(record("root"), num_negatives=2, epoch=epoch), False)
        assert len(set(negatives)) == 2
        assert "root" not in negatives
        assert negatives == prompts(ask(record("root"), num_negatives=2, epoch=epoch), False)
        seen.add(tuple(negatives))
    # epochs differ
    assert len(seen) > 1


def test_a_crowd_only_category_is_asked_neither_way():
    queries = ask(record("root", crowd=("crack", "root")))
    assert prompts(queries, True) == ["root"]
    assert queries[0].annotation_rows == (0,)
    assert sorted(prompts(queries, False)) == ["pothole", "weed"]
    # also not through the user's own list
    assert "crack" not in [q.prompt for q in ask(record(crowd=("crack",)), negative_prompts=["Crack"])]
    # and nothing is left to ask when it is the only category
    assert ask(record(crowd=("crack",)), names=("crack",)) == []


def test_an_empty_image_always_gets_a_negative():
    for num in (0, 1, None):
        queries = ask(record(), names=("crack",), num_negatives=num)
        assert [(q.prompt, q.is_positive) for q in queries] == [("crack", False)]
    assert len(ask(record(), num_negatives=0)) == 1


def test_without_exhaustive_annotation_only_the_users_list_is_negative():
    queries = ask(record("root"), exhaustive=False, negative_prompts=["shadow", "ROOT"])
    assert prompts(queries, False) == ["shadow"]
    assert ask(record(), exhaustive=False) == []


def test_completeness_by_category():
    # Roots and weeds are all annotated, cracks and potholes are not: these are asked where they have a label, and are
    # never negatives, not even through the user's own list.
    queries = ask(record("crack", "root"), exhaustive=("Root", "weed"), negative_prompts=["pothole", "shadow"])
    assert [(q.prompt, q.is_positive, q.is_exhaustive) for q in queries] == [
        ("crack", True, False),
        ("root", True, True),
        ("weed", False, True),
        ("shadow", False, True),
    ]
    # an image without a label is asked about what is known to be absent
    assert prompts(ask(record(), exhaustive=("root",), num_negatives=0), False) == ["root"]
    assert ask(record("crack"), exhaustive=False)[0].is_exhaustive is False
    # one prompt of two categories is complete if both are
    mapping = {"crack": "damage", "pothole": "damage"}
    assert prompts(ask(record(), exhaustive=("crack", "root", "weed"), prompts_map=mapping), False) == ["root", "weed"]
    assert "damage" in prompts(ask(record(), exhaustive=("crack", "pothole"), prompts_map=mapping), False)


def test_a_crowd_beside_objects_makes_a_query_incomplete():
    # The objects of the region have no label of their own, and finding them is no mistake.
    queries = ask(record("root", "crack", crowd=("root",)), num_negatives=0)
    assert [(q.prompt, q.is_exhaustive) for q in queries] == [("crack", True), ("root", False)]


def test_prompt_map_merges_categories_with_one_prompt():
    mapping = {"crack": "road damage", "Pothole": "Road  damage", "weed": "plant"}
    queries = ask(record("pothole", "crack"), prompts_map=mapping)
    assert [(q.prompt, q.annotation_rows) for q in queries if q.is_positive] == [("Road  damage", (0, 1))]
    # the other spelling is the same prompt, so it is not a negative
    assert sorted(prompts(queries, False)) == ["plant", "root"]
    only_crack = ask(record("crack"), prompts_map=mapping)
    assert sorted(prompts(only_crack, False)) == ["plant", "root"]
