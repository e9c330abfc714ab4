"""Mistakes of users, verb by verb: one message that says what is wrong, status 2, no traceback, and no results."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from sam3lora.cli import main

from ..evaluation.adapters import write_adapter
from ..evaluation.splits import result, write_split
from ..inference.test_bad_images import png_header

ANNOTATIONS = "_annotations.coco.json"
FAR_AWAY = 55


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.fixture(scope="module")
def place(small_base, tmp_path_factory) -> Path:
    """A working directory with one of everything, sound and damaged; read only."""
    root = tmp_path_factory.mktemp("place")
    good = write_adapter(root / "good" / "best", small_base)
    for name in ("nan", "cut_weights", "cut_config", "cut_metadata", "other_base"):
        shutil.copytree(good, root / name)
    tensors = load_file(good / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, root / "nan" / "adapter_model.safetensors", metadata={"format": "pt"})
    cut(root / "cut_weights" / "adapter_model.safetensors")
    cut(root / "cut_config" / "adapter_config.json")
    cut(root / "cut_metadata" / "sam3lora.json")
    metadata = {"base_model": str(small_base), "base_fingerprint": "0123456789abcdef"}
    (root / "other_base" / "sam3lora.json").write_text(json.dumps(metadata))
    shutil.copytree(small_base, root / "model")

    split = write_split(root / "data" / "valid", [(0, 1, 10), (1, 2, 40)], {1: "crack", 2: "hole"})
    write_split(root / "unlabelled" / "valid", [], {1: "crack"})
    for name in ("cut_data", "cut_image", "lost_image", "empty_data"):
        shutil.copytree(split, root / name / "valid")
    cut(root / "cut_data" / "valid" / ANNOTATIONS)
    cut(root / "cut_image" / "valid" / "1.png")
    (root / "lost_image" / "valid" / "1.png").unlink()
    nothing = {"images": [], "annotations": [], "categories": []}
    (root / "empty_data" / "valid" / ANNOTATIONS).write_text(json.dumps(nothing))

    (root / "right.json").write_text(json.dumps([result(0, 1, 10, 0.9)]))
    (root / "other.json").write_text(json.dumps([result(FAR_AWAY, 1, 10, 0.9)]))
    (root / "cut.json").write_text('[{"image_id": 0')
    (root / "unknown.yaml").write_text("lora: {rnak: 4}\n")
    (root / "note.txt").write_text("a file")

    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    cv2.imwrite(str(root / "photo.png"), noise)
    shutil.copy(root / "photo.png", root / "cut.png")
    cut(root / "cut.png")
    (root / "text.jpg").write_text("no image")
    (root / "empty.jpg").touch()
    (root / "huge.png").write_bytes(png_header(60_000, 60_000))
    return root


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


VALIDATE = "validate --val-data-dir data --output new"
GOOD = f"{VALIDATE} --weights good/best"
MEASURED = "validate --val-data-dir data --output new --predictions"
COMPARE = "compare --val-data-dir data --output new"
INFER = "infer --image photo.png --prompt crack --output new/a.png"
EXPORT = "export --output new --weights"

CASES = {
    # adapters
    VALIDATE: "name adapters with --weights DIR, or add --use-base-model",
    f"{VALIDATE} --weights nowhere": "nowhere does not exist: expected one written by `sam3lora train`",
    f"{VALIDATE} --weights note.txt": "note.txt is a file, not an adapter folder",
    f"{VALIDATE} --weights good": "good is the folder of a run: its adapter is",
    f"{VALIDATE} --weights data": "lacks adapter_config.json, adapter_model.safetensors",
    f"{VALIDATE} --weights model": "is a model of its own, not an adapter",
    f"{VALIDATE} --weights nan": "has NaN or infinite values",
    f"{VALIDATE} --weights cut_weights": "adapter_model.safetensors is damaged",
    f"{VALIDATE} --weights cut_config": "adapter_config.json is no valid PEFT configuration",
    f"{VALIDATE} --weights cut_metadata": "sam3lora.json is damaged",
    f"{VALIDATE} --weights other_base": "was trained on the base",
    f"{VALIDATE} --weights good/best --model tiny": "but this model is 'tiny'",
    # numbers
    f"{GOOD} --prob-threshold -0.1": "threshold must be between 0 and 1, got -0.1",
    f"{GOOD} --prob-threshold 1.5": "threshold must be between 0 and 1, got 1.5",
    f"{GOOD} --prob-threshold nan": "threshold must be between 0 and 1, got nan",
    f"{GOOD} --prob-threshold abc": "Invalid value for '--prob-threshold'",
    f"{GOOD} --nms-iou 2": "nms_iou must be between 0 and 1, got 2.0",
    f"{GOOD} --merge-iou 0.2": "--merge-iou has no effect: add --merge",
    f"{GOOD} --max-detections 0": "max_detections must be positive, got 0",
    f"{GOOD} --num-samples 0": "num_samples must be positive, got 0",
    f"{GOOD} --batch-size 0": "Invalid value for '--batch-size'",
    f"{GOOD} --num-workers -1": "Invalid value for '--num-workers'",
    # model and machine
    f"{GOOD} --resolution 100": "must be a multiple of 56 pixels (patch x attention window), got 100",
    f"{GOOD} --resolution 0": "must be a multiple of 56 pixels (patch x attention window), got 0",
    f"{GOOD} --device fridge": "device must be cpu, cuda, cuda:1 or a GPU's number, got 'fridge'",
    f"{GOOD} --device 99": "device cuda:99 is not there",
    f"{GOOD} --address 127.0.0.1:1": "no Ray cluster answers at 127.0.0.1:1",
    f"{VALIDATE} --use-base-model --model ./nowhere": "./nowhere' does not exist",
    # data
    "validate --use-base-model": "name a COCO split with --val-data-dir DIR, or a --config that has one",
    "validate --use-base-model --val-data-dir nowhere": "no folder",
    "validate --use-base-model --val-data-dir data --split train": "data/train",
    "validate --use-base-model --val-data-dir empty_data": "none of its 0 images can be used",
    "validate --use-base-model --val-data-dir unlabelled": "no category has an object, so there is nothing to ask",
    "validate --use-base-model --val-data-dir cut_data": "is not valid JSON",
    "validate --use-base-model --val-data-dir cut_image": "cannot read image",
    "validate --use-base-model --val-data-dir lost_image": "1 listed image(s) not found",
    f"{GOOD} --config nowhere.yaml": "no configuration file at nowhere.yaml",
    f"{GOOD} --config unknown.yaml": "rnak",
    # results, refused before the model is asked
    "validate --use-base-model --val-data-dir data --output note.txt": "is no folder that can be written to",
    "validate --use-base-model --val-data-dir data --output note.txt/a": "is no folder that can be written to",
    # results of others
    f"{MEASURED} nowhere.json": "cannot read nowhere.json",
    f"{MEASURED} cut.json": "is not valid JSON",
    f"{MEASURED} other.json": f"image_id {FAR_AWAY}, which",
    f"{MEASURED} data/valid/{ANNOTATIONS}": "expected a list of COCO results, got dict",
    f"{MEASURED} right.json --weights good/best --merge": "so --weights, --merge would have no effect",
    "validate --saco right.json": "results to judge (--predictions FILE)",
    "validate --saco right.json --predictions right.json": "is not SA-Co ground truth",
    "validate --saco cut.json --predictions right.json": "cut.json is not valid JSON",
    # compare
    COMPARE: "nothing to compare with the base: name adapters with --weights DIR",
    f"{COMPARE} --weights good": "good is the folder of a run: its adapter is",
    f"{COMPARE} --weights good/best other_base": "was trained on the base",
    f"{COMPARE} --weights good/best --prob-threshold nan": "threshold must be between 0 and 1, got nan",
    f"{COMPARE} --weights good/best --merge-iou 0.2": "--merge-iou has no effect: add --merge",
    "compare --weights good/best": "name a COCO split with --val-data-dir DIR",
    "compare --weights good/best --val-data-dir data --output note.txt": "is no folder that can be written to",
    # infer
    f"{INFER} --weights nan": "has NaN or infinite values",
    f"{INFER} --weights cut_config": "adapter_config.json is no valid PEFT configuration",
    f"{INFER} --weights other_base --model model": "was trained on the base",
    f"{INFER} --resolution 0": "must be a multiple of",
    f"{INFER} --threshold abc": "Invalid value for '--threshold'",
    f"{INFER} --prompt 🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓": "SAM 3 reads at most 32",
    "infer --prompt crack": "Missing option '--image'",
    "infer --image photo.png": "nothing to look for",
    "infer --image text.jpg --prompt crack": "text.jpg: no known image format",
    "infer --image empty.jpg --prompt crack": "empty.jpg",
    "infer --image huge.png --prompt crack": "huge.png: it has more than 178 million pixels",
    "infer --image cut.png --prompt crack": "cut.png: image file is truncated",
    # export
    f"{EXPORT} nowhere": "nowhere is neither a complete adapter folder nor a merged model",
    f"{EXPORT} good": "did you mean good/best?",
    f"{EXPORT} cut_metadata": "sam3lora.json is damaged",
    f"{EXPORT} nan --merge": "has NaN or infinite values",
    f"{EXPORT} other_base --merge": "was trained on the base",
    f"{EXPORT} good/best --merge --dtype float8": "must be float32 or bfloat16, got 'float8'",
    f"{EXPORT} good/best --model tiny": "add --merge or leave them out",
    "export --weights good/best --merge": "add --output DIR",
    "export --weights good/best --merge --output note.txt": "note.txt exists and is no merged model",
    # data
    "data convert nowhere new": "no folder nowhere",
    "data convert good new": "no labels found",
    "data convert data new --to fridge": "unknown format 'fridge'; expected one of",
    "data convert data new --from fridge": "unknown format 'fridge'; expected one of",
    "data convert data unlabelled": "unlabelled is not empty",
    "data convert cut_data new": "is not valid JSON",
    "data split nowhere new": "no COCO data set in nowhere; convert it first",
    "data split data new --fractions 0.5 0.9": "positive numbers that add up to 1",
    "data split data new --group-by (": "is no regular expression",
    "data split data data": "data is not empty",
}


@pytest.mark.parametrize("words", CASES)
def test_mistake_is_named_in_one_message(words, capfd, place):
    before = sorted(place.rglob("*"))
    status = main(shlex.split(words))
    error = capfd.readouterr().err
    assert status == 2
    # typer frames its messages and breaks their lines
    plain = " ".join(error.replace("│", " ").split())
    assert CASES[words] in plain
    assert plain.count("error: ") + plain.count("─ Error ─") == 1
    assert "Traceback" not in error
    assert sorted(place.rglob("*")) == before


RELATIVE = {
    "validate --predictions right.json --val-data-dir data": "--output is outputs/validate",
    f"{COMPARE} --weights good/best": "--output is new",
    "infer --image photo.png --prompt crack": "--output is output",
    "infer --image photo.png --prompt crack --output /dev/null/a.png --json a.json": "--json is a.json",
    f"{EXPORT} good/best": "--output is new",
}


@pytest.mark.parametrize("words", RELATIVE)
def test_submitted_job_writes_nothing_that_vanishes(words, capsys, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(shlex.split(words)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert RELATIVE[words] in error
    assert "absolute path" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--input nowhere --output new --prompt crack", "nowhere"),
        ("--input data/valid --output new --prompt crack --weights good", "is no adapter folder"),
        ("--input data/valid --output new --prompt crack --threshold nan", "threshold must be between 0 and 1"),
        ("--input data/valid --output new --prompt crack --num-workers 0", "Invalid value for '--num-workers'"),
    ],
)
def test_predict_as_a_job(words, message, capsys, monkeypatch, place):
    job = Path(__file__).parents[2] / "jobs" / "predict.py"
    monkeypatch.setattr(sys, "argv", ["jobs/predict.py", *shlex.split(words)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(job), run_name="__main__")
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error
    assert "Traceback" not in error


def test_predict_counts_gpus_among_the_visible_ones(monkeypatch, place):
    # A scheduler gave GPUs 4 and 5 to this process; the missing folder ends the job after the choice.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ["--input", "nowhere", "--output", "new", "--prompt", "crack", "--device", "0"]
    monkeypatch.setattr(sys, "argv", ["jobs/predict.py", *words])
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "predict.py"), run_name="__main__")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"


@pytest.mark.parametrize("name", ["Läufe mit ✓", "[bold] [/bold] :smile:"])
def test_odd_names_work(name, small_base, tmp_path, monkeypatch, capsys):
    # spaces, accents, signs, and what a terminal library could take for its markup
    monkeypatch.chdir(tmp_path)
    write_adapter(Path(name, "best"), small_base)
    write_split(Path("größe x ✓/valid"), [(0, 1, 10)], {1: "Riß ✓"})
    words = ["--weights", f"{name}/best", "--val-data-dir", "größe x ✓", "--output", f"{name}/é ü"]
    for verb, file in (("validate", "metrics.json"), ("compare", "base/metrics.json")):
        assert main([verb, *words]) == 0
        metrics = json.loads(Path(name, "é ü", file).read_text(encoding="utf-8"))
        assert list(metrics["per_category"]) == ["Riß ✓"]
        assert f"{name}/é ü/report.html" in capsys.readouterr().out
