"""Mask images: the meaning of values, reading of colours, sizes and voids, and exact round trips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3lora.data.convert import convert_folder
from sam3lora.data.convert.coco_folders import read_coco
from sam3lora.data.convert.labelled_set import LabelledImage, LabelledObject, LabelledSet
from sam3lora.data.convert.mask_images import read_masks, write_masks
from sam3lora.data.faults import FaultLog
from sam3lora.data.masks import decode_mask
from sam3lora.data.rle import encode_rle
from sam3lora.errors import UserError

from .convert_cases import counts, mask_with, read_first, read_set, write_image

TOP, MIDDLE = (0,), (2,)  # rows


def write_pair(root: Path, mask: np.ndarray | Image.Image, stem="a", size_wh=(8, 6)) -> Path:
    write_image(root / "train" / "images" / f"{stem}.jpg", size_wh)
    (root / "train" / "masks").mkdir(exist_ok=True)
    picture = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    picture.save(root / "train" / "masks" / f"{stem}.png")
    return root


def values(dtype=np.uint8, **rows: int) -> np.ndarray:
    """A mask image with these values in whole rows."""
    mask_HW = np.zeros((6, 8), dtype=dtype)
    for row, value in rows.items():
        mask_HW[{"top": 0, "middle": 2, "bottom": 4}[row]] = value
    return mask_HW


def read(root: Path, names=("crack",), **options) -> tuple[LabelledImage, dict[str, int]]:
    return read_first(read_masks, root, list(names), **options)


def categories(image: LabelledImage) -> list[str]:
    return [thing.category for thing in image.objects]


@pytest.mark.parametrize("white", [1, 255])
def test_one_category_in_black_and_white(tmp_path, white):
    mask = mask_with((slice(1, 3), slice(2, 5)), dtype=np.uint8, value=white)
    image, faults = read(write_pair(tmp_path, mask))
    np.testing.assert_array_equal(image.objects[0].decode((6, 8)), mask > 0)
    assert (image.objects[0].bbox_xywh, faults) == ((2, 1, 3, 2), {})
    assert read(write_pair(tmp_path / "negative", values()))[0].objects == []


def test_grey_values_are_cut_at_one_half(tmp_path):
    for name, row in (("bright", (127, 128, 255)), ("dark", (127, 128, 128))):
        mask = values()
        mask[0, :3] = row
        image, faults = read(write_pair(tmp_path / name, mask))
        assert image.objects[0].decode((6, 8))[0].tolist() == [False, True, True] + [False] * 5
        assert faults == {"grey_mask": 1}
    # an opaque alpha channel is 255 everywhere: it must not count
    mask = mask_with((0, 0), dtype=np.uint8, value=255)
    for mode in ("RGB", "RGBA", "LA"):
        image, _ = read(write_pair(tmp_path / mode, Image.fromarray(mask).convert(mode)))
        assert image.objects[0].decode((6, 8)).sum() == 1


def test_colours_are_read_by_brightness_and_for_one_category_only(tmp_path):
    mask = np.zeros((6, 8, 3), dtype=np.uint8)
    mask[0, 0] = (255, 255, 0)  # bright
    mask[0, 1] = (0, 0, 255)  # dark
    root = write_pair(tmp_path, mask)
    image, faults = read(root)
    assert image.objects[0].decode((6, 8)).sum() == 1
    assert faults == {"colour_mask": 1, "grey_mask": 1}
    with pytest.raises(UserError, match=r"a\.png.*colour"):
        read(root, ("crack", "hole"))


def test_values_number_categories(tmp_path):
    root = write_pair(tmp_path, values(top=1, middle=2, bottom=255))
    for names in (("crack", "hole"), ("Background", "crack", "hole")):
        image, faults = read(root, names)
        assert (categories(image), faults) == (["crack", "hole"], {})
        np.testing.assert_array_equal(decode_mask(image.void, (6, 8)), values(bottom=1))
    # in a palette image the index counts, not the colour
    picture = Image.fromarray(values(top=2)).convert("P")
    picture.putpalette([0, 0, 0, 10, 10, 10, 200, 0, 0])
    assert categories(read(write_pair(tmp_path / "palette", picture), ("crack", "hole"))[0]) == ["hole"]


@pytest.mark.parametrize(
    ("names", "value", "instances"),
    [(("crack",), 2, False), (("crack", "hole"), 3, False), (("crack", "hole"), 3000, True)],
)
def test_value_without_category_is_refused(tmp_path, names, value, instances):
    with pytest.raises(UserError, match=rf"a\.png: value {value} "):
        read(write_pair(tmp_path, values(np.uint16, top=value)), names, instances=instances)


def test_components(tmp_path):
    # the first two pixels touch at a corner
    root = write_pair(tmp_path, mask_with((0, 0), (1, 1), (4, 6), dtype=np.uint8, value=255))
    assert len(read(root)[0].objects) == 1
    assert sorted(int(t.decode((6, 8)).sum()) for t in read(root, components=True)[0].objects) == [1, 2]


def test_instances(tmp_path):
    # with one category 255 is an object like any other
    root = write_pair(tmp_path / "one", values(np.uint16, top=1, middle=255, bottom=40000))
    assert len(read(root, instances=True)[0].objects) == 3
    root = write_pair(tmp_path / "two", values(np.uint16, top=1001, middle=1002, bottom=2001))
    assert categories(read(root, ("crack", "hole"), instances=True)[0]) == ["crack", "crack", "hole"]


def test_mask_of_another_size(tmp_path):
    # a mask of half the size is scaled; one of another aspect ratio belongs to another image
    mask = mask_with((1, 2), size_hw=(3, 4), dtype=np.uint8, value=255)
    image, faults = read(write_pair(tmp_path, mask))
    assert (image.objects[0].bbox_xywh, faults) == ((4, 2, 2, 2), {"mask_resized": 1})
    with pytest.raises(UserError, match=r"a\.png: 4 x 3, image 6 x 8"):
        read(write_pair(tmp_path, mask, size_wh=(6, 8)))


def test_broken_mask_and_image_without_mask(tmp_path):
    root = write_pair(tmp_path, values())
    write_image(root / "train" / "images" / "unlabelled.png", (8, 6))
    assert read(root)[1] == {"unlabelled_image": 1}
    path = root / "train" / "masks" / "a.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"a\.png"):
        read(root)


def labelled(tmp_path: Path, *masks: np.ndarray, categories=("crack", "hole")) -> LabelledSet:
    """One image; mask k is an object of category k modulo their number."""
    path = write_image(tmp_path / "in.png", (8, 6))
    objects = [
        LabelledObject(categories[number % len(categories)], encode_rle(mask), (0, 0, 1, 1))
        for number, mask in enumerate(masks)
    ]
    return LabelledSet(list(categories), {"train": [LabelledImage(path, (6, 8), objects)]})


@pytest.mark.parametrize("categories", [("crack",), ("crack", "hole")])
def test_instances_come_back_exactly(tmp_path, categories):
    # the second touches the first and has two parts
    masks = [mask_with(TOP), mask_with((1, slice(4)), (5, 5)), mask_with((slice(2, 5), slice(1, 3)))]
    log = FaultLog()
    write_masks(labelled(tmp_path, *masks, categories=categories), tmp_path / "out", log, instances=True)
    assert counts(log) == {}
    back, _ = read_set(read_masks, tmp_path / "out", instances=True)
    assert back.categories == list(categories)
    found = {thing.decode((6, 8)).tobytes(): thing.category for thing in back.splits["train"][0].objects}
    assert found == {mask.tobytes(): categories[n % len(categories)] for n, mask in enumerate(masks)}


def test_smaller_objects_are_on_top_and_losses_are_counted(tmp_path):
    large, small = mask_with((slice(3),)), mask_with(TOP)
    for name, masks, fault in (
        ("small last", (large, small), "covered"),
        ("small first", (small, large), "covered"),
        ("equal", (small, small), "hidden"),
    ):
        log = FaultLog()
        write_masks(labelled(tmp_path, *masks, categories=("a",)), tmp_path / name, log, instances=True)
        assert counts(log) == {fault: 1}, name


def test_semantic_masks_keep_categories_and_negatives(tmp_path):
    crack, hole = mask_with(TOP), mask_with(MIDDLE)
    for name, masks, expected in (("out", (crack, hole), crack + 2 * hole), ("negative", (), np.zeros((6, 8)))):
        write_masks(labelled(tmp_path, *masks), tmp_path / name, FaultLog())
        written = np.array(Image.open(tmp_path / name / "train" / "masks" / "in.png"))
        np.testing.assert_array_equal(written, expected)


def test_too_many_objects_or_categories_for_the_values(tmp_path):
    many = LabelledSet(
        ["a", "b"], {"train": labelled(tmp_path, *[mask_with(TOP)] * 1000, categories=("a",)).splits["train"]}
    )
    with pytest.raises(UserError, match="999 objects"):
        write_masks(many, tmp_path / "out", FaultLog(), instances=True)
    with pytest.raises(UserError, match=r"254 categories.*255"):
        write_masks(labelled(tmp_path, categories=[f"c{n}" for n in range(255)]), tmp_path / "semantic", FaultLog())


def test_real_masks_are_kept_to_the_pixel(shared_data, tmp_path):
    # JPEGs named .png and RGBA images are among them; the masks are grey PNGs
    source = tmp_path / "in"
    source.mkdir()
    (source / "valid").symlink_to(shared_data / "uav_crack_dense" / "valid")
    report = convert_folder(source, tmp_path / "out", source_format="masks", names=["crack"])
    assert (report.splits["valid"]["num_objects"], report.faults) == (30, [])
    for image in read_coco(tmp_path / "out", None, FaultLog()).splits["valid"]:
        mask = np.array(Image.open(source / "valid" / "masks" / image.path.name))
        np.testing.assert_array_equal(image.objects[0].decode(image.size_hw), mask == 255)


@pytest.mark.parametrize("layout", ["{kind}/train", "train/{kind}"])
def test_masks_in_folders_within_a_split(tmp_path, layout):
    # equal names in two folders: each image gets its own mask, in one of the two spellings of its name
    images, masks = (tmp_path / layout.format(kind=kind) for kind in ("images", "masks"))
    for folder, row, suffix in (("cam1", TOP, ""), ("cam2/deep", MIDDLE, "_mask")):
        write_image(images / folder / "0.jpg", (8, 6))
        (masks / folder).mkdir(parents=True)
        Image.fromarray(mask_with(row)).save(masks / folder / f"0{suffix}.png")
    labelled, faults = read_set(read_masks, tmp_path, ["crack"])
    tops = {image.path.parent.name: image.objects[0].bbox_xywh[1] for image in labelled.splits["train"]}
    assert (tops, faults) == ({"cam1": 0, "deep": 2}, {})
    Image.fromarray(mask_with(TOP)).save(masks / "cam1" / "0_mask.png")
    with pytest.raises(UserError, match=r"0\.png and .*0_mask\.png"):
        read_set(read_masks, tmp_path, ["crack"])
