"""Splitting: related images stay together, categories come near the fractions, equal seeds give equal splits."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console

from sam3lora.data.check import check_folder
from sam3lora.data.report_tables import print_splitting
from sam3lora.data.split.grouping import Fingerprint, difference_hash, group_images
from sam3lora.data.split.splitting import SplittingReport, assign_groups, split_folder
from sam3lora.errors import UserError

from .coco_builder import annotation


def texture(seed: int) -> np.ndarray:
    """An RGB picture (60, 80, 3) with structure of its own."""
    return cv2.resize(np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8), (80, 60))


def write_pictures(folder: Path, pictures: dict[str, np.ndarray], categories=("crack",)) -> Path:
    """A flat COCO folder; picture k shows one object of category k modulo their number."""
    folder.mkdir(parents=True)
    for name, pixels in pictures.items():
        cv2.imwrite(str(folder / name), pixels)
    content = {
        "images": [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in enumerate(pictures)],
        "annotations": [annotation(i, i, 1 + i % len(categories)) for i in range(len(pictures))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def split_of(target: Path) -> dict[str, str]:
    return {path.name: path.parent.name for path in target.glob("*/*") if path.suffix != ".json"}


def printed(report: SplittingReport) -> str:
    stream = io.StringIO()
    print_splitting(report, Console(file=stream, width=200))
    return " ".join(stream.getvalue().split())


def fingerprints(*digests: str) -> list[Fingerprint]:
    return [Fingerprint(digest, None) for digest in digests]


def test_groups_by_content_by_source_and_over_several_steps():
    export = "x_jpg.rf.0123456789abcdef0123456789abcdef.jpg"
    other = "x_jpg.rf.fedcba9876543210fedcba9876543210.jpg"
    names = ["a.jpg", export, "b.jpg", other, "c.jpg", "c.jpg"]
    # a = first export by content, exports by source; equal plain names of joined splits mean nothing
    groups, _ = group_images(names, fingerprints("1", "1", "2", "3", "4", "5"))
    assert groups.tolist() == [0, 0, 1, 0, 2, 3]
    groups, unmatched = group_images([], [])
    assert (groups.tolist(), unmatched) == ([], [])


def test_groups_by_pattern():
    names = ["GX01_1.jpg", "GX02_1.jpg", "GX01_2.jpg", "other.jpg"]
    groups, unmatched = group_images(names, fingerprints(*"abcd"), r"^(GX\d+)_")
    assert groups.tolist() == [0, 1, 0, 2]
    assert unmatched == ["other.jpg"]
    assert group_images(names, fingerprints(*"abcd"), r"GX\d+")[0].tolist() == [0, 1, 0, 2]
    for pattern in ("(", "^IMG"):  # invalid, and without a match
        with pytest.raises(UserError, match=rf"--group-by '{re.escape(pattern)}'"):
            group_images(names, fingerprints(*"abcd"), pattern)


def test_difference_hash_finds_the_same_picture_and_no_other():
    picture = texture(0)
    brighter = cv2.convertScaleAbs(picture, alpha=0.8, beta=30)
    smaller = cv2.resize(picture, (40, 30), interpolation=cv2.INTER_AREA)

    def bits(other: np.ndarray) -> int:
        return (difference_hash(picture) ^ difference_hash(other)).bit_count()

    assert max(bits(brighter), bits(smaller)) <= 4
    assert min(bits(texture(seed)) for seed in range(1, 30)) > 8
    # plain pictures all look alike, so they are not compared
    assert difference_hash(np.full((60, 80, 3), 90, dtype=np.uint8)) is None


def test_near_duplicates_and_copies_stay_together(tmp_path):
    pictures = {f"{seed}.png": texture(seed) for seed in range(12)}
    for seed in range(3):
        pictures[f"dim{seed}.png"] = cv2.convertScaleAbs(pictures[f"{seed}.png"], alpha=0.9)
        pictures[f"copy{seed}.png"] = pictures[f"{seed}.png"]
    source = write_pictures(tmp_path / "in", pictures)
    for seed in range(4):
        report = split_folder(source, tmp_path / f"out{seed}", fractions=(0.5, 0.25, 0.25), seed=seed)
        where = split_of(tmp_path / f"out{seed}")
        assert len(where) == 18
        for number in range(3):
            assert where[f"{number}.png"] == where[f"dim{number}.png"] == where[f"copy{number}.png"]
        assert sum(split["num_groups"] for split in report.splits.values()) == 12
        assert report.largest_group == 3
        assert check_folder(tmp_path / f"out{seed}").leaks == []
    # the seed alone decides
    split_folder(source, tmp_path / "again", fractions=(0.5, 0.25, 0.25), seed=1)
    assert split_of(tmp_path / "again") == split_of(tmp_path / "out1") != split_of(tmp_path / "out2")


def test_plain_pictures_are_not_grouped(tmp_path):
    pictures = {f"{level}.png": np.full((60, 80, 3), level, dtype=np.uint8) for level in range(10, 100, 10)}
    report = split_folder(write_pictures(tmp_path / "in", pictures), tmp_path / "out", fractions=(0.7, 0.3))
    assert report.largest_group == 1
    assert "of the images, not" not in printed(report)  # 6 and 3 images are near enough
    assert list(report.splits) == ["train", "valid"]
    assert json.loads(json.dumps(report.to_dict()))["splits"]["train"]["num_images"] == 6


def test_printed_report_names_what_needs_attention(tmp_path):
    # two large groups cannot be divided 9 to 1, and the pattern does not match the names of one of them
    pictures = {f"clip1_{number}.png": texture(number // 2) for number in range(8)}
    pictures |= {f"copy{number}.png": texture(100) for number in range(6)}
    report = split_folder(
        write_pictures(tmp_path / "in", pictures), tmp_path / "out", fractions=(0.9, 0.1), group_by="clip1"
    )
    text = printed(report)
    assert f"the largest of {report.largest_group}" in text
    assert f"valid has {report.splits['valid']['num_images'] / 14:.0%} of the images, not 10%" in text
    assert "in which --group-by finds nothing" in text


def test_existing_splits_are_joined(tmp_path):
    write_pictures(tmp_path / "in" / "train", {f"{seed}.png": texture(seed) for seed in range(6)})
    write_pictures(tmp_path / "in" / "valid", {f"{seed}.png": texture(seed + 50) for seed in range(4)}, ("hole",))
    report = split_folder(tmp_path / "in", tmp_path / "out", fractions=(0.5, 0.5))
    assert [split["num_images"] for split in report.splits.values()] == [5, 5]
    assert "of the images, not" not in printed(report)
    assert Counter(report.splits["train"]["categories"]) + Counter(report.splits["valid"]["categories"]) == {
        "crack": 6,
        "hole": 4,
    }


def test_categories_come_near_the_fractions():
    # 200 images: a common category in 160, a rare one in 20 of these, and 40 negatives
    rng = np.random.default_rng(0)
    counts = np.zeros((200, 4), dtype=int)
    counts[:160, 0] = rng.integers(1, 5, 160)
    counts[rng.choice(160, 20, replace=False), 1] = 1
    counts[160:, 2] = 1
    counts[:, 3] = 1
    for seed in range(5):
        assigned = assign_groups(counts, (0.8, 0.1, 0.1), seed)
        shares = np.array([counts[assigned == split].sum(axis=0) for split in range(3)]) / counts.sum(axis=0)
        assert np.abs(shares - np.array([[0.8], [0.1], [0.1]]))[:, 1:3].max() < 0.01
        assert np.abs(shares - np.array([[0.8], [0.1], [0.1]])).max() < 0.05


def test_every_split_gets_something():
    # by its fraction the last split would get a tenth of an image
    assigned = assign_groups(np.array([[1, 1], [1, 1], [1, 1]]), (0.8, 0.15, 0.05), 0)
    assert sorted(assigned) == [0, 1, 2]
    with pytest.raises(UserError, match=r"2 group.*3 splits"):
        assign_groups(np.array([[1, 1], [1, 1]]), (0.8, 0.1, 0.1), 0)


@pytest.mark.parametrize("fractions", [(1.0,), (0.8, 0.1), (1.1, -0.1), (0.25,) * 4, (0.8, 0.2, 0.0)])
def test_invalid_fractions(tmp_path, fractions):
    with pytest.raises(UserError, match="--fractions"):
        split_folder(tmp_path, tmp_path / "out", fractions=fractions)


def test_folder_without_coco_and_failure_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="data convert"):
        split_folder(tmp_path, tmp_path / "out")
    pictures = {f"{level}.png": np.full((60, 80, 3), level, dtype=np.uint8) for level in range(10, 100, 10)}
    source = write_pictures(tmp_path / "in", pictures)
    with pytest.raises(UserError, match="--group-by"):
        split_folder(source, tmp_path / "out", group_by="^IMG")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    # plain pictures all look alike and are not grouped
    report = split_folder(source, tmp_path / "out", fractions=(0.7, 0.3))
    assert (report.largest_group, list(report.splits)) == (1, ["train", "valid"])
    assert json.loads(json.dumps(report.to_dict()))["splits"]["train"]["num_images"] == 6


def test_real_set_with_augmented_copies(shared_data, tmp_path):
    report = split_folder(shared_data / "strawberry", tmp_path / "out")
    assert check_folder(tmp_path / "out").leaks == []
    total = sum(split["num_images"] for split in report.splits.values())
    assert total == 128
    for name, fraction in report.fractions.items():
        assert abs(report.splits[name]["num_images"] / total - fraction) < 0.06
        assert all(report.splits[name]["categories"].values())
