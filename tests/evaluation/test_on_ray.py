"""The evaluation on two real Ray workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sam3lora.data.images import ImageError, read_image
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.errors import RunFailed, UserError
from sam3lora.evaluation.ask.click_run import evaluate_clicks
from sam3lora.evaluation.ask.dense_run import evaluate_dense
from sam3lora.evaluation.ask.on_ray import MAX_RESTARTS, ask_on_ray
from sam3lora.evaluation.ask.run import evaluate_models
from sam3lora.evaluation.ask.worker import Models
from sam3lora.evaluation.clicks.settings import ClickEvaluation
from sam3lora.evaluation.dense.settings import DenseEvaluation
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.local_ray import start_local_ray

from ..model.dense.dense_cases import write_dense
from .adapters import write_adapter
from .splits import write_split
from .unreadable_cases import DAMAGED, corrupt, damaged_and_fewer, numbers

NUM_CPUS = 2
SETTINGS = EvaluationSettings({"threshold": 0.2, "nms": "none"}, batch_size=1)
BATCHES = [[{"image_id": image}] for image in range(4)]


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    import ray

    start_local_ray(NUM_CPUS, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    objects = [(0, 1, 10), (1, 2, 40), (2, 1, 30)]
    return write_split(tmp_path_factory.mktemp("split") / "valid", objects, {1: "crack", 2: "hole"}, num_images=3)


@pytest.fixture(scope="module")
def models(small_base, tmp_path_factory) -> Models:
    adapter = write_adapter(tmp_path_factory.mktemp("run") / "best", small_base, components=("vision_encoder",))
    return Models({"mine": str(adapter)}, options={"model": str(small_base), "device": "cpu"})


def ask_two_workers(make_worker, batches):
    return list(ask_on_ray(make_worker, batches, num_workers=2, use_gpu=False))


def test_two_workers_give_the_metrics_of_one_process(models, tmp_path):
    split, _ = damaged_and_fewer(tmp_path, corrupt)
    settings = SETTINGS.changed(on_bad_image="skip")
    alone = evaluate_models(split, models, settings)
    spread = evaluate_models(split, models, settings, num_workers=2)
    for here, there in zip(alone, spread, strict=True):
        # of the images that can be read
        assert here.skipped_images == there.skipped_images
        assert [one["image_id"] for one in there.skipped_images] == [DAMAGED]
        assert there.matches.image_ids.tolist() == [0, 2, 3, 4]
        # in the order of the images, whoever was first
        keys = ("image_id", "category_id")
        assert [[p[key] for key in keys] for p in here.predictions] == [
            [p[key] for key in keys] for p in there.predictions
        ]
        assert [p["score"] for p in here.predictions] == pytest.approx(
            [p["score"] for p in there.predictions], abs=1e-5
        )
        assert here.matches.presence_IC == pytest.approx(there.matches.presence_IC, abs=1e-5)
        assert (here.label, here.num_detections) == (there.label, there.num_detections)
        assert here.num_detections > 0
        first, second = (dict(metrics.to_dict(), seconds=0) for metrics in (here, there))
        assert first["settings"] == second["settings"]
        for name in ("map", "bbox_map", "bbox_map_50", "cgf1", "off_prompt_fpr", "presence_accuracy", "notes"):
            assert first[name] == pytest.approx(second[name], abs=1e-6), name


@pytest.mark.slow
def test_two_workers_measure_a_dense_model_as_one_process_does(split, spread_base, tmp_path):
    folder = write_dense(spread_base, tmp_path / "dense", "binary")
    settings = DenseEvaluation(batch_size=1)
    alone = evaluate_dense(split, folder, settings, keep_in=tmp_path / "alone", device="cpu")
    spread = evaluate_dense(split, folder, settings, keep_in=tmp_path / "spread", device="cpu", num_workers=2)
    assert spread.values == pytest.approx(alone.values, rel=1e-5)
    assert spread.meter.image_ids == alone.meter.image_ids
    maps = [sorted(path.relative_to(root) for path in root.rglob("*.png")) for root in tmp_path.glob("[as]*")]
    assert maps[0] == maps[1]
    assert len(maps[0]) == 6


def rounded(values: Any) -> Any:
    """Without the last digits, which depend on the number of threads."""
    if isinstance(values, Mapping):
        return {name: rounded(value) for name, value in values.items()}
    return round(values, 6) if isinstance(values, float) else values


@pytest.mark.slow
def test_two_workers_count_the_clicks_of_one_process(tmp_path):
    data = write_dataset(tmp_path, num_train=1, num_valid=4, size=96, domain="base", seed=3, progress=False) / "valid"
    settings = ClickEvaluation(max_clicks=3, prompting=EvaluationSettings(batch_size=1))
    alone, spread = (evaluate_clicks(data, None, settings, device="cpu", num_workers=number) for number in (0, 2))
    assert alone.clicks.counts == spread.clicks.counts
    assert alone.clicks.counts["images"] == 4
    assert alone.clicks.alone.objects == spread.clicks.alone.objects
    for here, there in ((alone.clicks.alone, spread.clicks.alone), (alone.clicks.from_text, spread.clicks.from_text)):
        assert here.ious() == pytest.approx(there.ious(), abs=1e-6)
    first, second = (rounded(dict(metrics.to_dict(), seconds=0)) for metrics in (alone, spread))
    assert first == second
    assert 0.5 < alone.alone["mean_iou_3"].value < 1


@pytest.mark.slow
def test_two_workers_of_dense_models_and_of_clicks_leave_out_the_same_images(spread_base, clickable_base, tmp_path):
    damaged, _ = damaged_and_fewer(tmp_path, corrupt)
    folder = write_dense(spread_base, tmp_path / "dense", "binary")
    dense = DenseEvaluation(batch_size=1, on_bad_image="skip")
    clicks = ClickEvaluation(max_clicks=2, prompting=SETTINGS.changed(on_bad_image="skip"))
    model = {"model": str(clickable_base), "device": "cpu"}
    for measure in (
        lambda workers: evaluate_dense(damaged, folder, dense, device="cpu", num_workers=workers),
        lambda workers: evaluate_clicks(damaged, None, clicks, num_workers=workers, **model),
    ):
        alone, spread = measure(0), measure(2)
        assert rounded(numbers(alone)) == rounded(numbers(spread))
        assert alone.skipped_images == spread.skipped_images
        assert spread.num_images == 4
    for path in damaged.glob("*.png"):
        corrupt(path)
    with pytest.raises(ImageError, match=r"none of the 5 images to measure could be read"):
        evaluate_dense(damaged, folder, dense, device="cpu", num_workers=2)


def test_too_many_workers_are_refused_and_not_waited_for():
    batches = [[{}]] * (NUM_CPUS + 1)
    with pytest.raises(UserError, match=f"{NUM_CPUS + 1} workers need {NUM_CPUS + 1} CPUs, Ray has {NUM_CPUS}"):
        list(ask_on_ray(lambda: None, batches, num_workers=500, use_gpu=False))
    with pytest.raises(UserError, match="need 1 GPUs, Ray has 0"):
        list(ask_on_ray(lambda: None, [[{}]], num_workers=1, use_gpu=True))


def make_fake_worker(dies: str):
    """A worker that answers with the image ids, and is killed at image 1 as often as `dies` holds files."""

    class Worker:
        def ask(self, records):
            ids = [record["image_id"] for record in records]
            if ids == [1] and (left := sorted(os.listdir(dies))):
                os.remove(os.path.join(dies, left[0]))
                os.kill(os.getpid(), signal.SIGKILL)
            return ids

        def facts(self):
            return {}

    return Worker


def test_missing_image_is_one_mistake_of_the_user(tmp_path):
    class Worker:
        def ask(self, records):
            return [read_image(record["path"]) for record in records]

    missing = str(tmp_path / "gone.png")
    with pytest.raises(ImageError, match=f"cannot read image {missing}: No such file"):
        ask_two_workers(Worker, [[{"path": missing}], [{"path": missing}]])


def test_model_that_cannot_be_loaded_is_one_mistake_of_the_user():
    def refuse():
        raise UserError("adapter folder run/best does not exist")

    with pytest.raises(UserError, match=r"^adapter folder run/best does not exist$"):
        ask_two_workers(refuse, BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("num_deaths", [1, MAX_RESTARTS, 100])
def test_batch_of_a_killed_worker_is_done_again_or_ends_the_run(num_deaths, tmp_path):
    for death in range(num_deaths):
        (tmp_path / str(death)).touch()
    worker = make_fake_worker(str(tmp_path))
    if num_deaths > MAX_RESTARTS:
        with pytest.raises(RunFailed, match=rf"workers died {MAX_RESTARTS + 1} times .*fewer images"):
            ask_two_workers(worker, BATCHES)
    else:
        assert sorted(ids for ids, _ in ask_two_workers(worker, BATCHES)) == [[0], [1], [2], [3]]
