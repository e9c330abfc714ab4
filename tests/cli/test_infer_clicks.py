"""`sam3lora infer` with clicks: what Python gives, in a picture and JSON, and mistakes by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from sam3lora import Predictor
from sam3lora.cli import main
from sam3lora.cli.infer_clicks import meant_by
from sam3lora.data.rle import encode_rle
from sam3lora.engine.clicks.click import Click

from ..model.dense.dense_cases import write_dense


@pytest.fixture
def photo(tmp_path, monkeypatch) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), pixels)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photo.png"


@pytest.fixture(scope="module")
def predictor(clickable_base) -> Predictor:
    return Predictor(str(clickable_base), device="cpu", threshold=0.0, nms="none")


@pytest.fixture
def run(clickable_base, photo, capsys):
    def call(*words: object, image: Path = photo) -> tuple[int, str, str]:
        given = ["infer", "--model", clickable_base, "--image", image, *words]
        return main([str(word) for word in given]), *capsys.readouterr()

    return call


def written(tmp_path: Path) -> dict:
    (image,) = json.loads((tmp_path / "d.json").read_text())["images"]
    return image


def test_clicks_correct_the_detection_that_they_lie_on():
    upper, lower = np.zeros((2, 4, 4), dtype=bool)
    upper[:2], lower[1:] = True, True
    best, other = (SimpleNamespace(mask=mask) for mask in (upper, lower))
    for clicks, meant in (
        ([Click(0, 0)], best),
        ([Click(3, 3)], other),
        ([Click(3, 3, 0)], other),  # of a part that does not belong to it
        ([Click(0, 0), Click(1, 3), Click(2, 3, 0)], other),
        ([Click(0, 1)], best),  # in both
        ([], best),  # a box alone
    ):
        assert meant_by([best, other], clicks) is meant


def test_clicks_correct_a_detection(run, predictor, photo, tmp_path):
    words = ("--prompt", "crack", "--threshold", 0, "--nms", "none", "--json", "d.json")
    status, out, _ = run(*words, "--click", "30,20,1", "--click", "80,50,0", "--click-box", "5,6,60,50")
    assert status == 0
    assert "clicked" in out
    session = predictor.interact(photo)
    found = session.detect("crack")
    clicked = meant_by(found, [Click(30, 20), Click(80, 50, 0)])
    session.refine(clicked, [(30, 20, 1), (80, 50, 0)], (5, 6, 60, 50))
    image = written(tmp_path)
    assert image["clicked"]["mask"] == clicked.rle
    assert image["clicked"]["score"] == pytest.approx(clicked.score, abs=1e-5)
    assert image["clicked"]["clicks"] == [{"x": 30, "y": 20, "label": 1}, {"x": 80, "y": 50, "label": 0}]
    assert image["clicked"]["click_box_xyxy"] == [5, 6, 60, 50]
    (result,) = image["results"]
    assert result["num_detections"] == len(found) > 1
    assert sorted(one["mask"]["counts"] for one in result["detections"]) == sorted(one.rle["counts"] for one in found)
    corrected = cv2.imread(str(tmp_path / "output.png"))
    # several clicks after one option are the same
    assert run(*words, "--click", "30,20", "80,50,0", "--click-box=5,6,60,50", "--output", "again.png")[0] == 0
    assert np.array_equal(cv2.imread(str(tmp_path / "again.png")), corrected)
    assert run(*words)[0] == 0
    assert not np.array_equal(cv2.imread(str(tmp_path / "output.png")), corrected)


def test_clicks_alone_show_a_new_object(run, predictor, photo, tmp_path):
    assert run("--click", "30,20", "--json", "d.json")[0] == 0
    image = written(tmp_path)
    expected = predictor.interact(photo).click([(30, 20)])
    assert image["clicked"]["mask"] == expected.rle
    assert [one["mask"] for one in image["clicked"]["alternatives"]] == [one.rle for one in expected.alternatives]
    assert [one["mask"] for one in image["results"][0]["detections"]] == [expected.rle]
    assert cv2.imread(str(tmp_path / "output.png")) is not None


def test_the_file_has_all_that_makes_the_result_again(run, predictor, photo, tmp_path):
    assert run("--click", "30,20", "--max-hole-area", 9, "--max-sprinkle-area", 500, "--json", "d.json")[0] == 0
    recorded, found = json.loads((tmp_path / "d.json").read_text())["settings"], written(tmp_path)["clicked"]
    options = {name: recorded[name] for name in ("clicks_vision", "max_hole_area", "max_sprinkle_area")}
    clicks = [(one["x"], one["y"], one["label"]) for one in found["clicks"]]
    again = predictor.interact(photo, **options).click(clicks, box_xyxy=found["click_box_xyxy"])
    assert again.rle == found["mask"]
    assert options == {"clicks_vision": "adapter", "max_hole_area": 9, "max_sprinkle_area": 500}


def test_a_prompt_that_finds_nothing_names_the_new_object(run, tmp_path):
    status, out, _ = run("--prompt", "crack", "--threshold", 1, "--click", "30,20", "--json", "d.json")
    assert status == 0
    assert "the clicks show a new object" in out
    (result,) = written(tmp_path)["results"]
    assert (result["prompt"], result["num_detections"]) == ("crack", 1)


def test_clicks_that_show_nothing_are_no_new_object(run, tmp_path):
    status, _, error = run("--prompt", "crack", "--threshold", 1, "--click", "30,20,0")
    assert (status, "label 1" in error, error.count("error: ")) == (2, True, 1)
    assert not (tmp_path / "output.png").exists()


def test_an_object_without_a_pixel(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sam3lora.inference.clicks.result.encode_logits", lambda logits, size_hw: encode_rle(np.zeros(size_hw))
    )
    status, out, _ = run("--click", "30,20", "--json", "d.json")
    assert status == 0
    assert "no pixel" in out
    assert written(tmp_path)["clicked"]["area_px"] == 0
    assert [one["num_detections"] for one in written(tmp_path)["results"]] == [0]
    assert cv2.imread(str(tmp_path / "output.png")) is not None


def test_an_adapter_of_the_click_head_is_found_among_the_weights(run, clickable_root, clickable_base, photo, tmp_path):
    folders = {"adapter": clickable_root / "towers", "click_adapter": clickable_root / "over-towers"}
    expected = Predictor(str(clickable_base), **folders, device="cpu").interact(photo).click([(30, 20)])
    weights = folders["click_adapter"], folders["adapter"]
    status, out, _ = run("--click", "30,20", "--json", "d.json", "--weights", *weights)
    assert status == 0
    assert "no adapter" not in out
    assert all(folder.name in "".join(out.split()) for folder in weights)
    assert written(tmp_path)["clicked"]["mask"] == expected.rle
    recorded = json.loads((tmp_path / "d.json").read_text())["settings"]
    assert {role: recorded[role] for role in folders} == {role: str(folder) for role, folder in folders.items()}


def test_clicks_see_the_trunk_of_the_base_where_that_is_chosen(run, clickable_root, photo):
    seen = "--clicks-vision", "base", "--weights", clickable_root / "edges", clickable_root / "towers"
    assert run("--click", "30,20", "--json", "beside.json", *seen)[0] == 0
    assert run("--click", "30,20", "--json", "alone.json", "--weights", clickable_root / "edges")[0] == 0
    beside, alone = (
        json.loads(photo.with_name(f"{name}.json").read_text())["images"][0]["clicked"] for name in ("beside", "alone")
    )
    assert beside == alone


def test_weights_that_do_not_go_together(run, clickable_root, clickable_base, spread_base, tmp_path):
    dense, clicks = write_dense(clickable_base, tmp_path / "dense"), clickable_root / "edges"
    for words, said in (
        (("--prompt", "crack", "--weights", clicks), "answers clicks: add --click"),
        (("--click", "30,20", "--weights", clicks, clicks), "one value here"),
        (
            ("--click", "30,20", "--weights", clicks, clickable_root / "towers"),
            "trained on the vision trunk of the base",
        ),
        (("--weights", clicks, dense), "has no effect with"),
        (("--click", "30,20", "--weights", clicks, "--model", spread_base), "has no tracker"),
    ):
        status, _, error = run(*words)
        assert status == 2, words
        assert said in " ".join(error.split())
        assert error.count("error: ") == 1


MISTAKES = {
    "--click 90,20": "x=90",
    "--click 30,-1,1": "y=-1",
    "--click 30,20,2": "label=2",
    "--click 30": "x,y,label",
    "--click 30,x": "got '30,x'",
    "--click nan,20": "finite",
    "--click-box 5,6,60": "x0,y0,x1,y1",
    "--click-box 5,6,5,50": "x0 < x1",
    "--click-box 5,6,60,50 --click-box 1,2,3,4": "one box",
    "--click 30,20,0": "label 1",
    "--click 30,20 --prompt crack hole": "one prompt, got 2",
    "--click 30,20 --box 1 2 30 40": "--box has no effect",
    "--click 30,20 --no-masks": "--no-masks has no effect",
    "--click 30,20 --threshold 0.3": "--threshold has no effect without --prompt",
    "--click 30,20 --output photo.txt": "must end in",
    "--click 30,20 --json .": "it is a folder",
    "--click 30,20 --probabilities": "--probabilities",
    "--click 30,20 --clicks-vision base": "--clicks-vision has no effect",
    "--click 30,20 --max-hole-area=-1": "max_hole_area must be a whole number",
    "--click 30,20 --max-sprinkle-area 10001": "from 0 (off) to 10000, got 10001",
    "--prompt crack --max-hole-area 8 --max-sprinkle-area 0": "--max-hole-area, --max-sprinkle-area would have no",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_message_before_the_model_is_loaded(run, words, monkeypatch):
    monkeypatch.setattr(
        "sam3lora.inference.predictor.Predictor.__init__", lambda *args, **options: pytest.fail("loads")
    )
    status, _, error = run(*words.split())
    assert status == 2
    assert MISTAKES[words] in " ".join(error.split())
    assert error.count("error: ") == 1


def test_models_and_images_that_do_not_go_with_clicks(run, spread_base, photo, tmp_path):
    status, _, error = run("--click", "30,20", image=photo.parent)
    assert (status, "one image" in error) == (2, True)
    status, _, error = run("--click", "30,20", image=photo.with_name("missing.png"))
    assert (status, "missing.png" in error) == (2, True)
    status, _, error = run("--click", "30,20", "--model", spread_base)
    assert (status, "has no tracker" in error) == (2, True)
    dense = write_dense(spread_base, tmp_path / "dense")
    status, _, error = run("--click", "30,20", "--weights", dense)
    assert (status, "--click has no effect" in error) == (2, True)
