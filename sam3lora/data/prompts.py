"""The prompts that training asks of an image: its categories as positives, and truly absent prompts as negatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from sam3lora.data.void import is_void

ALL_NEGATIVES = -1


@dataclass(frozen=True)
class Query:
    """One prompt asked of one image; positive if there is anything to find."""

    prompt: str
    category: str | None  # None for a prompt of the user's own negative list
    annotation_rows: tuple[int, ...] = ()  # positions of the objects to find in the record's annotations
    is_positive: bool = False
    is_exhaustive: bool = True  # False: the image may show more of it than these objects


def plain_name(text: str) -> str:
    """A name without surrounding space, in which what cannot be shown (line ends, escapes) is a space.

    >>> plain_name(" Red  bolt "), plain_name("ge\\nar")
    ('Red  bolt', 'ge ar')
    """
    if text.isprintable():
        return text.strip()
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def prompt_key(text: str) -> str:
    """Lower-case text with single spaces. Prompts with equal keys are the same to the model's tokenizer.

    >>> prompt_key("  Road   Crack ")
    'road crack'
    """
    return " ".join(text.split()).casefold()


def sample_rng(seed: int, epoch: int, image_id: int, stream: int = 0) -> np.random.Generator:
    """Random numbers of one image in one epoch, independent of the worker, the batch and the order.

    Each use (queries, placement) has a `stream` of its own, so that switching one on does not change another.
    """
    return np.random.default_rng([seed % 2**63, epoch, image_id % 2**63, stream])


def incomplete_prompts(
    names: Sequence[str], prompts_map: Mapping[str, str], exhaustive: bool | Sequence[str]
) -> set[str]:
    """Keys of the prompts of which an image may show objects without a label.

    `exhaustive` is True or False for all categories, or has the names of those whose objects are all annotated. A
    prompt of several categories is complete if all of them are.

    >>> sorted(incomplete_prompts(["Crack", "weed", "moss"], {"moss": "plant", "weed": "plant"}, ["crack", "moss"]))
    ['plant']
    """
    if exhaustive is True:
        return set()
    prompts = {prompt_key(name): prompt for name, prompt in prompts_map.items()}
    complete = {prompt_key(name) for name in exhaustive or ()}
    keys = {prompt_key(name) for name in names} - complete
    return {prompt_key(prompts.get(key, key)) for key in keys}


def build_queries(
    record: Mapping[str, Any],
    names: Sequence[str],
    *,
    rng: np.random.Generator,
    prompts_map: Mapping[str, str] | None = None,
    negative_prompts: Sequence[str] = (),
    num_negatives: int | None = None,
    exhaustive: bool | Sequence[str] = True,
) -> list[Query]:
    """The queries of one image: positives in category order, then sampled negatives, then the user's own negatives.

    A category with only crowd regions in the image is not asked at all. It is present, so it cannot be a negative, and
    it has no object to match, so it cannot be a positive. Beside objects, a crowd region makes the query one that is
    not exhaustive. A void region (`sam3lora.data.void`) counts as background. A category that is not annotated
    exhaustively is asked only of images with a label of it. An image without objects is asked at least one category
    that is, even with `num_negatives` 0: it is in the data set to teach absence.

    Args:
        names: Distinct category names of the data set; negatives are sampled from them.
        rng: From `sample_rng`.
        prompts_map: Category name -> prompt text; a category without an entry is asked by its name.
        negative_prompts: The user's list of prompts that occur nowhere in the data. They are asked of every image,
            except one that does contain an equal prompt.
        num_negatives: Number of absent categories to sample, without replacement; None or -1 for all of them.
        exhaustive: Whether everything is annotated, so that a missing annotation means absence; or the names of the
            categories of which this holds.

    Returns:
        Queries with different prompts; empty if nothing can be asked truthfully.
    """
    prompts = {prompt_key(k): v for k, v in (prompts_map or {}).items()}
    prompt_of = {name: prompts.get(prompt_key(name), name) for name in names}
    incomplete = incomplete_prompts(names, prompts, exhaustive)
    positives, present = _positive_queries(record, prompt_of, prompts, incomplete)

    absent: dict[str, Query] = {}
    for name in names:
        key = prompt_key(prompt_of[name])
        if key not in present and key not in incomplete:
            absent.setdefault(key, Query(prompt_of[name], name))
    wanted = len(absent) if num_negatives in (None, ALL_NEGATIVES) else num_negatives
    not_absent = present | incomplete
    own = [prompt for prompt in negative_prompts if prompt_key(prompt) not in not_absent]
    if not present and not own:
        wanted = max(wanted, 1)
    pool = list(absent.values())
    chosen = sorted(rng.choice(len(pool), size=min(wanted, len(pool)), replace=False))
    negatives = {prompt_key(pool[i].prompt): pool[i] for i in chosen}
    for prompt in own:
        negatives.setdefault(prompt_key(prompt), Query(prompt, None))
    return positives + list(negatives.values())


def _positive_queries(
    record: Mapping[str, Any], prompt_of: Mapping[str, str], prompts: Mapping[str, str], incomplete: Set[str]
) -> tuple[list[Query], set[str]]:
    """Positive queries in the order of `prompt_of`, and the keys of all prompts present in the image."""
    groups: dict[str, list[int]] = {}
    texts: dict[str, tuple[str, str]] = {}
    present: set[str] = set()
    crowded: set[str] = set()
    for row, annotation in enumerate(record["annotations"]):
        if is_void(annotation):
            continue
        name = annotation["category"]
        prompt = prompts.get(prompt_key(name), name)
        key = prompt_key(prompt)
        present.add(key)
        if annotation["iscrowd"]:
            crowded.add(key)
        else:
            groups.setdefault(key, []).append(row)
            texts.setdefault(key, (prompt, name))
    order = {prompt_key(prompt): position for position, prompt in enumerate(prompt_of.values())}
    queries = []
    for key in sorted(groups, key=lambda k: (order.get(k, len(order)), k)):
        rows = tuple(groups[key])
        is_exhaustive = key not in incomplete and key not in crowded
        queries.append(Query(*texts[key], annotation_rows=rows, is_positive=True, is_exhaustive=is_exhaustive))
    return queries, present
