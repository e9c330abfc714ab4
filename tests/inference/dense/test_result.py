"""Results of dense folders, from logits drawn by hand: labels, probabilities, areas, pictures and files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sam3lora.data.images import read_image
from sam3lora.data.masks import decode_mask
from sam3lora.errors import UserError
from sam3lora.inference.dense.files import DenseFiles
from sam3lora.inference.dense.result import DenseResult
from sam3lora.model.dense.settings import DenseSettings

SURE = 4.0
SIZE_HW = (4, 8)
LEFT = np.zeros(SIZE_HW, bool)
LEFT[:, :4] = True


def logits_of(*masks: np.ndarray) -> np.ndarray:
    """Sure of each mask, at the size of the image, so that nothing is enlarged."""
    return np.where(np.stack(masks), SURE, -SURE).astype(np.float32)


def result_of(mode: str, classes: tuple[str, ...], *masks: np.ndarray, size_hw=SIZE_HW, **settings) -> DenseResult:
    chosen = DenseSettings(mode=mode, classes=classes, layers=(0,), width=32, **settings)
    return DenseResult(chosen, size_hw, logits_of(*masks), np.full((*size_hw, 3), 120, np.uint8))


@pytest.fixture
def multiclass() -> DenseResult:
    """Left half a gear, lower right quarter dirt, the rest background."""
    dirt = ~LEFT
    dirt[:2] = False
    return result_of("multiclass", ("background", "gear", "dirt"), ~(LEFT | dirt), LEFT, dirt)


def test_nothing_found():
    nothing = np.zeros(SIZE_HW, bool)
    result = result_of("binary", ("crack",), nothing)
    assert result.label_HW.tolist() == np.zeros(SIZE_HW).tolist()
    assert (result.area_px, result.area_share) == ({"crack": 0}, {"crack": 0.0})
    assert not result.mask("crack").any()
    assert result.mean_probability("crack") == pytest.approx(1 / (1 + np.exp(SURE)))
    picture = result.draw()
    enlarged = picture[: 4 * SIZE_HW[0]]
    assert (enlarged == 120).all()
    assert picture.shape[0] > enlarged.shape[0]  # the legend says so


def test_each_pixel_has_one_class(multiclass):
    expected = [[1, 1, 1, 1, 0, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 2, 2, 2, 2]] * 2
    assert (multiclass.label_HW.tolist(), multiclass.label_HW.dtype) == (expected, np.uint8)
    assert multiclass.area_px == {"background": 8, "gear": 16, "dirt": 8}
    assert multiclass.area_share == {"background": 0.25, "gear": 0.5, "dirt": 0.25}
    assert np.array_equal(multiclass.mask("gear"), LEFT)
    assert multiclass.mask("background").sum() == 8
    total = sum(multiclass.probability(name) for name in multiclass.classes)
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)
    sure = np.exp(SURE) / (np.exp(SURE) + 2 * np.exp(-SURE))
    assert multiclass.probability("gear")[0, 0] == pytest.approx(sure)
    assert multiclass.mean_probability("dirt") == pytest.approx(sure)
    assert np.array_equal(decode_mask(multiclass.rle("dirt"), SIZE_HW), multiclass.mask("dirt"))
    read = json.loads(json.dumps(multiclass.to_dict()))
    assert read["classes"][1] == {"name": "gear", "area_px": 16, "share": 0.5}
    with pytest.raises(UserError, match="background, gear, dirt"):
        multiclass.mask("bolt")


@pytest.mark.parametrize(("threshold", "area"), [(0.5, 16), (0.99, 0), (0.01, 32)])
def test_the_threshold_decides_where_classes_are_found_by_themselves(threshold, area):
    # 4.0 is a probability of 0.982, -4.0 one of 0.018
    binary = result_of("binary", ("crack",), LEFT, threshold=threshold)
    assert binary.area_px == {"crack": area}
    assert np.count_nonzero(binary.label_HW == 1) == area
    overlapping = result_of("multilabel", ("gear", "dirt"), LEFT, LEFT, threshold=threshold)
    assert overlapping.label_HW is None
    assert overlapping.area_px == {"gear": area, "dirt": area}


def test_maps_have_the_size_of_the_image():
    small = np.array([[True, False]])
    result = result_of("binary", ("crack",), small, size_hw=(30, 50))
    assert result.label_HW.shape == result.probability("crack").shape == (30, 50)
    assert result.area_px == {"crack": 30 * 25}
    assert result.rle("crack")["size"] == [30, 50]


def test_pictures_have_the_colours_of_the_label_map(multiclass, tmp_path):
    files = DenseFiles(tmp_path, multiclass.settings, probabilities=True)
    written = files.write("sub/photo", multiclass)
    paths = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert paths == [
        "labels/classes.txt",
        "labels/sub/photo.png",
        "overlays/sub/photo.jpg",
        "probabilities/background/sub/photo.png",
        "probabilities/dirt/sub/photo.png",
        "probabilities/gear/sub/photo.png",
    ]
    assert (written["label_png"], written["overlay"]) == ("labels/sub/photo.png", "overlays/sub/photo.jpg")
    assert (tmp_path / "labels/classes.txt").read_text() == "gear\ndirt\n"
    with Image.open(tmp_path / written["label_png"]) as labels:
        assert labels.mode == "P"
        assert np.array_equal(np.array(labels), multiclass.label_HW)
        colour = np.array(labels.convert("RGB"))[0, 0].astype(float)
    probability = read_image(tmp_path / written["classes"][1]["probability_png"])[..., 0]
    assert np.array_equal(probability, np.rint(multiclass.probability("gear") * 255))
    picture = multiclass.draw(tmp_path / "p.png")
    assert np.array_equal(read_image(tmp_path / "p.png"), picture)
    tinted, plain = picture[2, 2].astype(float), picture[2, -3]
    assert np.array_equal(plain, [120] * 3)
    share = (120 - tinted[2]) / (120 - colour[2])
    assert share > 0.3
    np.testing.assert_allclose(tinted, (1 - share) * 120 + share * colour, atol=1)


def test_classes_that_overlap_have_a_file_each(tmp_path):
    both = result_of("multilabel", ("a/b", "a:b"), LEFT, ~LEFT)
    written = DenseFiles(tmp_path, both.settings, overlays=False).write("photo", both)
    paths = [entry["mask_png"] for entry in written["classes"]]
    assert paths == ["labels/a_b/photo.png", "labels/a_b_1/photo.png"]
    assert np.array_equal(read_image(tmp_path / paths[1])[..., 0], np.where(LEFT, 0, 255))
    assert not (tmp_path / "overlays").exists()
