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
BASE = "validate --use-base-model --output new --val-data-dir"
MEASURED = f"{VALIDATE} --predictions"
COMPARE = "compare --val-data-dir data --output new"
INFER = "infer --prompt crack --output new/a.png --image"
EXPORT = "export --output new --weights"

# One command for each rule -> what the message names: the file, option, field or value that is wrong.
CASES: dict[str, tuple[str, ...]] = {
    # adapters
    VALIDATE: ("--weights", "--use-base-model"),
    f"{VALIDATE} --weights nowhere": ("nowhere",),
    f"{VALIDATE} --weights note.txt": ("note.txt",),
    f"{VALIDATE} --weights good": ("good/best",),  # the folder of a run
    f"{VALIDATE} --weights data": ("adapter_config.json", "adapter_model.safetensors"),
    f"{VALIDATE} --weights model": ("model", "not an adapter"),
    f"{VALIDATE} --weights nan": ("nan", "NaN"),
    f"{VALIDATE} --weights cut_weights": ("cut_weights", "adapter_model.safetensors"),
    f"{VALIDATE} --weights cut_config": ("cut_config", "adapter_config.json"),
    f"{VALIDATE} --weights cut_metadata": ("cut_metadata", "sam3lora.json"),
    f"{VALIDATE} --weights other_base": ("other_base", "trained on the base"),
    # numbers
    f"{GOOD} --prob-threshold 1.5": ("threshold", "1.5"),
    f"{GOOD} --prob-threshold nan": ("threshold", "nan"),
    f"{GOOD} --nms-iou 2": ("nms_iou", "2"),
    f"{GOOD} --merge-iou 0.2": ("--merge-iou", "--merge"),
    f"{GOOD} --max-detections 0": ("max_detections", "0"),
    f"{GOOD} --num-samples 0": ("num_samples", "0"),
    f"{GOOD} --batch-size abc": ("Invalid value", "--batch-size"),
    # model and machine
    f"{GOOD} --resolution 100": ("56", "100"),
    f"{GOOD} --device fridge": ("device", "fridge"),
    f"{GOOD} --device 99": ("cuda:99",),
    f"{GOOD} --address 127.0.0.1:1": ("127.0.0.1:1",),
    f"{VALIDATE} --use-base-model --model ./nowhere": ("./nowhere",),
    # data
    "validate --use-base-model --output new": ("--val-data-dir", "--config"),
    f"{BASE} nowhere": ("nowhere",),
    f"{BASE} data --split train": ("no train split", "train/", "found valid"),
    f"{BASE} empty_data": ("empty_data",),
    f"{BASE} unlabelled": ("no category has an object",),
    f"{BASE} cut_data": ("cut_data", "JSON"),
    f"{BASE} cut_image": ("cut_image", "1.png"),
    f"{BASE} lost_image": ("lost_image", "1 listed image"),
    f"{GOOD} --config nowhere.yaml": ("nowhere.yaml",),
    f"{GOOD} --config unknown.yaml": ("unknown.yaml", "lora.rnak", "lora.rank"),
    # output, before the model is asked
    "validate --use-base-model --val-data-dir data --output note.txt/a": ("--output", "note.txt"),
    # results of other programs
    f"{MEASURED} nowhere.json": ("nowhere.json",),
    f"{MEASURED} cut.json": ("cut.json", "JSON"),
    f"{MEASURED} other.json": (f"image_id {FAR_AWAY}",),
    f"{MEASURED} data/valid/{ANNOTATIONS}": (ANNOTATIONS, "dict"),
    f"{MEASURED} right.json --weights good/best --merge": ("--weights, --merge",),
    "validate --saco right.json": ("--predictions", "--val-data-dir"),
    "validate --saco right.json --predictions right.json": ("right.json", "SA-Co"),
    # compare
    COMPARE: ("--weights",),
    # infer
    f"{INFER} photo.png --prompt 🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓🍓": ("at most 32",),
    "infer --prompt crack": ("Missing option", "--image"),
    "infer --image photo.png": ("--prompt", "--box"),
    f"{INFER} text.jpg": ("text.jpg",),
    f"{INFER} empty.jpg": ("empty.jpg",),
    f"{INFER} huge.png": ("huge.png", "178 million"),
    f"{INFER} cut.png": ("cut.png", "truncated"),
    f"{INFER} missing.jpg": ("missing.jpg", "No such file"),
    f"{INFER} https://example.org/a.jpg": ("https://example.org/a.jpg", "download"),
    f"{INFER} s3://bucket//a.jpg": ("s3://bucket//a.jpg", "download"),
    f"{INFER} good": ("no images in",),
    f"{INFER} photo.png --prompt ' '": ("is empty",),
    f"{INFER} photo.png --weights a b": ("--weights takes one value",),
    f"{INFER} photo.png --box 1 2 300 4": ("x0 < x1 <= 90",),
    f"{INFER} photo.png --box 1 2 three 4": ("four numbers", "got 1 2 three 4"),
    f"{INFER} data/valid --box 1 2 3": ("four numbers",),
    f"{INFER} data/valid --box 1 2 3 4": ("pixels of one image",),
    f"{INFER} data/valid": ("new/a.png", "must be one too"),
    f"{INFER} photo.png --json .": ("it is a folder",),
    "infer --prompt x --image photo.png --output photo.png": ("is the image itself",),
    "infer --prompt x --image photo.png --output folder": ("must end in .png",),
    "infer --prompt x --image photo.png --output note.txt/a.png": ("note.txt", "can be written to"),
    "infer --prompt x --image data/valid --output data/valid": ("folder of the images",),
    # export
    f"{EXPORT} nowhere": ("nowhere",),
    f"{EXPORT} good": ("good/best",),
    f"{EXPORT} nan --merge": ("nan", "NaN"),
    f"{EXPORT} good/best --merge --dtype float8": ("bfloat16", "float8"),
    f"{EXPORT} good/best --model tiny": ("--model", "--merge"),
    f"{EXPORT} data": ("neither a complete adapter folder nor a merged model",),
    f"{EXPORT} good/best --merge --dtype float16": ("float32 or bfloat16",),
    f"{EXPORT} good/best --dtype bfloat16": ("--dtype", "--merge"),
    f"{EXPORT} good/best --dry-run": ("--dry-run", "--push-to"),
    f"{EXPORT} good/best --public": ("--public", "--push-to"),
    f"{EXPORT} good/best --weights nan": ("one folder",),
    f"{EXPORT} good/best --merge --push-to cracks": ("OWNER/NAME",),
    "export --weights good/best --merge": ("--output",),
    "export --weights good/best --merge --output note.txt": ("note.txt",),
    # train
    "train light": ("--data-dir",),
    "train quick_test --num-workers 0 --data-dir nowhere": ("nowhere",),
    "train quick_test --num-workers 0 --data-dir data --output-dir new --resume": ("--resume",),
    # tune and demo
    "tune lora_quik": ('did you mean "lora_quick"', "components"),
    "tune lora_quick": ("--data-dir",),
    "tune lora_quick --data-dir nowhere": ("no folder at nowhere",),
    "tune lora_quick --data-dir nowhere --explain": ("no folder at nowhere",),
    "tune lora_quick --data-dir data --no-probe": ("--explain",),
    "tune lora_quick --data-dir data --retry-failed": ("--resume",),
    "tune lora_quick --data-dir data --metric accuracy": ("metric", "accuracy"),
    "tune lora_quick --data-dir data --algorithm magic": ("algorithm", "magic"),
    "tune lora_quick --data-dir data lora.rank": ("lora.rank=8",),
    "tune lora_quick --data-dir data --device gpu": ("GPU numbers",),
    "demo --output .": ("--output",),  # it holds data of another kind
    "demo --output new training.epochs=1": ("epochs",),
    # data
    "data check nowhere": ("nowhere",),
    "data check data --json note.txt/report.json": ("--json",),
    "data check data --task fridge": ("fridge", "dense"),
    "data synth data --num-train 1 --num-valid 1": ("data",),
    "data convert nowhere new": ("nowhere",),
    "data convert good new": ("good", "no labels"),
    "data convert data new --to fridge": ("fridge", "yolo"),
    "data convert data unlabelled": ("unlabelled", "empty"),
    "data convert cut_data new": ("cut_data", "JSON"),
    "data split nowhere new": ("nowhere",),
    "data split data new --fractions 0.5 0.9": ("0.5", "0.9"),
    "data split data new --group-by (": ("regular expression",),
}


@pytest.mark.parametrize("words", CASES)
def test_mistake_is_named_in_one_message(words, capfd, place):
    before = sorted(place.rglob("*"))
    status = main(shlex.split(words))
    error = capfd.readouterr().err
    assert status == 2
    # typer frames its messages and breaks their lines
    plain = " ".join(error.replace("│", " ").split())
    for part in CASES[words]:
        assert part in plain
    assert plain.count("error: ") + plain.count("─ Error ─") == 1
    assert "Traceback" not in error
    assert sorted(place.rglob("*")) == before


RELATIVE = {
    "validate --predictions right.json --val-data-dir data": "--output is outputs/validate",
    "infer --image photo.png --prompt crack": "--output is output",
    "infer --image photo.png --prompt crack --output /dev/null/a.png --json a.json": "--json is a.json",
    f"{EXPORT} good/best": "--output is new",
    "train light --data-dir data": "--output-dir is outputs/light",
    "tune lora_quick --data-dir data": "--output-dir is outputs/lora_quick",
}


@pytest.mark.parametrize("words", RELATIVE)
def test_submitted_job_writes_nothing_that_vanishes(words, capsys, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(shlex.split(words)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert RELATIVE[words] in error
    assert "absolute path" in error


@pytest.mark.parametrize(
    ("job", "words", "message"),
    [
        ("predict", "--output new --prompt crack --input nowhere", "nowhere"),
        ("predict", "--output new --prompt crack --input good", "holds no images"),
        ("predict", "--output new --prompt crack --input data/valid --weights good", "good"),
        ("predict", "--output new --prompt crack --input data/valid --threshold nan", "threshold"),
        ("predict", "--output new --prompt crack --input data/valid --num-workers 0", "--num-workers"),
        ("train", "light lora.rank=0", "lora.rank should be greater than or equal to 1, got 0"),
        ("tune", "nothing", '"nothing" is neither a search space nor a YAML file'),
    ],
)
def test_job_names_the_mistake(job, words, message, capsys, monkeypatch):
    assert run_job(job, words, monkeypatch) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error
    assert "Traceback" not in error


def run_job(job: str, words: str, monkeypatch) -> object:
    """The exit status of `jobs/JOB.py` with these words."""
    file = Path(__file__).parents[2] / "jobs" / f"{job}.py"
    monkeypatch.setattr(sys, "argv", [str(file), *shlex.split(words)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(file), run_name="__main__")
    return stop.value.code


def test_batch_job_counts_gpus_among_the_visible_ones(monkeypatch):
    # A scheduler gave GPUs 4 and 5 to this process; the missing folder ends the job after the choice.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert run_job("predict", "--output new --prompt crack --input nowhere --device 0", monkeypatch) == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"


def test_odd_names_work(small_base, tmp_path, monkeypatch, capsys):
    # spaces, accents, signs, and what a terminal library could take for its markup
    name = "Läufe mit ✓ [bold] [/bold] :smile:"
    monkeypatch.chdir(tmp_path)
    write_adapter(Path(name, "best"), small_base)
    write_split(Path("größe x ✓/valid"), [(0, 1, 10)], {1: "Riß ✓"})
    words = ["--weights", f"{name}/best", "--val-data-dir", "größe x ✓", "--output", f"{name}/é ü"]
    for verb, file in (("validate", "metrics.json"), ("compare", "base/metrics.json")):
        assert main([verb, *words]) == 0
        metrics = json.loads(Path(name, "é ü", file).read_text(encoding="utf-8"))
        assert list(metrics["per_category"]) == ["Riß ✓"]
        assert f"{name}/é ü/report.html" in capsys.readouterr().out
