"""Batch runs on a real Ray: nothing lost, nothing done twice; and the pieces of them without Ray."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from PIL import Image

from sam3lora.data.check import check_folder
from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.images import read_image
from sam3lora.errors import UserError
from sam3lora.infer.batch_input import ImageSource, choose_categories, list_images
from sam3lora.infer.batch_job import predict_batch
from sam3lora.infer.batch_merge import write_bad_images, write_dataset
from sam3lora.infer.batch_output import open_output, part_path, read_part, read_parts, write_part
from sam3lora.infer.batch_worker import ModelChoice, ShardWorker, WorkerSettings
from sam3lora.infer.postprocess import PostProcessing
from sam3lora.infer.segmenter import Segmenter

REPOSITORY = Path(__file__).parents[2]
PROMPTS = {"gear": 1, "red bolt": 2}
POST = PostProcessing(threshold=0.0, nms_iou=1.0, max_detections=3)  # random weights are sure of nothing
BROKEN = {"empty.jpg": "the file is empty", "sub/cut.jpg": "truncated", "text.png": "no known image format"}


def draw_image(path: Path, seed: int = 0, size_hw: tuple[int, int] = (40, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(pixels, size_hw[::-1], interpolation=cv2.INTER_NEAREST))
    return path


def draw_images(folder: Path, num_images: int) -> Path:
    """Images in two folders, with the same base names in both, and three broken ones."""
    for number in range(num_images - len(BROKEN)):
        draw_image(folder / ("sub" if number % 2 else "") / f"{number // 2}.png", number)
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no image")
    whole = draw_image(folder / "sub" / "cut.jpg").read_bytes()
    (folder / "sub" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def begin(output: Path, settings: dict, **options) -> None:
    with open_output(output, settings, **options):
        pass


# --- input ---


def test_folder_is_searched_without_the_output_and_hidden_files(tmp_path):
    for name in ("b.JPG", "sub/b.jpg", "sub/.hidden.jpg", ".cache/a.jpg", "out/dataset/train/b.jpg", "notes.md"):
        draw_image(tmp_path / (name if name.lower().endswith("jpg") else "x.png")).rename(tmp_path / name)
    (tmp_path / "sub" / "circle").symlink_to(tmp_path)
    images, categories = list_images(tmp_path, leave_out=tmp_path / "out")
    assert [image.name for image in images] == ["b.JPG", "sub/b.jpg"]
    assert [image.image_id for image in images] == [1, 2]
    assert categories == {}


def test_list_is_relative_to_its_file_and_may_name_what_is_missing(tmp_path):
    (tmp_path / "list.txt").write_text("x/a.jpg\n\n../elsewhere/a.jpg\nx/a.jpg\n")
    images, _ = list_images(tmp_path / "list.txt", leave_out=tmp_path / "out")
    # A path listed twice is one image; names tell equal base names apart.
    assert [image.path for image in images] == [f"{tmp_path}/x/a.jpg", f"{tmp_path.parent}/elsewhere/a.jpg"]
    assert len({image.name for image in images}) == 2


def test_coco_file_keeps_its_ids_and_sizes(tmp_path):
    draw_image(tmp_path / "a.png")
    images = [
        {"id": 7, "file_name": "a.png", "height": 40, "width": 60},
        {"id": 0, "file_name": "gone.png", "height": 1, "width": 1},
    ]
    annotation = {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 1, 9, 9]}
    categories = [{"id": 5, "name": "Gear"}, {"id": 9, "name": "Gear"}, {"id": 2, "name": "leaf"}]
    raw = {"images": images, "annotations": [annotation], "categories": categories}
    (tmp_path / "labels.json").write_text(json.dumps(raw))
    found, known = list_images(tmp_path / "labels.json", leave_out=tmp_path / "out")
    assert found == [
        ImageSource(7, str(tmp_path / "a.png"), "a.png", (40, 60)),
        ImageSource(0, str(tmp_path / "gone.png"), "gone.png", None),  # missing: to be reported, not forgotten
    ]
    # Of ids that share a name the one that annotations use counts.
    assert choose_categories(["gear", "bolt", "leaf"], known) == {"gear": 5, "bolt": 6, "leaf": 2}


def test_input_and_prompts_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="expected a folder, a list"):
        list_images(tmp_path / "nowhere", leave_out=tmp_path)
    with pytest.raises(UserError, match="holds no images"):
        list_images(tmp_path, leave_out=tmp_path / "out")
    for prompts in ([], ["gear", "  "], ["Gear", " gear"]):
        with pytest.raises(UserError, match="prompt"):
            choose_categories(prompts, {})


# --- output ---


def test_output_goes_on_only_with_the_same_settings(tmp_path):
    output = tmp_path / "out"
    begin(output, {"threshold": 0.5, "categories": {"gear": 1}})
    (output / "parts" / ".half.tmp").touch()
    begin(output, {"threshold": 0.5, "categories": {"gear": 1}})
    assert not list((output / "parts").iterdir())  # what a crash left half-written is gone
    with pytest.raises(UserError, match=r"threshold was 0\.5, now 0\.3.*--overwrite"):
        begin(output, {"threshold": 0.3, "categories": {"gear": 1}})
    (output / "notes.md").touch()
    (output / "predictions.json").touch()
    begin(output, {"threshold": 0.3, "categories": {"gear": 1}}, overwrite=True)
    assert sorted(os.listdir(output)) == [".lock", "batch.json", "notes.md", "parts"]


def test_folder_of_something_else_is_not_touched(tmp_path):
    draw_image(tmp_path / "dataset" / "a.png")
    (tmp_path / "batch.json").write_text('{"name": "of another program"}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds no batch run"):
            begin(tmp_path, {}, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["batch.json", "dataset"]


def test_second_start_leaves_the_first_alone(small_base, tmp_path):
    # It would remove what the first is writing and what it has counted.
    draw_image(tmp_path / "images" / "a.png")
    output = tmp_path / "out"
    with open_output(output, {}):
        writing = [output / ".predictions.json.tmp", output / "parts" / ".run.tmp", output / "parts" / "run.tries"]
        for path in writing:
            path.touch()
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"another run is writing to {output}"):
                predict_batch(
                    tmp_path / "images", output, ["gear"], choice=ModelChoice(str(small_base)), overwrite=overwrite
                )
        assert all(path.exists() for path in writing)
    begin(output, {})


HOLD = """
import subprocess, sys, time
from pathlib import Path
from sam3lora.infer.batch_output import open_output
with open_output(Path(sys.argv[1]), {}):
    print(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, close_fds=False).pid, flush=True)
    time.sleep(60)
"""


def test_lock_ends_with_a_killed_process_and_not_with_its_children(tmp_path):
    # Workers of a killed run may live on for a while.
    output = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    child = psutil.Process(int(holder.stdout.readline()))
    try:
        with pytest.raises(UserError, match="another run is writing"):
            begin(output, {})
        holder.kill()
        holder.communicate()
        begin(output, {})
        assert child.is_running()
    finally:
        holder.kill()
        child.kill()


def test_results_are_counted_through_once_whatever_the_number_of_images(tmp_path):
    # Once for each image would take hours for a million of them.
    class Places(dict):
        num_walks = 0

        def items(self):
            self.num_walks += 1
            return super().items()

    sources = [ImageSource(number, f"/{number}.png", f"{number}.png") for number in range(5)]
    (tmp_path / "out" / "parts").mkdir(parents=True)
    bad = [{"path": source.path, "error": "the file is empty"} for source in sources]
    write_part(part_path(tmp_path / "out", "run", 0), "0" * 64, bad)
    finished = read_parts(tmp_path / "out")
    finished.places = places = Places(finished.places)
    write_dataset(tmp_path / "set", sources, finished, PROMPTS)
    assert len(write_bad_images(tmp_path / "bad.json", sources, finished)) == 5
    assert places.num_walks == 1


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


def test_worker_equals_the_segmenter_and_draws(make_settings, small_base, tmp_path):
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

    segmenter = Segmenter(str(small_base), device="cpu")
    for path in paths:
        image = read_image(path)
        [found] = segmenter.detect(segmenter.encode([image]), list(PROMPTS), post=POST)
        entries = records[str(path)]["detections"]
        assert [entry["category_id"] for entry in entries] == [1] * 3 + [2] * 3
        np.testing.assert_allclose([e["score"] for e in entries], np.concatenate([f.scores for f in found]), atol=1e-5)
        boxes = np.concatenate([f.boxes_xyxy for f in found])
        boxes[:, 2:] -= boxes[:, :2]
        np.testing.assert_allclose([e["bbox"] for e in entries], boxes, atol=0.02)
        assert entries[0]["segmentation"]["size"] == list(image.shape[:2])
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
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


def test_killed_half_way_and_started_again_it_finishes(ray_address, small_base, tmp_path):
    images, output = draw_images(tmp_path / "images", 200), tmp_path / "out"
    command = ["--input", str(images), "--output", str(output), "--prompt", *PROMPTS, "--model", str(small_base)]
    options = [
        "--batch_size",
        "2",
        "--threshold",
        "0",
        "--nms_iou",
        "1",
        "--max-detections",
        "3",
        "--address",
        ray_address,
    ]
    first = subprocess.Popen([sys.executable, str(REPOSITORY / "jobs" / "predict.py"), *command, *options])
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

    summary = predict_batch(
        images, output, list(PROMPTS), choice=ModelChoice(str(small_base)), post=POST, batch_size=2, progress=False
    )
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
    assert not [issue.kind for issue in report.splits[0].issues if issue.kind != "box_mask_disagree"]
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
    summary = predict_batch(images, output, list(PROMPTS), choice=choice, post=POST, batch_size=1, progress=False)
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
    monkeypatch.setattr("sam3lora.infer.batch_job.ray_session", None)
    with pytest.raises(TypeError):
        predict_batch(images, output, ["gear"], choice=choice, post=POST)  # would need Ray
    settings = make_settings(output=output, categories={"gear": 1})
    ShardWorker(settings)(row(list_images(images, leave_out=output)[0]))

    def merge_last(*args):
        with pytest.raises(UserError, match="another run is writing"):  # the run is not over yet
            begin(output, {})
        return write_bad_images(*args)

    monkeypatch.setattr("sam3lora.infer.batch_job.write_bad_images", merge_last)
    summary = predict_batch(images, output, ["gear"], choice=choice, post=POST, dataset=False)
    assert (summary.num_images, summary.num_before, summary.num_detections) == (2, 2, 6)
    assert not (output / "dataset").exists()
    with pytest.raises(UserError, match="max_detections was 3, now 100"):
        predict_batch(images, output, ["gear"], choice=choice, post=PostProcessing(threshold=0.0, nms_iou=1.0))


def test_relative_paths_of_a_submitted_job_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=r"--output is labels.*absolute path"):
        predict_batch(tmp_path, "labels", ["gear"])


def test_mistake_on_the_command_line_ends_with_status_2(tmp_path):
    command = [sys.executable, "jobs/predict.py", "--input", str(tmp_path), "--prompt", "gear", "--output"]
    done = subprocess.run([*command, str(tmp_path / "out")], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds no images" in done.stderr
    assert "Traceback" not in done.stderr


def test_images_that_all_fail(ray_address, small_base, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    with pytest.raises(UserError, match="none of 1 images could be read"):
        predict_batch(tmp_path / "images", tmp_path / "out", ["gear"], choice=ModelChoice(str(small_base)))
    assert "empty" in (tmp_path / "out" / "bad_images.json").read_text()
    with pytest.raises(UserError, match=r"num-workers 10 with a GPU .*room for 0"):
        predict_batch(
            tmp_path / "images",
            tmp_path / "out",
            ["gear"],
            choice=ModelChoice(str(small_base)),
            num_workers=10,
            use_gpu=True,
        )
