"""`Predictor`: what goes in, what comes out, and that it needs no cluster."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3lora import Predictor
from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.masks import decode_mask
from sam3lora.engine.detections import Detections
from sam3lora.errors import UserError

from ..model.conftest import write_adapter

EVERYTHING = {"threshold": 0.0, "nms": "none"}


@pytest.fixture(scope="module")
def adapter(spread_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "best"
    post = PostProcessing(threshold=0.99)
    return write_adapter(spread_base, folder, targets=("q_proj", "fc1"), post_processing=post)


@pytest.fixture(scope="module")
def predictor(spread_base) -> Predictor:
    return Predictor(str(spread_base), device="cpu", **EVERYTHING)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def same(first: Detections, second: Detections, atol: float = 1e-6) -> bool:
    """Boxes move with the sixth digit of what batches are computed in."""
    return (
        first.prompt == second.prompt
        and first.scores.shape == second.scores.shape
        and np.allclose(first.scores, second.scores, atol=atol)
        and np.allclose(first.boxes_xyxy, second.boxes_xyxy, atol=100 * atol)
    )


def test_nothing_found(spread_base, pixels):
    # the empty case has the shapes and the JSON of the others
    predictor = Predictor(str(spread_base), threshold=1.0, device="cpu")
    (result,) = predictor.predict(pixels, "crack")
    assert result.num_detections == 0
    assert (result.boxes_xyxy.shape, result.scores.shape, result.masks.shape) == ((0, 4), (0,), (0, 60, 90))
    assert (result.areas_px, result.polygons(), result.to_dict()["detections"]) == ([], [], [])
    assert 0 <= result.presence <= 1
    # there is nothing to draw
    plain = predictor.draw([result], show_masks=False, show_labels=False)
    assert np.array_equal(predictor.draw([result], show_boxes=True), plain)


def test_each_prompt_has_its_answer(predictor, pixels):
    results = predictor.predict(pixels, ["crack", "hole", "crack"])
    assert [result.prompt for result in results] == ["crack", "hole", "crack"]
    assert same(results[0], results[2])
    assert not same(results[0], results[1])


def test_result_fields_agree(predictor, pixels):
    (result,) = predictor.predict(pixels, ["crack"])
    assert result.num_detections == len(result.scores) == 8  # every object query
    assert np.all(np.diff(result.scores) <= 0)
    assert (result.masks.shape, result.masks.dtype) == ((8, 60, 90), bool)
    assert result.areas_px == result.masks.sum((1, 2)).tolist()
    assert 0 < sum(result.areas_px) < result.masks.size
    for outlines, mask_HW in zip(result.polygons(), result.masks, strict=True):
        filled_HW = decode_mask(outlines, mask_HW.shape)
        assert filled_HW[mask_HW].all()
        assert filled_HW.any() == mask_HW.any()
    read = json.loads(json.dumps(result.to_dict()))
    assert read["num_detections"] == 8
    assert [detection["area_px"] for detection in read["detections"]] == result.areas_px
    assert read["detections"][0]["mask"] == result.rles[0]
    assert np.allclose([detection["box_xyxy"] for detection in read["detections"]], result.boxes_xyxy, atol=0.01)


def test_without_masks_boxes_stay_the_same(predictor, pixels):
    (with_masks,), (without,) = (predictor.predict(pixels, "crack", masks=masks) for masks in (True, False))
    assert same(with_masks, without)
    assert without.rles is None
    assert set(without.to_dict()["detections"][0]) == {"score", "box_xyxy"}
    for ask in (lambda: without.masks, lambda: without.areas_px, without.polygons):
        with pytest.raises(ValueError, match="masks=True"):
            ask()


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "pil"])
def test_every_kind_of_image_gives_the_same(kind, predictor, pixels, tmp_path):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(stream.getvalue())
    image = {"path": path, "text": str(path), "bytes": stream.getvalue(), "pil": Image.fromarray(pixels)}[kind]
    assert same(predictor.predict(image, "crack")[0], predictor.predict(pixels, "crack")[0])


def test_sixteen_bit_pil_image_keeps_its_range(predictor, pixels):
    # PIL itself would cut 16-bit values at 255
    grey = pixels[..., 0]
    (result,) = predictor.predict(Image.fromarray(grey.astype(np.uint16) * 257), "crack")
    assert np.array_equal(result.image_HW3, np.repeat(grey[..., None], 3, axis=2))


def test_photograph_is_turned_as_people_see_it(predictor, pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    turned = np.rot90(pixels, -1)
    for image in (tmp_path / "photo.png", Image.open(tmp_path / "photo.png")):
        (result,) = predictor.predict(image, "crack")
        assert result.size_hw == (90, 60)
        assert np.array_equal(result.image_HW3, turned)
        assert result.rles[0]["size"] == [90, 60]


def test_many_images_equal_one_by_one(predictor, pixels):
    images = [pixels, pixels[:, :50], pixels[::-1]]
    together = predictor.predict_many(images, ["crack", "hole"], batch_size=2)
    assert predictor.predict_many([], "crack") == []
    for image, results in zip(images, together, strict=True):
        for result, alone in zip(results, predictor.predict(image, ["crack", "hole"]), strict=True):
            assert result.image_HW3 is image
            assert same(result, alone, atol=1e-5)


def test_the_adapter_records_the_defaults_and_the_caller_overrules_them(adapter, spread_base, pixels):
    assert Predictor(adapter=adapter, device="cpu").post == PostProcessing(threshold=0.99)
    changed = Predictor(adapter=adapter, device="cpu", nms="box", detection_threshold=0.2)
    assert changed.post == PostProcessing(threshold=0.2, nms="box")
    assert Predictor(str(spread_base), device="cpu").post == PostProcessing()
    with pytest.raises(UserError, match="threshold"):
        Predictor(str(spread_base), threshold=0.1, detection_threshold=0.2)
    (everything,) = Predictor(adapter=adapter, device="cpu", **EVERYTHING).predict(pixels, "crack")
    middle = float(np.sort(everything.scores)[4])
    (upper,) = Predictor(adapter=adapter, device="cpu", threshold=middle, nms="none").predict(pixels, "crack")
    assert np.array_equal(upper.scores, everything.scores[everything.scores >= middle])
    assert 0 < upper.num_detections < 8


def test_adapter_brings_its_base_and_changes_the_answer(adapter, spread_base, predictor, pixels):
    adapted = Predictor(adapter=str(adapter), device="cpu", **EVERYTHING)
    assert adapted.settings["model"] == str(spread_base)
    assert adapted.settings["adapter"] == str(adapter)
    assert not same(adapted.predict(pixels, "crack")[0], predictor.predict(pixels, "crack")[0])


def test_boxes_go_with_every_prompt(predictor, pixels):
    box = [[10, 5, 40, 30]]
    plain = predictor.predict(pixels, ["crack", "hole"])
    shown = predictor.predict(pixels, ["crack", "hole"], boxes=np.array(box))
    assert not any(same(one, other) for one, other in zip(plain, shown, strict=True))
    # what is meant and what is not are two things; label 1 is the default
    assert same(predictor.predict(pixels, "crack", boxes=box, box_labels=[1])[0], shown[0])
    assert not same(predictor.predict(pixels, "crack", boxes=box, box_labels=[0])[0], shown[0])
    # no boxes are no boxes
    assert same(predictor.predict(pixels, "crack", boxes=[])[0], plain[0])


def test_boxes_alone_ask_for_what_they_show(predictor, pixels):
    (result,) = predictor.predict(pixels, boxes=[[10, 5, 40, 30]])
    assert result.prompt == "visual"
    assert same(result, predictor.predict(pixels, "visual", boxes=[[10, 5, 40, 30]])[0])


def test_merging_joins_masks(spread_base, pixels):
    # IoU 0 joins all masks of the image into one, whose box is drawn around it
    merging = Predictor(str(spread_base), device="cpu", threshold=0.0, merge=True, merge_iou=0.0)
    (result,) = merging.predict(pixels, "crack")
    (parts,) = Predictor(str(spread_base), device="cpu", **EVERYTHING).predict(pixels, "crack")
    assert result.num_detections == 1
    assert (result.masks[0] >= parts.masks.any(0)).all()
    # without masks in the result the same is found
    (boxes_only,) = merging.predict(pixels, "crack", masks=False)
    assert np.array_equal(boxes_only.boxes_xyxy, result.boxes_xyxy)


def test_drawing_shows_what_is_asked_for(predictor, pixels, tmp_path):
    results = predictor.predict(pixels, ["crack", "hole"])
    nothing = predictor.draw(results, show_masks=False, show_labels=False)
    masks = predictor.draw(results, tmp_path / "new" / "picture.png", show_labels=False)
    boxes = predictor.draw(results, show_masks=False, show_boxes=True, show_labels=False)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "picture.png")), masks)
    assert nothing.shape[0] % 60 == 0
    for drawn in (masks, boxes):
        assert drawn.shape == nothing.shape
        assert not np.array_equal(drawn, nothing)
    assert not np.array_equal(masks, boxes)


def test_drawing_takes_one_image(predictor, pixels):
    first, second = predictor.predict_many([pixels, pixels[::-1]], "crack")
    for results in ([], [*first, *second]):
        with pytest.raises(ValueError, match="results of one image"):
            predictor.draw(results)


@pytest.mark.parametrize("name", ["picture.xyz", "picture", "file/picture.png"])
def test_picture_that_cannot_be_written(name, predictor, pixels, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot write"):
        predictor.draw(predictor.predict(pixels, "crack"), tmp_path / name)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (None, {}, "no prompts"),
        (None, {"prompts": []}, "no prompts"),
        (None, {"prompts": ["crack", " "]}, "is empty: write what"),
        (None, {"prompts": ["a" * 40]}, "at most 32"),
        (None, {"prompts": "crack", "boxes": [[10, 5, 40]]}, r"shape \(N, 4\)"),
        (None, {"prompts": "crack", "boxes": [10, 5, 40, 30]}, r"shape \(N, 4\)"),
        (None, {"prompts": "crack", "boxes": [["a", 5, 40, 30]]}, "must be numbers"),
        (None, {"prompts": "crack", "boxes": [[10, 5, 95, 30]]}, "x0 < x1 <= 90"),
        (None, {"prompts": "crack", "boxes": [[10, 5, 40, 30]], "box_labels": [1, 0]}, "for each of 1 boxes, got 2"),
        (None, {"prompts": "crack", "box_labels": [1]}, "labels without boxes"),
        (np.zeros((4, 4), np.uint8), {"prompts": "crack"}, r"uint8 \(H, W, 3\)"),
        (np.zeros((4, 4, 3)), {"prompts": "crack"}, "got float64"),
        (np.zeros((0, 4, 3), np.uint8), {"prompts": "crack"}, r"\(0, 4, 3\)"),
        (7, {"prompts": "crack"}, "got int"),
    ],
)
def test_mistakes_are_named(image, options, message, predictor, pixels):
    with pytest.raises(UserError, match=message):
        predictor.predict(pixels if image is None else image, **options)


def test_needs_no_cluster(small_base):
    code = (
        "import sys, numpy; from sam3lora import Predictor\n"
        f"Predictor({str(small_base)!r}, device='cpu').predict(numpy.zeros((9, 9, 3), 'uint8'), 'crack')\n"
        "print(*[name for name in ('ray', 'fastapi', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
