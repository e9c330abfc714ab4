"""What is asked of an image: its categories as positive queries, and prompts that are truly absent as negatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ALL_NEGATIVES = -1


@dataclass(frozen=True)
class Query:
    """One question to one image.

    Args:
        prompt: The text that the model reads.
        category: Category name, or None for a prompt of the user's own negative list.
        category_ids: The file's ids behind it (several when names repeat); empty for negatives.
        annotation_rows: Positions in the record's `annotations` of the objects to find; empty for negatives.
        is_positive: Whether there is anything to find.
    """

    prompt: str
    category: str | None
    category_ids: tuple[int, ...] = ()
    annotation_rows: tuple[int, ...] = ()
    is_positive: bool = False


def prompt_key(text: str) -> str:
    """Prompts with one key are one prompt to the model, whose tokenizer lower-cases and collapses white space.

    >>> prompt_key("  Road   Crack ")
    'road crack'
    """
    return " ".join(text.split()).casefold()


def sample_rng(seed: int, epoch: int, image_id: int, stream: int = 0) -> np.random.Generator:
    """Randomness of one image in one epoch: the same whichever worker, batch or order it comes in.

    `stream` separates uses (queries, placement), so that switching one on does not change the other.
    """
    return np.random.default_rng([seed % 2**63, epoch, image_id % 2**63, stream])


def build_queries(
    record: Mapping[str, Any],
    names: Sequence[str],
    *,
    rng: np.random.Generator,
    prompts_map: Mapping[str, str] | None = None,
    negative_prompts: Sequence[str] = (),
    num_negatives: int | None = None,
    exhaustive: bool = True,
) -> list[Query]:
    """The queries of one image: positives in category order, then sampled negatives, then the user's own.

    A category of which the image shows only crowd regions is not asked at all: it is there, so it is no negative, and
    there is nothing to match, so it is no positive. An image without any object is always asked at least one category
    when `exhaustive`, whatever `num_negatives` says: it is in the data set to teach absence.

    Args:
        record: A row of the index.
        names: Category names of the data set, without repetition: the pool of negatives.
        rng: From `sample_rng`.
        prompts_map: Category name -> prompt text; a category without an entry is asked by its name.
        negative_prompts: The user's own list: prompts that are nowhere in the data; asked of every image unless they
            equal a prompt that the image does contain.
        num_negatives: How many absent categories to sample, without replacement; None or -1 for all of them.
        exhaustive: Whether everything is annotated, so that a missing annotation means absence.

    Returns:
        Queries with pairwise different prompts; empty when nothing can be asked truthfully.
    """
    prompts = {prompt_key(k): v for k, v in (prompts_map or {}).items()}
    prompt_of = {name: prompts.get(prompt_key(name), name) for name in names}
    positives, present = _positive_queries(record, prompt_of, prompts)

    absent: dict[str, Query] = {}
    if exhaustive:
        for name in names:
            key = prompt_key(prompt_of[name])
            if key not in present:
                absent.setdefault(key, Query(prompt_of[name], name))
    wanted = len(absent) if num_negatives in (None, ALL_NEGATIVES) else num_negatives
    own = [p for p in negative_prompts if prompt_key(p) not in present]
    if not present and not own:
        wanted = max(wanted, 1)
    pool = list(absent.values())
    chosen = sorted(rng.choice(len(pool), size=min(wanted, len(pool)), replace=False)) if pool and wanted > 0 else []
    negatives = {prompt_key(pool[i].prompt): pool[i] for i in chosen}
    for prompt in own:
        negatives.setdefault(prompt_key(prompt), Query(prompt, None))
    return positives + list(negatives.values())


def _positive_queries(
    record: Mapping[str, Any], prompt_of: Mapping[str, str], prompts: Mapping[str, str]
) -> tuple[list[Query], set[str]]:
    """Positive queries in the order of `prompt_of`, and the keys of all prompts that the image contains."""
    groups: dict[str, list[int]] = {}
    texts: dict[str, tuple[str, str]] = {}
    present: set[str] = set()
    for row, annotation in enumerate(record["annotations"]):
        name = annotation["category"]
        prompt = prompt_of.get(name) or prompts.get(prompt_key(name), name)
        key = prompt_key(prompt)
        present.add(key)
        if not annotation["iscrowd"]:
            groups.setdefault(key, []).append(row)
            texts.setdefault(key, (prompt, name))
    order = {prompt_key(prompt): position for position, prompt in enumerate(prompt_of.values())}
    queries = []
    for key in sorted(groups, key=lambda k: (order.get(k, len(order)), k)):
        rows = tuple(groups[key])
        ids = tuple(sorted({record["annotations"][row]["category_id"] for row in rows}))
        queries.append(Query(*texts[key], category_ids=ids, annotation_rows=rows, is_positive=True))
    return queries, present
