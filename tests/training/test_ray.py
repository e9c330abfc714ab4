"""Training through two real Ray Train workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sam3lora.data.coco import CocoIndex
from sam3lora.data.plan import plan_epoch
from sam3lora.errors import RunFailed, UserError
from sam3lora.training.launch import train
from sam3lora.training.ray_trainer import as_user_error

from .changed_scenes import with_broken_images
from .ray_runs import ENVIRONMENT, SMALL_STEPS, local_ray
from .run_folder import adapter_of, lines_of

NUM_IMAGES, NUM_CPUS, SEED = 6, 5, 42
TWO_WORKERS = (
    "scaling.num_workers=2",
    *SMALL_STEPS,
    "training.num_epochs=1",
    f"training.seed={SEED}",
)


@pytest.fixture(scope="module", autouse=True)
def ray():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with local_ray(NUM_CPUS):
            yield


def image_of(scenes: Path, row: int) -> str:
    """A training image's path within the data set."""
    return str(Path(CocoIndex.from_folder(scenes / "train").record(row)["path"]).relative_to(scenes))


def rows_of_rank(rank: int) -> list[int]:
    batches = plan_epoch(NUM_IMAGES, images_per_step=2, world_size=2, rank=rank, seed=SEED)
    return [row for [row] in batches]


def test_two_workers_do_what_one_does_with_twice_the_batch(make_config, scenes, tmp_path):
    # One bad image for each worker, in different steps: both workers' shares are read, and a worker without a batch
    # takes part in the step all the same.
    broken = [image_of(scenes, rows_of_rank(0)[0]), image_of(scenes, rows_of_rank(1)[2])]
    data = with_broken_images(scenes, tmp_path / "data", *broken)
    # A large epsilon: Adam would blow up the last bits of gradients that are almost 0.
    common = [
        f"training.data_dir={data}",
        "training.on_bad_image=skip",
        "training.seed=42",
        "training.adam_epsilon=0.1",
    ]
    two = train(make_config(*common, *TWO_WORKERS, output="two"))
    one = train(make_config(*common, "training.batch_size=2", "training.num_epochs=1", output="one"))

    assert two.steps == one.steps == 3
    [start] = lines_of(two, "start")
    assert start["num_workers"] == 2
    assert [line["step"] for line in lines_of(two, "step")] == [1, 2, 3]
    assert {line["path"] for line in lines_of(two, "skipped_image")} == {str(data / name) for name in broken}
    # The same images and the same gradients: the same terms, validation and weights.
    assert two.best_loss == pytest.approx(one.best_loss, rel=1e-5)
    assert two.history[0]["train_loss"] == pytest.approx(one.history[0]["train_loss"], rel=1e-5)
    weights, expected = adapter_of(two), adapter_of(one)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (weights[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name
    # A complete run folder, and nothing of Ray's in it.
    assert sorted(os.listdir(two.output_dir)) == sorted(os.listdir(one.output_dir))
    assert sorted(os.listdir(two.output_dir / "checkpoints")) == ["step_00000003"]


@pytest.mark.slow
def test_mistake_that_one_worker_meets_ends_the_run(make_config, scenes, tmp_path):
    # The other worker waits for it in a collective call; neither that wait nor a restart delays the message.
    broken = image_of(scenes, rows_of_rank(1)[1])
    data = with_broken_images(scenes, tmp_path / "data", broken)
    config = make_config(f"training.data_dir={data}", "scaling.max_failures=2", *TWO_WORKERS)
    with pytest.raises(UserError, match="cannot read image") as caught:
        train(config)
    assert str(data / broken) in str(caught.value)
    output_dir = Path(config.output.output_dir)
    assert len(lines_of(output_dir, "start")) == 1
    assert [line["step"] for line in lines_of(output_dir, "step")] == [1]
    assert not list(output_dir.glob(".*.part"))


@pytest.mark.parametrize(
    ("num_cpus", "advice"), [(0, "--resume"), (99, "start a new process")], ids=["as it ran", "before it ran"]
)
def test_a_lost_controller_is_told_with_what_to_do(num_cpus, advice, make_config):
    import ray

    @ray.remote(num_cpus=num_cpus)
    class Controller:
        def run(self) -> None:
            os._exit(1)

    controller = Controller.remote()
    done = controller.run.remote()
    if num_cpus:  # it waits for them
        ray.kill(controller)
    with pytest.raises(ray.exceptions.RayActorError) as caught:
        ray.get(done)
    told = as_user_error(caught.value, make_config())
    assert isinstance(told, RunFailed)
    assert "controller" in str(told)
    assert advice in str(told)


def test_more_than_the_cluster_has_is_refused_before_ray_waits_for_it(make_config):
    import ray

    with pytest.raises(UserError, match=f"room for 2 .*nodes with {NUM_CPUS} CPU"):
        train(make_config("scaling.num_workers=3", "training.num_workers=1"))
    with pytest.raises(UserError, match="1 GPU"):
        train(make_config("scaling.num_workers=1", "scaling.use_gpu=true", "training.num_workers=1"))
    assert ray.is_initialized()  # a Ray that was running keeps running
