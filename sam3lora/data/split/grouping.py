"""Grouping images that show the same picture or recording, which must stay in one split."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sam3lora.data.images import ImageError, read_image
from sam3lora.data.split.leakage import source_name
from sam3lora.errors import UserError

NEAR_DUPLICATE_BITS = 4  # of 64; independent photographs rarely differ in fewer than 8
_MIN_CONTRAST = 8  # grey levels; with less contrast, the differences within a picture are noise


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of an image's content."""

    digest: str  # SHA-256 of the file
    difference_hash: int | None  # None for an image that is broken or has hardly any contrast


def difference_hash(image_HW3: np.ndarray) -> int | None:
    """64-bit dHash of an RGB image: which of two horizontal neighbours is brighter, on a 9 x 8 thumbnail.

    None if the image has hardly any contrast. Source: N. Krawetz, "Kind of Like That", The Hacker Factor Blog, 2013.
    """
    grey = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY).astype(np.float32)
    thumbnail = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA)
    if np.ptp(thumbnail) < _MIN_CONTRAST:
        return None
    bits = (thumbnail[:, 1:] > thumbnail[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def read_fingerprints(paths: Sequence[Path]) -> list[Fingerprint]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_read_fingerprint, paths))


def group_images(
    file_names: Sequence[str],
    fingerprints: Sequence[Fingerprint],
    group_by: str | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Group images with the same content, exports of one picture (`name_jpg.rf.<hash>`), near-duplicates and, with
    `group_by`, images whose names agree on a pattern. Grouping is transitive.

    Args:
        group_by: Regular expression to search in the names. Images belong together if its groups match the same text
            (or the whole match, if it has no groups): `^(GX\\d+)_` joins the frames of a video.

    Returns:
        Group number of each image (0, 1, ... by first appearance), and the names that the pattern does not match.

    Raises:
        UserError: The pattern is invalid or matches no name.
    """
    pairs = _pairs_of_equal([fingerprint.digest for fingerprint in fingerprints])
    sources = [source_name(name) for name in file_names]
    exported = {source for source, name in zip(sources, file_names, strict=True) if source != Path(name).stem}
    pairs += _pairs_of_equal([source if source in exported else None for source in sources])
    pairs += _near_duplicates([fingerprint.difference_hash for fingerprint in fingerprints])
    unmatched = []
    if group_by is not None:
        keys = _match_names(file_names, group_by)
        pairs += _pairs_of_equal(keys)
        unmatched = [name for name, key in zip(file_names, keys, strict=True) if key is None]
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    size = len(file_names)
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    return connected_components(graph, directed=False)[1], unmatched


def _read_fingerprint(path: Path) -> Fingerprint:
    data = path.read_bytes()
    try:
        hashed = difference_hash(read_image(data))
    except ImageError:
        hashed = None
    return Fingerprint(hashlib.sha256(data).hexdigest(), hashed)


def _pairs_of_equal(keys: Iterable[Hashable]) -> list[tuple[int, int]]:
    """(first, other) for each position with the same key as an earlier first one; None is not a key."""
    positions: dict[Hashable, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        if key is not None:
            positions[key].append(position)
    return [(first, other) for first, *others in positions.values() for other in others]


def _near_duplicates(hashes: Sequence[int | None]) -> list[tuple[int, int]]:
    positions = np.array([position for position, value in enumerate(hashes) if value is not None], dtype=int)
    values = np.array([value for value in hashes if value is not None], dtype=np.uint64)
    pairs = []
    for row, value in enumerate(values):
        near = np.flatnonzero(np.bitwise_count(values[row + 1 :] ^ value) <= NEAR_DUPLICATE_BITS) + row + 1
        pairs += [(int(positions[row]), int(position)) for position in positions[near]]
    return pairs


def _match_names(file_names: Sequence[str], pattern: str) -> list[Hashable]:
    try:
        matches = [re.search(pattern, name) for name in file_names]
    except re.error as error:
        raise UserError(f"--group-by {pattern!r} is not a regular expression: {error}") from None
    if not any(matches):
        raise UserError(f"--group-by {pattern!r} matches no image name, for example {file_names[0]!r}")
    return [match and (match.groups() or match.group()) for match in matches]
