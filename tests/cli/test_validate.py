"""`sam3lora validate` as people type it, on a split of which a small random model finds a part."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from sam3lora.cli import main
from sam3lora.config.post_processing import PostProcessing

from ..evaluation.adapters import write_adapter
from ..evaluation.splits import HEIGHT, WIDTH, result, write_split

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "reference"
SACO_CASES = sorted(REFERENCE.glob("cgf1_*_expected.json"))
METRICS = {
    *("num_images", "num_ground_truth", "num_predictions", "num_predictions_before_nms", "map", "map_50", "map_75"),
    *("map_small", "map_medium", "map_large", "mar_100", "bbox_map", "bbox_map_50", "per_category", "cgf1", "cgf1_50"),
    *("cgf1_75", "positive_micro_f1", "il_mcc", "off_prompt_fpr", "presence_accuracy", "settings", "seconds", "notes"),
}
FILES = ["metrics.json", "predictions.json", "report.html"]


@pytest.fixture(scope="module")
def run_folder(small_base, tmp_path_factory) -> Path:
    """A run with its adapter in best/."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    write_adapter(folder / "best", small_base, post_processing=PostProcessing(threshold=0.24, nms_iou=0.9))
    return folder


@pytest.fixture(scope="module")
def data(run_folder, tmp_path_factory) -> Path:
    """Three images; what the adapter finds first in the first two is declared to be a crack and a hole."""
    folder = tmp_path_factory.mktemp("data")
    split = write_split(folder / "valid", [(0, 1, 10), (1, 2, 10)], {1: "crack", 2: "hole"}, num_images=3)
    words = ["validate", "--weights", run_folder / "best", "--val-data-dir", folder, "--output", folder / "asked"]
    assert main([str(word) for word in words]) == 0
    declare_found(split, read(folder / "asked" / "predictions.json"))
    return folder


def declare_found(split: Path, predictions: list[dict]) -> None:
    """What was found first of each annotation's image and category becomes the annotation."""
    truth = read(split / "_annotations.coco.json")
    for annotation in truth["annotations"]:
        pair = (annotation["image_id"], annotation["category_id"])
        found = next(p for p in predictions if (p["image_id"], p["category_id"]) == pair)
        annotation |= {"segmentation": found["segmentation"], "bbox": found["bbox"]}
    (split / "_annotations.coco.json").write_text(json.dumps(truth))


def runner(verb: str, data: Path, output: Path, capsys):
    """`run(*words)` -> the folder of the results and what was printed."""

    def run(*words: object, given=("--val-data-dir", data)) -> tuple[Path, str]:
        status = main([verb, *map(str, (*given, "--output", output, *words))])
        out, error = capsys.readouterr()
        assert (status, error) == (0, "")
        return output, out

    return run


@pytest.fixture
def validate(data, tmp_path, capsys):
    return runner("validate", data, tmp_path / "out", capsys)


def external_references(page: Path) -> list[str]:
    targets = re.findall(r"""(?:\b(?:src|href)\s*=|url\(|@import)\s*["']?([^"')\s>]*)""", page.read_text())
    assert targets  # pictures and charts at least
    return [target for target in targets if not target.startswith(("data:", "#"))]


def read(file: Path):
    return json.loads(file.read_text())


def test_what_is_written(validate, run_folder, data):
    output, printed = validate("--weights", run_folder / "best")
    assert sorted(path.name for path in output.iterdir()) == FILES
    metrics = read(output / "metrics.json")
    assert metrics.keys() >= METRICS
    assert (metrics["num_images"], metrics["num_ground_truth"]) == (3, 2)
    assert metrics["map"] > 0.2
    assert metrics["settings"]["adapter"] == str(run_folder / "best")
    # what is null has its reason in the notes
    nulls = {name for name in METRICS if metrics[name] is None}
    assert all(any(name in note for note in metrics["notes"]) for name in nulls)
    predictions = read(output / "predictions.json")
    assert len(predictions) == metrics["num_predictions"] > 0
    for prediction in predictions:
        assert prediction.keys() == {"image_id", "category_id", "segmentation", "bbox", "score"}
        assert prediction["segmentation"]["size"] == [HEIGHT, WIDTH]
    assert f"Report: {output / 'report.html'}" in printed
    # a report can be mailed: all it shows is in it
    assert external_references(output / "report.html") == []


def test_predictions_measured_again_give_the_same_numbers(validate, run_folder, tmp_path):
    output, _ = validate("--weights", run_folder / "best")
    first = read(output / "metrics.json")
    (output / "predictions.json").rename(tmp_path / "mine.json")
    validate("--predictions", tmp_path / "mine.json", "--prob-threshold", first["settings"]["threshold"])
    second = read(output / "metrics.json")
    assert second["label"] == "mine"
    same = METRICS - {"num_predictions_before_nms", "presence_accuracy", "settings", "seconds", "notes"}
    assert {name: second[name] for name in same} == {name: first[name] for name in same}


def test_base_model(validate, small_base, data):
    given = ("--val-data-dir", data / "valid")  # the split itself will do as well
    metrics = read(validate("--use-base-model", "--model", small_base, given=given)[0] / "metrics.json")
    assert metrics["label"] == "base"
    assert metrics["settings"]["adapter"] is None
    assert metrics["settings"]["base_model"] == str(small_base)


def test_several_models(validate, run_folder, small_base, tmp_path):
    other = write_adapter(tmp_path / "runs" / "mine" / "best", small_base, seed=1)
    output, printed = validate("--weights", run_folder / "best", other, "--use-base-model", "--nms-iou", "0.9")
    of_each = read(output / "metrics.json")["models"]
    # both runs are called alike, and nothing of either is lost
    assert list(of_each) == ["base", "mine", "mine (2)"]
    assert all(label in printed for label in of_each)
    folders = sorted(path for path in output.iterdir() if path.is_dir())
    assert len(folders) == 3
    assert {read(path / "metrics.json")["label"] for path in folders} == set(of_each)
    assert all((path / "predictions.json").is_file() for path in folders)
    maps = [metrics["map"] for metrics in of_each.values()]
    assert len(set(maps)) == 3
    # the same as each alone
    for folder, label in ((run_folder / "best", "mine"), (other, "mine (2)")):
        alone = read(validate("--weights", folder, "--nms-iou", "0.9")[0] / "metrics.json")
        assert alone["map"] == pytest.approx(of_each[label]["map"])


def test_an_adapter_says_its_thresholds_and_options_win(validate, run_folder):
    weights, names = ("--weights", run_folder / "best"), ("threshold", "nms_iou", "merge", "merge_iou")
    for words, expected in (
        ((), (0.24, 0.9, False, 0.15)),
        (("--nms-iou", "0.6", "--merge", "--merge-iou", "0.4"), (0.24, 0.6, True, 0.4)),
    ):
        settings = read(validate(*weights, *words)[0] / "metrics.json")["settings"]
        assert tuple(settings[name] for name in names) == expected


@pytest.fixture
def config(data, run_folder, tmp_path):
    """Write the YAML of the run, with these sections beside the usual ones."""

    def write(sections: str = "") -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(
            f"training: {{data_dir: {data}}}\nlora: {{apply_to_detr_decoder: true}}\n"
            f"output: {{output_dir: {run_folder}}}\n{sections}\n"
        )
        return file

    return write


def test_configuration_of_a_run(validate, config, run_folder):
    # it names data, adapter and thresholds; options win
    sections = "evaluation: {prob_threshold: 0.2, nms_iou: 0.8, max_detections: 3, num_samples: 2}"
    output, _ = validate("--config", config(sections), "--nms-iou", "0.85", given=())
    metrics = read(output / "metrics.json")
    settings = metrics["settings"]
    assert settings["adapter"] == str(run_folder / "best")
    assert (settings["threshold"], settings["nms_iou"], settings["max_detections"]) == (0.2, 0.85, 3)
    assert (metrics["label"], metrics["num_images"]) == ("mine", 2)


def test_categories_and_prompts_of_a_configuration(validate, config):
    def metrics(sections: str) -> dict:
        return read(validate("--config", config(sections), given=())[0] / "metrics.json")

    plain = metrics("")
    assert list(plain["per_category"]) == ["crack", "hole"]
    chosen = metrics("data: {categories: [crack], negative_prompts: [tree]}")
    assert list(chosen["per_category"]) == ["crack", "tree"]
    assert chosen["per_category"]["tree"]["num_ground_truth"] == 0
    # the other prompt gets other answers, under the category's name
    prompted = metrics("data: {prompts: {crack: a long and winding crack}}")
    assert list(prompted["per_category"]) == ["crack", "hole"]
    assert prompted["per_category"]["crack"]["map"] != plain["per_category"]["crack"]["map"]
    assert prompted["per_category"]["hole"]["map"] == pytest.approx(plain["per_category"]["hole"]["map"])


def test_a_split_without_objects(validate, run_folder, tmp_path):
    # every number that needs objects is null and says why
    empty = write_split(tmp_path / "empty" / "valid", [], {1: "crack"})
    (tmp_path / "names.yaml").write_text("data: {categories: [crack]}\nlora: {apply_to_detr_decoder: true}\n")
    words = ("--config", tmp_path / "names.yaml", "--weights", run_folder / "best")
    output, printed = validate(*words, given=("--val-data-dir", empty))
    metrics = read(output / "metrics.json")
    assert (metrics["map"], metrics["cgf1"], metrics["num_ground_truth"]) == (None, None, 0)
    assert metrics["off_prompt_fpr"] is not None
    assert all(f"Note: {note}" in printed for note in metrics["notes"])
    assert any("map is null" in note for note in metrics["notes"])


@pytest.mark.parametrize("case", SACO_CASES, ids=lambda case: case.name.removesuffix("_expected.json"))
def test_files_in_saco_layout(validate, case):
    expected = read(case)
    truth = [REFERENCE / name for name in expected["gt"]]
    output, printed = validate("--saco", *truth, "--predictions", REFERENCE / expected["pred"], given=())
    for iou_type, values in read(output / "metrics.json").items():
        assert values["cgF1"] == pytest.approx(expected["metrics"][f"cgF1_eval_{iou_type}_cgF1"], abs=1e-9)
        assert values["counts"] == expected["counts"][iou_type]
    assert f"{expected['metrics']['cgF1_eval_segm_cgF1']:.4f}" in printed


def test_a_model_is_asked_the_phrases_of_a_saco_file(validate, data, run_folder, tmp_path):
    # the split as SA-Co has it, an entry for each image and phrase: the same cgF1 as the split's
    coco = read(data / "valid" / "_annotations.coco.json")
    entries = [
        {
            "id": 10 * image["id"] + category["id"],
            "text_input": category["name"],
            "is_instance_exhaustive": 1,
            **{key: image[key] for key in ("file_name", "width", "height")},
        }
        for image in coco["images"]
        for category in coco["categories"]
    ]
    annotations = [
        a | {"image_id": 10 * a["image_id"] + a["category_id"], "category_id": 1} for a in coco["annotations"]
    ]
    truth = {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    file = tmp_path / "gold.json"
    file.write_text(json.dumps(truth))
    weights = ("--weights", run_folder / "best")
    output, _ = validate("--saco", file, "--val-data-dir", data / "valid", *weights, given=())
    asked = read(output / "metrics.json")["segm"]
    output, _ = validate(*weights)
    measured = read(output / "metrics.json")
    assert asked["cgF1"] == pytest.approx(measured["cgf1"], abs=1e-6)
    assert asked["counts"]["units_evaluated"] == 6


def test_an_image_that_cannot_be_read(data, run_folder, tmp_path, capsys):
    split = tmp_path / "valid"
    shutil.copytree(data / "valid", split)
    (split / "1.png").write_bytes(b"")
    words = ["validate", "--weights", run_folder / "best", "--val-data-dir", split, "--output", tmp_path / "out"]
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert re.search(r"error: .*1 of 3 images cannot be read, e\.g\. .*1\.png: the file is empty\. Repair", said)
    assert said.count("\n") == 1
    # the option, or a configuration
    config = tmp_path / "run.yaml"
    config.write_text(
        "training: {on_bad_image: skip}\nlora: {apply_to_vision_encoder: true}\nmodel: {resolution: 112}\n"
    )
    for more in (["--on-bad-image", "skip"], ["--config", config]):
        assert main([str(word) for word in [*words, *more]]) == 0
        assert "1 of 3 images could not be read and are not measured: image 1 " in capsys.readouterr().out
        assert read(tmp_path / "out" / "metrics.json")["skipped_images"] == [
            {"image_id": 1, "path": str(split / "1.png"), "reason": "the file is empty"}
        ]
    assert main([str(word) for word in [*words, "--config", config, "--on-bad-image", "stop"]]) == 2


def test_interrupt(data, run_folder, tmp_path, monkeypatch, capsys):
    from sam3lora.evaluation.ask.worker import EvaluationWorker

    def stop(self, records):
        raise KeyboardInterrupt

    monkeypatch.setattr(EvaluationWorker, "ask", stop)
    words = ["--weights", run_folder / "best", "--val-data-dir", data, "--output", tmp_path / "out"]
    assert main(["validate", *map(str, words)]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_as_a_job(data, tmp_path, monkeypatch, capsys):
    # the same options and messages, and no result that would vanish with the job's working directory
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([result(0, 1, 10, 0.9)]))
    words = ["jobs/validate.py", "--predictions", file, "--val-data-dir", data, "--output"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for output, status in (("relative", 2), (tmp_path / "out", 0)):
        monkeypatch.setattr(sys, "argv", [*map(str, words), str(output)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "jobs" / "validate.py"), run_name="__main__")
        assert stop.value.code == status
    assert "--output an absolute path" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out" / "metrics.json").is_file()
