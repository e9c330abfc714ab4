"""Batch runs on a real Ray: nothing lost, nothing done twice; and its workers and merge without Ray."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from sam3lora.data.check import check_folder
from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.images import read_image
from sam3lora.errors import UserError
from sam3lora.inference.batch.image_list import ImageSource, list_images
from sam3lora.inference.batch.job import predict_batch
from sam3lora.inference.batch.merge import write_bad_images, write_dataset
from sam3lora.inference.batch.output_folder import part_path, read_part, read_parts
from sam3lora.inference.batch.worker import ModelChoice, ShardWorker, WorkerSettings

from .batch_cases import BROKEN, POST, PROMPTS, REPOSITORY, begin, draw_image, draw_images

# --- worker and merge, without Ray ---


@pytest.fixture
def make_settings(small_base: Path, tmp_path: Path) -> Callable[..., WorkerSettings]:
    def make(**changes) -> WorkerSettings:
        begin(tmp_path / "out", {})
        values = {
            "output": tmp_path / "out",
            "input_root": tmp_path,
            "run": "run",
            "choice": ModelChoice(str(small_base)),
            "categories": PROMPTS,
            "post": POST,
            "batch_size": 2,
            "overlays": False,
            "base_fingerprint": None,
        }
        return WorkerSettings(**(values | changes))

    return make


def row(sources: list[ImageSource]) -> dict:
    return {"number": 0, "images": json.dumps(sources)}


def test_worker_writes_and_draws_what_is_found(make_settings, tmp_path):
    paths = [draw_image(tmp_path / name, seed, (40, 40 + 20 * seed)) for seed, name in enumerate(["a.png", "b/a.png"])]
    broken = tmp_path / "broken.png"
    broken.touch()
    sources = [
        ImageSource(n, str(path), str(path.relative_to(tmp_path)))
        for n, path in enumerate([paths[0], broken, paths[1]])
    ]
    worker = ShardWorker(make_settings(overlays=True))
    counts = worker(row(sources))
    assert counts == {"mistake": "", "failure": "", "num_images": 3, "num_bad": 1}
    records = {record["path"]: record for record in read_part(part_path(tmp_path / "out", "run", 0))}
    assert records[str(broken)]["error"] == "the file is empty"

    for path in paths:
        entries = records[str(path)]["detections"]
        assert [entry["category_id"] for entry in entries] == [1] * 3 + [2] * 3
        assert entries[0]["segmentation"]["size"] == list(read_image(path).shape[:2])
        assert read_image(tmp_path / "out" / "overlays" / f"{path.relative_to(tmp_path)}.jpg").shape[0] >= 40

    # A part that is there is not done again.
    Path(sources[0].path).unlink()
    assert worker(row(sources))["num_bad"] == 1


def test_mistakes_that_show_at_the_worker_come_back_as_text(make_settings, tmp_path):
    sources = [ImageSource(1, str(draw_image(tmp_path / "a.png")), "a.png")]
    cases = {
        "SAM 3 reads at most 32": {"categories": {"gear " * 40: 1}},
        "does not see": {"input_root": tmp_path / "elsewhere"},
        "another base model": {"base_fingerprint": "0" * 64},
        "nowhere": {"choice": ModelChoice(str(tmp_path / "nowhere"))},
    }
    for message, changes in cases.items():
        assert message in ShardWorker(make_settings(**changes))(row(sources))["mistake"]
    assert not read_parts(tmp_path / "out").places


def test_shard_that_kills_its_workers_is_given_up_by_name(make_settings, tmp_path, monkeypatch):
    sources = [ImageSource(1, str(draw_image(tmp_path / "a.png")), "a.png")]
    worker = ShardWorker(make_settings())

    def die(*_args):
        raise MemoryError

    monkeypatch.setattr(worker, "_records", die)
    for _ in range(3):
        with pytest.raises(MemoryError):
            worker(row(sources))
    assert worker(row(sources))["failure"] == "3 workers died while they were busy with one of a.png"


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_dataset_of_a_turned_photograph_shows_the_picture_that_was_asked(orientation, make_settings, tmp_path):
    # A training run ignores EXIF data where the size does not tell: upside-down ones are written upright.
    drawn = draw_image(tmp_path / "drawn.png", seed=3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(drawn).save(tmp_path / "photo.jpg", quality=95, exif=exif)
    source = ImageSource(1, str(tmp_path / "photo.jpg"), "photo.jpg")
    ShardWorker(make_settings())(row([source]))
    write_dataset(tmp_path / "set", [source], read_parts(tmp_path / "out"), PROMPTS)

    record = CocoIndex.from_folder(tmp_path / "set" / "train").record(0)
    seen = read_image(record["path"], (record["height"], record["width"])).astype(float)
    asked = read_image(source.path, orientation="exif").astype(float)
    assert seen.shape == asked.shape
    assert np.abs(seen - asked).mean() < 8


# --- on Ray ---


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, object_store_memory=int(2e8), **options)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def worker_processes() -> list[psutil.Process]:
    """Actors of the Ray that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("ray::") and "MapWorker" in " ".join([process.name(), *process.cmdline()]):
                found.append(process)
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def num_parts(output: Path) -> int:
    return len(list((output / "parts").glob("*.jsonl")))


def times_done(output: Path) -> Counter[str]:
    """Image -> how often the model was asked, by what the parts hold."""
    records = [record for part in (output / "parts").glob("*.jsonl") for record in read_part(part)]
    return Counter(record["path"] for record in records if "error" not in record)


@pytest.mark.slow
def test_killed_half_way_and_started_again_it_finishes(ray_address, small_base, tmp_path):
    images, output = draw_images(tmp_path / "images", 200), tmp_path / "out"
    command = ["--input", str(images), "--output", str(output), "--prompt", *PROMPTS, "--model", str(small_base)]
    options = ["--batch_size", "2", "--threshold", "0", "--nms", "none", "--max-detections", "3", "--address"]
    first = subprocess.Popen([sys.executable, str(REPOSITORY / "jobs" / "predict.py"), *command, *options, ray_address])
    try:
        wait_until(lambda: num_parts(output) >= 3 or first.poll() is not None)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == -9, "it had finished, or failed, before it was killed"
    wait_until(lambda: not worker_processes())
    before = sum(times_done(output).values())
    assert 0 < before < 197
    assert not (output / "predictions.json").exists()

    choice = ModelChoice(str(small_base))
    summary = predict_batch(images, output, list(PROMPTS), choice=choice, post=dict(POST), batch_size=2, progress=False)
    # 197 results, three named; no image was asked twice, and none that was finished was asked again.
    assert (summary.num_images, summary.num_before) == (200, before)
    assert {bad["file_name"] for bad in summary.bad_images} == set(BROKEN)
    assert all(reason in summary.in_words() for reason in BROKEN.values())
    assert json.loads((output / "bad_images.json").read_text()) == summary.bad_images
    assert sorted(times_done(output).values()) == [1] * 197

    predictions = json.loads((output / "predictions.json").read_text())
    assert len(predictions) == summary.num_detections == 197 * len(PROMPTS) * 3
    ids = {image.image_id for image in list_images(images, leave_out=output)[0]}
    assert len({entry["image_id"] for entry in predictions}) == 197
    assert {entry["image_id"] for entry in predictions} < ids
    # Labels to train on: every image under its own name, scores kept, no faults.
    index = CocoIndex.from_folder(output / "dataset" / "train")
    assert len(index) == 197
    assert len(list((output / "dataset" / "train").rglob("*.png"))) == 197
    report = check_folder(output / "dataset")
    assert not [fault.kind for fault in report.splits[0].faults if fault.kind != "box_mask_disagree"]
    labels = json.loads((output / "dataset" / "train" / ANNOTATION_FILE).read_text())
    assert {entry["name"]: entry["id"] for entry in labels["categories"]} == PROMPTS
    assert all(0 <= entry["score"] <= 1 and entry["area"] > 0 for entry in labels["annotations"])


@pytest.mark.slow
def test_worker_that_is_killed_is_replaced(ray_address, small_base, tmp_path):
    images, output = draw_images(tmp_path / "images", 120), tmp_path / "out"
    killed = []

    def kill_one() -> None:
        wait_until(lambda: num_parts(output) >= 2)
        [worker, *_] = worker_processes()
        worker.kill()
        killed.append(worker.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    choice = ModelChoice(str(small_base))
    summary = predict_batch(images, output, list(PROMPTS), choice=choice, post=dict(POST), batch_size=1, progress=False)
    killer.join()
    assert killed
    assert len(summary.bad_images) == 3
    assert sorted(times_done(output).values()) == [1] * 117


def test_finished_run_is_merged_again_without_ray(make_settings, small_base, tmp_path, monkeypatch):
    # Nothing is pending, so no Ray is started; a broken merge is mended.
    images = tmp_path / "images"
    draw_image(images / "a.png")
    shutil.copytree(images, images / "copies")
    choice, output = ModelChoice(str(small_base)), tmp_path / "labels"
    monkeypatch.setattr("sam3lora.inference.batch.job.ray_session", None)
    with pytest.raises(TypeError):
        predict_batch(images, output, ["gear"], choice=choice, post=dict(POST))  # would need Ray
    settings = make_settings(output=output, categories={"gear": 1})
    ShardWorker(settings)(row(list_images(images, leave_out=output)[0]))

    def merge_last(*args):
        with pytest.raises(UserError, match="another process is writing results"):  # the run is not over yet
            begin(output, {})
        return write_bad_images(*args)

    monkeypatch.setattr("sam3lora.inference.batch.job.write_bad_images", merge_last)
    summary = predict_batch(images, output, ["gear"], choice=choice, post=dict(POST), dataset=False)
    assert (summary.num_images, summary.num_before, summary.num_detections) == (2, 2, 6)
    assert not (output / "dataset").exists()
    with pytest.raises(UserError, match="max_detections was 3, now 100"):
        predict_batch(images, output, ["gear"], choice=choice, post={"threshold": 0.0, "nms": "none"})


def test_relative_paths_of_a_submitted_job_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=r"--output is labels.*absolute path"):
        predict_batch(tmp_path, "labels", ["gear"])


@pytest.mark.slow
def test_images_that_all_fail(ray_address, small_base, tmp_path):
    images, output, choice = tmp_path / "images", tmp_path / "out", ModelChoice(str(small_base))
    images.mkdir()
    (images / "a.jpg").touch()
    with pytest.raises(UserError, match="none of 1 images gave a result"):
        predict_batch(images, output, ["gear"], choice=choice)
    assert "empty" in (output / "bad_images.json").read_text()
    with pytest.raises(UserError, match=r"num-workers 10 with a GPU .*room for 0"):
        predict_batch(images, output, ["gear"], choice=choice, num_workers=10, use_gpu=True)
