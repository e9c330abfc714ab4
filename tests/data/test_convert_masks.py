"""Mask images: what values mean, how colours, sizes and voids are read, and exact round trips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3lora.data.convert import convert_folder
from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.convert.labelled_set import LabelledImage, LabelledObject, LabelledSet, encode_bitmap
from sam3lora.data.convert.read_coco import read_coco
from sam3lora.data.convert.read_masks import read_masks
from sam3lora.data.convert.write_masks import write_masks
from sam3lora.errors import UserError


def write_pair(root: Path, mask: np.ndarray | Image.Image, stem="a", size_wh=(8, 6)) -> Path:
    for kind in ("images", "masks"):
        (root / "train" / kind).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size_wh).save(root / "train" / "images" / f"{stem}.jpg")
    picture = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    picture.save(root / "train" / "masks" / f"{stem}.png")
    return root


def blank(dtype=np.uint8) -> np.ndarray:
    return np.zeros((6, 8), dtype=dtype)


def read(root: Path, names=("crack",), **options) -> tuple[LabelledImage, FaultLog]:
    log = FaultLog()
    return read_masks(root, list(names), log, **options).splits["train"][0], log


def test_black_mask_is_a_negative(tmp_path):
    image, _ = read(write_pair(tmp_path, blank()))
    assert image.objects == []


@pytest.mark.parametrize("white", [1, 255])
def test_one_category_in_black_and_white(tmp_path, white):
    mask = blank()
    mask[1:3, 2:5] = white
    image, log = read(write_pair(tmp_path, mask))
    np.testing.assert_array_equal(image.objects[0].decode((6, 8)), mask > 0)
    assert image.objects[0].bbox_xywh == (2, 1, 3, 2)
    assert not list(log)


def test_grey_values_are_cut_at_one_half(tmp_path):
    mask = blank()
    mask[0, :3] = (127, 128, 255)
    image, log = read(write_pair(tmp_path, mask))
    assert image.objects[0].decode((6, 8))[0].tolist() == [False, True, True] + [False] * 5
    assert log.count("grey_mask") == 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_channels_are_read_as_grey(tmp_path, mode):
    # An opaque alpha channel is 255 everywhere: the maximum over channels would be all object.
    mask = blank()
    mask[0, 0] = 255
    image, _ = read(write_pair(tmp_path, Image.fromarray(mask).convert(mode)))
    assert image.objects[0].decode((6, 8)).sum() == 1


def test_colours_are_dark_or_bright_and_tell_no_category(tmp_path):
    mask = np.zeros((6, 8, 3), dtype=np.uint8)
    mask[0, 0] = (255, 255, 0)  # bright
    mask[0, 1] = (0, 0, 255)  # dark
    root = write_pair(tmp_path, mask)
    image, log = read(root)
    assert image.objects[0].decode((6, 8)).sum() == 1
    assert log.count("colour_mask") == 1
    with pytest.raises(UserError, match="colour image"):
        read(root, ("crack", "hole"))


def test_values_of_several_categories(tmp_path):
    mask = blank()
    mask[0], mask[2], mask[4] = 1, 2, 255
    root = write_pair(tmp_path, mask)
    for names in (("crack", "hole"), ("Background", "crack", "hole")):
        image, log = read(root, names)
        assert [thing.category for thing in image.objects] == ["crack", "hole"]
        assert log.count("void_pixels") == 1


def test_palette_index_is_the_value(tmp_path):
    mask = blank()
    mask[0] = 2
    picture = Image.fromarray(mask).convert("P")
    picture.putpalette([0, 0, 0, 10, 10, 10, 200, 0, 0])
    image, _ = read(write_pair(tmp_path, picture), ("crack", "hole"))
    assert [thing.category for thing in image.objects] == ["hole"]


@pytest.mark.parametrize(("names", "value"), [(("crack",), 2), (("crack", "hole"), 3)])
def test_value_without_category_is_refused(tmp_path, names, value):
    mask = blank()
    mask[0] = value
    with pytest.raises(UserError, match=rf"a\.png: value {value} is not among 1\.\.{len(names)}"):
        read(write_pair(tmp_path, mask), names)


def test_components(tmp_path):
    mask = blank()
    mask[0, 0] = mask[1, 1] = mask[4, 6] = 255  # the first two touch at a corner
    root = write_pair(tmp_path, mask)
    assert len(read(root)[0].objects) == 1
    assert sorted(int(t.decode((6, 8)).sum()) for t in read(root, components=True)[0].objects) == [1, 2]


def test_instances(tmp_path):
    mask = blank(np.uint16)
    mask[0], mask[2], mask[4] = 1, 255, 40000  # 255 is an object like any other
    assert len(read(write_pair(tmp_path / "one", mask), instances=True)[0].objects) == 3
    mask[0], mask[2], mask[4] = 1001, 1002, 2001
    root = write_pair(tmp_path / "two", mask)
    image, _ = read(root, ("crack", "hole"), instances=True)
    assert [thing.category for thing in image.objects] == ["crack", "crack", "hole"]
    mask[0] = 3000
    write_pair(root, mask)
    with pytest.raises(UserError, match="value 3000 is not among 1000 x category"):
        read(root, ("crack", "hole"), instances=True)


def test_mask_of_another_size(tmp_path):
    # Half the image's size is scaled by nearest pixel; another shape belongs to another image.
    mask = blank()[:3, :4].copy()
    mask[1, 2] = 255
    image, log = read(write_pair(tmp_path, mask))
    assert image.objects[0].bbox_xywh == (4, 2, 2, 2)
    assert log.count("mask_resized") == 1
    with pytest.raises(UserError, match="4 x 3, image 6 x 8"):
        read(write_pair(tmp_path, mask, size_wh=(6, 8)))


def test_broken_mask_and_image_without_mask(tmp_path):
    root = write_pair(tmp_path, blank())
    Image.new("RGB", (8, 6)).save(root / "train" / "images" / "unlabelled.png")
    _, log = read(root)
    assert log.count("unlabelled_image") == 1
    path = root / "train" / "masks" / "a.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"cannot read mask .*a\.png"):
        read(root)


def labelled(tmp_path: Path, *masks: np.ndarray, categories=("crack", "hole")) -> LabelledSet:
    path = tmp_path / "in.png"
    Image.new("RGB", (8, 6)).save(path)
    objects = [
        LabelledObject(categories[number % len(categories)], encode_bitmap(mask), (0, 0, 1, 1))
        for number, mask in enumerate(masks)
    ]
    return LabelledSet(list(categories), {"train": [LabelledImage(path, (6, 8), objects)]})


@pytest.mark.parametrize("categories", [("crack",), ("crack", "hole")])
def test_instances_come_back_exactly(tmp_path, categories):
    masks = [np.zeros((6, 8), dtype=bool) for _ in range(3)]
    masks[0][0, :] = True
    masks[1][1, :4] = masks[1][5, 5] = True  # touches the first, and has two parts
    masks[2][2:5, 1:3] = True
    log = FaultLog()
    write_masks(labelled(tmp_path, *masks, categories=categories), tmp_path / "out", log, instances=True)
    assert not list(log)
    back = read_masks(tmp_path / "out", None, log, instances=True)
    assert back.categories == list(categories)
    found = {thing.decode((6, 8)).tobytes(): thing.category for thing in back.splits["train"][0].objects}
    assert found == {mask.tobytes(): categories[n % len(categories)] for n, mask in enumerate(masks)}


def test_smaller_objects_lie_on_top_and_losses_are_counted(tmp_path):
    large, small = np.zeros((2, 6, 8), dtype=bool)
    large[:3], small[0] = True, True
    for order in ((large, small), (small, large)):
        log = FaultLog()
        write_masks(labelled(tmp_path, *order, categories=("a",)), tmp_path / str(id(order)), log, instances=True)
        assert (log.count("covered"), log.count("hidden")) == (1, 0)
    log = FaultLog()
    write_masks(labelled(tmp_path, small, small, categories=("a",)), tmp_path / "same", log, instances=True)
    assert log.count("hidden") == 1


def test_semantic_masks_keep_categories_and_negatives(tmp_path):
    crack, hole = np.zeros((2, 6, 8), dtype=bool)
    crack[0], hole[2] = True, True
    write_masks(labelled(tmp_path, crack, hole), tmp_path / "out", FaultLog())
    values = np.array(Image.open(tmp_path / "out" / "train" / "masks" / "in.png"))
    np.testing.assert_array_equal(values, crack + 2 * hole)
    write_masks(labelled(tmp_path), tmp_path / "negative", FaultLog())
    assert not np.array(Image.open(tmp_path / "negative" / "train" / "masks" / "in.png")).any()


def test_too_many_objects_for_the_values(tmp_path):
    mask = np.ones((6, 8), dtype=bool)
    many = LabelledSet(["a", "b"], {"train": labelled(tmp_path, *[mask] * 1000, categories=("a",)).splits["train"]})
    with pytest.raises(UserError, match="more than 999 objects"):
        write_masks(many, tmp_path / "out", FaultLog(), instances=True)


def test_real_masks_are_kept_to_the_pixel(shared_data, tmp_path):
    # JPEGs named .png and RGBA images among them; the masks are grey PNGs.
    source = shared_data / "uav_crack_dense"
    report = convert_folder(source, tmp_path / "out", source_format="masks", names=["crack"])
    assert {name: split["num_objects"] for name, split in report.splits.items()} == {"train": 80, "valid": 30}
    assert report.faults == []
    for image in read_coco(tmp_path / "out", None, FaultLog()).splits["valid"]:
        mask = np.array(Image.open(source / "valid" / "masks" / image.path.name))
        np.testing.assert_array_equal(image.objects[0].decode(image.size_hw), mask == 255)
