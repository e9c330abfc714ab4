"""Counting the pixels of label maps: classes, overlap, void, empty images and sizes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sam3lora.cli import main
from sam3lora.data.check import check_folder
from sam3lora.data.label_check import ClassPixels, check_labels
from sam3lora.data.report_tables import print_check
from sam3lora.errors import UserError

from .coco_builder import annotation, square

CATEGORIES = (("crack", 1), ("hole", 2), ("background", 3), ("void", 4), ("moss", 5))


def region(id_: int, x: int, y: int, side: int, *, image_id=0, category_id=1, **changes) -> dict:
    changes = {"bbox": [x, y, side, side], "segmentation": [square(x, y, side)], **changes}
    return annotation(id_, image_id, category_id, **changes)


@pytest.fixture
def labelled(folder):
    """Images of 80 x 60: one with everything, one with void only, one without labels, one all "background"."""
    regions = [
        region(0, 0, 0, 20),
        region(1, 10, 10, 20),  # of the same class: 100 pixels are shared, and count once
        region(2, 0, 0, 5, category_id=2),  # hides 25 pixels of the cracks
        region(3, 40, 0, 10, category_id=2, segmentation=[]),  # a box without a mask
        region(4, 60, 0, 10, iscrowd=1),
        region(5, 70, 50, 10, category_id=4, iscrowd=1),
        region(6, 0, 0, 30, image_id=1, category_id=4, iscrowd=1),
        region(7, 0, 0, 30, image_id=3, category_id=3),
    ]
    return folder.write(regions, num_images=4, categories=CATEGORIES).parent


def test_pixels_of_classes(labelled):
    [split] = check_labels(labelled).splits
    assert split.classes == {"crack": ClassPixels(1, 675, 25), "hole": ClassPixels(1, 25, 0)}
    assert (split.num_images, split.num_empty_images, split.num_boxes) == (4, 3, 1)
    assert split.num_pixels == 4 * 4800
    assert split.num_ignored == 100 + 100 + 100 + 900
    assert split.num_background == 4 * 4800 - 1200 - 700
    values = split.to_dict()
    assert values["classes"]["crack"]["share"] == 675 / (4 * 4800 - 1200)
    assert values["hidden_share"] == 25 / 725


def test_sizes_that_differ(folder):
    images = [{"id": n, "file_name": f"{n}.png", "width": w, "height": 60} for n, w in enumerate((80, 80, 40, 90))]
    folder.write([region(0, 0, 0, 10)], images=images)
    [split] = check_labels(folder.path).splits
    assert (split.num_sizes, split.smallest_hw, split.largest_hw) == (3, (60, 40), (60, 90))
    assert split.commonest_hw == (60, 80)


def test_classes_of_one_split_only(folder, tmp_path):
    folder.write([region(0, 0, 0, 10), region(1, 20, 0, 10, category_id=2)], categories=CATEGORIES)
    folder.path = tmp_path / "valid"
    # a crowd region is no pixel of its class
    folder.write([region(0, 0, 0, 10), region(1, 20, 0, 10, category_id=2, iscrowd=1)], categories=CATEGORIES)
    report = check_labels(tmp_path)
    assert report.classes_in_one_split() == {"hole": "train"}
    # one split alone is compared with nothing
    assert check_labels(tmp_path / "train").classes_in_one_split() == {}


def test_a_split_without_images_has_no_pixels(folder):
    path = folder.write([annotation(0)], draw=False)
    [split] = check_labels(path).splits
    assert (split.num_images, split.num_pixels, split.num_sizes) == (0, 0, 0)
    assert split.to_dict()["background_share"] == 0


def test_the_check_of_dense_data_prints_and_holds_the_pixels(labelled, capsys):
    report = check_folder(labelled)
    assert "labels" not in report.to_dict()
    report.labels = check_labels(labelled)
    stream = io.StringIO()
    print_check(report, Console(file=stream, width=200))
    for text in ("675", "3.75%", "3.45%", "6.25%"):  # pixels of cracks, their share, hidden and ignored pixels
        assert text in stream.getvalue()
    assert main(["data", "check", str(labelled), "--task", "dense", "--json", "-"]) in (0, None)
    assert '"num_hidden": 25' in capsys.readouterr().out


def test_what_cannot_be_checked_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        check_labels(tmp_path / "nowhere")
    many = [(f"c{number}", number) for number in range(255)]
    path = folder.write([region(n, 0, 0, 9, category_id=n) for n in range(255)], categories=many)
    with pytest.raises(UserError, match=r"255 .*254"):
        check_labels(path)
