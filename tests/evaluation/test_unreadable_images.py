"""An image that cannot be read stops an evaluation before it begins, or has no part in it and is named."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest

from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.images import ImageError
from sam3lora.errors import UserError
from sam3lora.evaluation.ask import click_run, dense_run, reading
from sam3lora.evaluation.ask.click_run import evaluate_clicks
from sam3lora.evaluation.ask.dense_run import evaluate_dense
from sam3lora.evaluation.ask.predictions_file import evaluate_predictions
from sam3lora.evaluation.ask.run import evaluate_models
from sam3lora.evaluation.ask.worker import EvaluationWorker, Models
from sam3lora.evaluation.clicks.settings import ClickEvaluation
from sam3lora.evaluation.dense.settings import DenseEvaluation
from sam3lora.evaluation.metrics.comparison import differences_to_base
from sam3lora.evaluation.report.click_saving import save_click_validation
from sam3lora.evaluation.report.dense_saving import save_dense_validation
from sam3lora.evaluation.report.saving import compare_and_save, save_validation
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.evaluation.skipped_images import SkippedImages, check_same_images, skipped_note

from ..model.dense.dense_cases import write_dense
from .adapters import write_adapter
from .report_cases import check_page
from .splits import result
from .unreadable_cases import DAMAGED, corrupt, cut, damaged_and_fewer, numbers, write_noisy

SETTINGS = EvaluationSettings({"threshold": 0.2, "nms": "none"}, batch_size=1)
SKIP = SETTINGS.changed(on_bad_image="skip")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The intervals have tests of their own."""
    for module, name in ((dense_run, "measure_dense"), (click_run, "measure_clicks")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), num_resamples=5))


@pytest.fixture(scope="module", params=[cut, corrupt])
def splits(request, tmp_path_factory) -> tuple[Path, Path]:
    """A split with an image that is known to be damaged ahead, or found to be by a worker; and one without it."""
    return damaged_and_fewer(tmp_path_factory.mktemp("splits"), request.param)


@pytest.fixture(scope="module")
def cut_splits(tmp_path_factory) -> tuple[Path, Path]:
    return damaged_and_fewer(tmp_path_factory.mktemp("cut"), cut)


@pytest.fixture(scope="module")
def dense_folder(spread_base, tmp_path_factory) -> Path:
    return write_dense(spread_base, tmp_path_factory.mktemp("dense") / "run", "binary")


@pytest.fixture(scope="module")
def models(small_base, tmp_path_factory) -> Models:
    adapter = write_adapter(tmp_path_factory.mktemp("run") / "best", small_base, components=("vision_encoder",))
    return Models({"mine": str(adapter)}, options={"model": str(small_base), "device": "cpu"})


def check_named(split: Path, metrics, printed: str, page: str) -> None:
    """The skipped image is in the values, on the terminal and on the page."""
    path = str(split / f"{DAMAGED}.png")
    (listed,) = metrics.to_dict()["skipped_images"]
    assert (listed["image_id"], listed["path"]) == (DAMAGED, path)
    assert listed["reason"]
    assert "2 labels and 1 image are left out" in printed
    assert f"1 of 5 images could not be read and are not measured: image {DAMAGED} {path}: " in printed
    text = check_page(page)
    assert "2 labels and 1 image are left out" in text
    assert f"{path}: {listed['reason']}" in text


def test_detections_are_measured_without_it(splits, models, tmp_path, capsys):
    damaged, fewer = splits
    base, mine = evaluate_models(damaged, models, SKIP.changed(semantic=True))
    expected = evaluate_models(fewer, models, SETTINGS.changed(semantic=True))
    assert [numbers(one) for one in (base, mine)] == [numbers(one) for one in expected]
    assert (base.num_images, base.num_ground_truth) == (4, 5)
    assert base.num_detections > 0
    assert base.matches.image_ids.tolist() == mine.matches.image_ids.tolist() == [0, 2, 3, 4]
    pairs = ((base, [mine]), (expected[0], expected[1:]))
    differences = [differences_to_base(*pair, num_resamples=5) for pair in pairs]
    assert differences[0] == differences[1]
    page = compare_and_save(base, [mine], tmp_path).read_text()
    check_named(damaged, mine, capsys.readouterr().out, page)
    assert f"<figcaption>{DAMAGED}.png" not in page
    for metrics in (base, mine):
        written = json.loads((tmp_path / metrics.label / "predictions.json").read_text())
        assert {one["image_id"] for one in written} == {0, 2, 3, 4}


def test_a_dense_model_is_measured_without_it(splits, dense_folder, tmp_path, capsys):
    damaged, fewer = splits
    metrics = evaluate_dense(
        damaged, dense_folder, DenseEvaluation(batch_size=1, on_bad_image="skip"), keep_in=tmp_path, device="cpu"
    )
    expected = evaluate_dense(fewer, dense_folder, DenseEvaluation(batch_size=1), device="cpu")
    assert numbers(metrics) == numbers(expected)
    assert metrics.num_images == 4
    assert sorted(path.stem for path in (tmp_path / "predictions").iterdir()) == ["0", "2", "3", "4"]
    page = save_dense_validation(metrics, tmp_path).read_text()
    check_named(damaged, metrics, capsys.readouterr().out, page)


def test_clicks_are_measured_without_it(splits, clickable_base, tmp_path, capsys):
    damaged, fewer = splits
    options = {"model": str(clickable_base), "device": "cpu"}
    settings = [ClickEvaluation(max_clicks=2, prompting=one) for one in (SKIP, SETTINGS)]
    metrics, expected = (
        evaluate_clicks(split, None, how, **options) for split, how in zip(splits, settings, strict=True)
    )
    assert numbers(metrics) == numbers(expected)
    assert (metrics.num_images, metrics.num_images_with_objects, metrics.num_objects) == (4, 3, 5)
    page = save_click_validation(metrics, tmp_path).read_text()
    check_named(damaged, metrics, capsys.readouterr().out, page)
    # nobody looks at an image without an object
    bare = shutil.copytree(fewer, tmp_path / "valid")
    cut(bare / "4.png")
    assert numbers(evaluate_clicks(bare, None, settings[1], **options)) == numbers(expected)


def test_a_category_that_only_damaged_images_show_is_not_asked_for(cut_splits):
    damaged = shutil.copytree(cut_splits[0], cut_splits[0].parent / "more")
    content = json.loads((damaged / ANNOTATION_FILE).read_text())
    content["categories"].append({"id": 4, "name": "dirt"})
    content["annotations"].append(content["annotations"][0] | {"id": 50, "image_id": DAMAGED, "category_id": 4})
    (damaged / ANNOTATION_FILE).write_text(json.dumps(content))
    index = CocoIndex.from_folder(damaged)
    assert index.names == ("crack", "gear", "red bolt", "dirt")
    assert SkippedImages(index).look_ahead("skip").names == ("crack", "gear", "red bolt")
    # one that images beyond the chosen ones show, is
    few = SkippedImages(index, 2).look_ahead("skip")
    assert (few.table.column("image_id").to_pylist(), few.names) == ([0], ("crack", "gear", "red bolt"))
    assert SkippedImages(index, 1).look_ahead("skip").names == index.names  # nothing is skipped


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_no_readable_image_is_one_mistake_of_the_user(on_bad_image, models, dense_folder, clickable_base, tmp_path):
    split = write_noisy(tmp_path / "valid")
    for path in split.glob("*.png"):
        path.write_bytes(b"I am a text")
    message = {
        "stop": r"5 of 5 images cannot be read, e\.g\. .*0\.png: no known image format.*--on-bad-image skip",
        "skip": r"none of the 5 images to measure could be read, the first is .*0\.png: no known image format",
    }[on_bad_image]
    settings = SETTINGS.changed(on_bad_image=on_bad_image)
    with pytest.raises(ImageError, match=message):
        evaluate_models(split, models, settings)
    with pytest.raises(ImageError, match=message):
        evaluate_dense(split, dense_folder, DenseEvaluation(on_bad_image=on_bad_image), device="cpu")
    # of clicks, none of the images with an object
    with pytest.raises(ImageError, match=message.replace("5", "4")):
        evaluate_clicks(split, None, ClickEvaluation(prompting=settings), model=str(clickable_base), device="cpu")


def test_that_nothing_is_left_to_ask_for_is_told_with_its_cause(models, tmp_path):
    split = write_noisy(tmp_path / "valid")
    for number in range(4):  # the last image has no object
        cut(split / f"{number}.png")
    with pytest.raises(UserError, match=r"no category has an object.*4 x image that was to be measured.*0\.png"):
        evaluate_models(split, models, SKIP)


def test_it_stops_before_a_model_is_asked(cut_splits, models, monkeypatch):
    monkeypatch.setattr(EvaluationWorker, "ask", lambda *_: pytest.fail("the model was asked"))
    message = rf"1 of 5 images cannot be read, e\.g\. .*{DAMAGED}\.png: .*--on-bad-image skip"
    with pytest.raises(ImageError, match=message):
        evaluate_models(cut_splits[0], models, SETTINGS)
    # unless it is none of the images to measure
    with pytest.raises(pytest.fail.Exception):
        evaluate_models(cut_splits[0], models, SETTINGS.changed(num_samples=1))


def test_an_image_that_vanishes_meanwhile_is_skipped_and_its_folder_ends_the_run(models, tmp_path, monkeypatch):
    split = write_noisy(tmp_path / "valid")
    real = reading.read_annotated_image

    def vanishing(record):
        (split / "3.png").unlink(missing_ok=True)
        return real(record)

    monkeypatch.setattr(reading, "read_annotated_image", vanishing)
    base, _ = evaluate_models(split, models, SKIP.changed(batch_size=2))
    assert (base.num_images, [one["image_id"] for one in base.skipped_images]) == (4, [3])

    def unmounted(record):
        if record["image_id"] == 2:
            for path in split.iterdir():
                path.unlink()
        return real(record)

    monkeypatch.setattr(reading, "read_annotated_image", unmounted)
    with pytest.raises(ImageError, match=r"2\.png.*The folder .*valid is gone or empty: bring it back"):
        evaluate_models(split, models, SKIP)


def test_a_failure_that_is_not_the_images_is_not_skipped(models, tmp_path, monkeypatch):
    def fails(record):
        raise MemoryError("no memory for the pixels")

    monkeypatch.setattr(reading, "read_annotated_image", fails)
    with pytest.raises(MemoryError):
        evaluate_models(write_noisy(tmp_path / "valid"), models, SKIP)


def test_models_measured_one_after_the_other_must_have_read_the_same_images(cut_splits, dense_folder):
    settings = DenseEvaluation(on_bad_image="skip")
    first, second = (
        evaluate_dense(split, dense_folder, settings, device="cpu", label=split.parent.name) for split in cut_splits
    )
    check_same_images([first, first])
    with pytest.raises(UserError, match=f"image {DAMAGED} could be read for one of the models damaged and fewer"):
        check_same_images([first, second])


def test_a_report_is_written_though_an_image_can_no_longer_be_shown(cut_splits, tmp_path):
    """Results of another program need no pixels."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([result(DAMAGED, 1, 20, 0.9), result(0, 1, 10, 0.8)]))
    metrics = evaluate_predictions(file, cut_splits[0], EvaluationSettings())
    assert (metrics.num_images, metrics.skipped_images) == (5, [])
    page = save_validation([metrics], tmp_path / "out").read_text()
    assert f"Not shown: cannot read image {cut_splits[0]}/{DAMAGED}.png: " in check_page(page)


def test_its_predictions_are_measured_again_by_the_same_choice(cut_splits, models, tmp_path):
    base, _ = evaluate_models(cut_splits[0], models, SKIP)
    save_validation([base], tmp_path)
    again = evaluate_predictions(tmp_path / "predictions.json", cut_splits[0], SKIP)
    names = ("num_images", "num_ground_truth", "num_absent_prompts", "map", "cgf1", "off_prompt_fpr", "skipped_images")
    assert [getattr(again, name) for name in names] == [getattr(base, name) for name in names]
    assert [fault for fault in again.faults if fault["split"] == "valid"] == base.faults


def test_names_of_files_do_not_command_the_terminal():
    listed = [{"image_id": 7, "path": "a\x1b[2J\nb.png", "reason": "the file is empty"}]
    assert skipped_note(listed, 4) == (
        "1 of 5 images could not be read and are not measured: image 7 a\\x1b[2J\\nb.png: the file is empty"
    )


def test_the_choice_is_one_of_two():
    for settings in (EvaluationSettings, DenseEvaluation):
        assert "on_bad_image" not in settings().to_dict()
        assert settings(on_bad_image="skip").to_dict()["on_bad_image"] == "skip"
        with pytest.raises(UserError, match="on_bad_image must be stop or skip, got 'ignore'"):
            settings(on_bad_image="ignore")
