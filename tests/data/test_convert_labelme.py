"""LabelMe beyond polygons: masks, folders within folders, image paths, and files that are damaged or hostile."""

from __future__ import annotations

import base64
import io
import json
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3lora.data.convert import convert_folder
from sam3lora.data.convert.labelme import read_labelme
from sam3lora.data.convert.run import guess_format
from sam3lora.errors import UserError

from .convert_cases import mask_with, read_first, read_set, write_image

BOX = [[10, 20], [14, 22]]  # 5 x 3 pixels: both corners are inside
L_SHAPE = np.array([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=bool)
SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10]]


def png(picture: Image.Image | np.ndarray) -> str:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def shape(kind="polygon", points=SQUARE, label="crack", **more) -> dict:
    return {"label": label, "points": points, "shape_type": kind, **more}


def mask_shape(mask=L_SHAPE, points=BOX, **more) -> dict:
    return shape("mask", points, mask=mask if isinstance(mask, str) else png(mask), **more)


def write_labels(path: Path, *shapes: dict, image: str | None = "a.png", **changes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"shapes": list(shapes), "imagePath": image, "imageHeight": 60, "imageWidth": 80, **changes}
    path.write_text(json.dumps(content))
    return path


def only_mask(root: Path, *shapes: dict) -> tuple[np.ndarray, dict[str, int]]:
    write_image(root / "a.png")
    write_labels(root / "a.json", *shapes)
    image, faults = read_first(read_labelme, root)
    [thing] = image.objects
    return thing.decode((60, 80)), faults


def in_image(part: np.ndarray, x: int, y: int) -> np.ndarray:
    whole = np.zeros((60, 80), dtype=bool)
    whole[y : y + part.shape[0], x : x + part.shape[1]] = part
    return whole


def palette_png() -> Image.Image:
    """Index 1 is the object, though the palette shows it in black."""
    picture = Image.fromarray(L_SHAPE.astype(np.uint8)).convert("P")
    picture.putpalette([255, 255, 255, 0, 0, 0])
    return picture


@pytest.mark.parametrize(
    "picture",
    [
        L_SHAPE,  # one bit a pixel
        L_SHAPE.astype(np.uint8),  # grey 0 and 1
        L_SHAPE.astype(np.uint8) * 255,
        L_SHAPE.astype(np.uint16) * 1000,
        palette_png(),
        np.stack([L_SHAPE * np.uint8(255)] * 3 + [np.full((3, 5), 255, np.uint8)], axis=2),  # the alpha says nothing
    ],
    ids=["bit", "one", "white", "16 bit", "palette", "alpha"],
)
def test_a_mask_covers_its_box(tmp_path, picture):
    mask, faults = only_mask(tmp_path, mask_shape(png(picture)))
    np.testing.assert_array_equal(mask, in_image(L_SHAPE, 10, 20))
    assert faults == {}
    assert guess_format(tmp_path) == "labelme"


def test_a_mask_at_the_border_of_its_image(tmp_path):
    mask, faults = only_mask(tmp_path, mask_shape(L_SHAPE, [[75, 57], [79, 59]]))
    np.testing.assert_array_equal(mask, in_image(L_SHAPE, 75, 57))
    assert faults == {}
    mask, faults = only_mask(tmp_path, mask_shape(L_SHAPE, [[-1, 57], [3, 59]]))
    np.testing.assert_array_equal(mask, in_image(L_SHAPE[:, 1:], 0, 57))
    assert faults == {"out_of_bounds": 1}


def test_a_mask_without_the_last_row_and_column_of_its_box(tmp_path):
    mask, _ = only_mask(tmp_path, mask_shape(L_SHAPE, [[10, 20], [15, 23]]))
    np.testing.assert_array_equal(mask, in_image(L_SHAPE, 10, 20))


def test_masks_and_polygons_of_a_group_are_one_object(tmp_path):
    corner = mask_shape(np.ones((2, 2), bool), [[30, 30], [31, 31]], group_id=1)
    mask, _ = only_mask(tmp_path, mask_shape(group_id=1), shape(group_id=1), corner)
    filled = [in_image(np.ones((side, side), bool), at, at) for side, at in ((10, 0), (2, 30))]
    parts = in_image(L_SHAPE, 10, 20) | filled[0] | filled[1]
    np.testing.assert_array_equal(mask, parts)


def test_shapes_that_are_lost_make_no_negatives(tmp_path):
    root = tmp_path / "in"
    images = {
        "crack": [shape()],
        "lines": [shape("linestrip", SQUARE)],
        "points": [shape("point", [[1, 1]]), shape("line", [[1, 1], [5, 5]])],
        "no mask": [mask_shape() | {"mask": None}],
        "empty mask": [mask_shape(np.zeros((3, 5), bool))],
        "outside": [shape(points=[[100, 100], [110, 100], [110, 110]])],
        "hole and lines": [shape(label="hole"), shape("linestrip", SQUARE)],  # it shows a crack, which is lost
        "crack and nose": [shape(), shape("point", [[1, 1]], label="nose")],  # no object has this category
        "nose": [shape("point", [[1, 1]], label="nose")],  # but what else it shows is not known
        "negative": [],
    }
    for name, shapes in images.items():
        write_image(root / f"{name}.png")
        write_labels(root / f"{name}.json", *shapes, image=f"{name}.png")
    write_image(root / "unlabelled.png")
    report = convert_folder(root, tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"crack", "crack and nose", "negative"}
    faults = {fault.kind: fault.count for fault in report.faults}
    assert faults == {
        "skipped_shape": 7,
        "empty_object": 2,
        "out_of_bounds": 1,
        "unlabelled_image": 1,
        "incomplete_image": 7,
        "left_out_label": 1,
    }


def test_folders_within_a_split(tmp_path):
    # equal names in two folders: each file belongs to the image beside it
    for place, size_wh in (("train/cam1", (80, 60)), ("train/cam2", (40, 30)), ("val", (80, 60))):
        write_image(tmp_path / place / "0.png", size_wh)
        write_labels(tmp_path / place / "0.json", shape(), image="0.png", imageHeight=size_wh[1], imageWidth=size_wh[0])
    labelled, faults = read_set(read_labelme, tmp_path)
    found = [image.path.relative_to(tmp_path).as_posix() for image in labelled.splits["train"]]
    assert found == ["train/cam1/0.png", "train/cam2/0.png"]
    assert [image.size_hw for image in labelled.splits["train"]] == [(60, 80), (30, 40)]
    assert len(labelled.splits["valid"]) == 1
    assert faults == {}


@pytest.mark.parametrize("named", ["../images/b.png", "..\\images\\b.png"])
def test_an_image_path_with_folders(tmp_path, named):
    write_image(tmp_path / "train" / "images" / "b.png")
    write_image(tmp_path / "train" / "labels" / "a.png", (40, 30))  # of the same name as the label file
    write_labels(tmp_path / "train" / "labels" / "a.json", shape(), image=named)
    image, faults = read_first(read_labelme, tmp_path)
    assert image.path == tmp_path / "train" / "images" / "b.png"
    assert faults == {"unlabelled_image": 1}


def test_an_image_that_was_renamed_with_its_label_file(tmp_path):
    write_image(tmp_path / "new.png")
    write_labels(tmp_path / "new.json", shape(), image="old.png")
    image, faults = read_first(read_labelme, tmp_path)
    assert (image.path.name, len(image.objects), faults) == ("new.png", 1, {"renamed_source_image": 1})


def test_two_label_files_of_one_image_are_joined(tmp_path):
    # apart, each copy would be a negative of what the other one shows
    write_image(tmp_path / "a.png")
    write_labels(tmp_path / "a.json", shape())
    write_labels(tmp_path / "a2.json", shape(label="hole"))
    image, faults = read_first(read_labelme, tmp_path)
    assert [thing.category for thing in image.objects] == ["crack", "hole"]
    assert faults == {"shared_image": 1}
    write_labels(tmp_path / "a2.json", shape(), imageHeight=30, imageWidth=40)
    with pytest.raises(UserError, match=r"a2\.json.*40 x 30"):
        read_set(read_labelme, tmp_path)


def bomb(width: int, height: int) -> str:
    """A PNG whose header says width x height, with as many black pixels as compress well."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10**7), 9)
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    ).decode()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("mask", "points"),
    [
        (bomb(50_000, 50_000), BOX),
        (bomb(50_000, 50_000), [[0, 0], [49_999, 49_999]]),
        (bomb(12_000, 12_000), [[0, 0], [11_999, 11_999]]),  # what Pillow would still decode
        (png(L_SHAPE), [[10, 20], [30, 40]]),
        (png(L_SHAPE)[:-40], BOX),
        (base64.b64encode(b"GIF89a").decode(), BOX),
        ("not base64!", BOX),
        ("", BOX),
        (7, BOX),
        (png(L_SHAPE), [[-1e308, -1e308], [1e308, 1e308]]),
    ],
    ids=["bomb", "bomb in a box", "large", "other size", "cut off", "gif", "text", "empty", "number", "huge box"],
)
def test_a_mask_that_cannot_be_read_is_named(tmp_path, mask, points):
    write_image(tmp_path / "a.png")
    write_labels(tmp_path / "a.json", shape(), shape("mask", points, mask=mask))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.json, shape 2: .*mask"):
        read_set(read_labelme, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"shapes": [shape()], "imageHeight": 10**9, "imageWidth": 1}),
        json.dumps({"shapes": [shape("circle", [[-1e308, 0], [1e308, 0]])]}),
        '{"shapes": [{"label": "a", "points": [[1' + "0" * 400 + ", 1]]}]}",
        '{"shapes": [{"label": "a", "points": [[1' + "0" * 5000 + ", 1]]}]}",
        '{"shapes": [' + "[" * 10**5,
        '{"shapes": [' + '{"a":' * 10**5,
    ],
    ids=["huge image", "huge circle", "beyond a float", "thousands of digits", "deep lists", "deep objects"],
)
def test_hostile_files_are_named(tmp_path, content):
    write_image(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json"):
        read_set(read_labelme, tmp_path)


def test_huge_coordinates_are_clipped(tmp_path):
    mask, faults = only_mask(tmp_path, shape(points=[[40, -1e300], [1e300, -1e300], [1e300, 1e300], [40, 1e300]]))
    np.testing.assert_array_equal(mask, mask_with((slice(None), slice(40, None)), size_hw=(60, 80)))
    assert faults == {"out_of_bounds": 1}
