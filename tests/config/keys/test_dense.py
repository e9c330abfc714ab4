"""Keys of `dense`, and `task` itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam3lora.config import load_config
from sam3lora.errors import UserError
from sam3lora.training.launch import train

from ...training.run_folder import lines_of
from .conftest import acts, first_batch, take_step

DENSE = ("task=dense", "lora.apply_to_detr_decoder=false", "lora.apply_to_vision_encoder=true", "dense.width=32")
FROZEN = ("task=dense", "lora={}", "dense.width=32", "dense.adapter=none")


def targets(worker) -> np.ndarray:
    return first_batch(worker).label_maps


def learning(worker) -> set[str]:
    return {name.split(".")[0] for name, one in worker.model.named_parameters() if one.requires_grad}


@acts("task")
def test_task_dense_learns_label_maps(shared):
    assert targets(shared()) is None
    assert set(np.unique(targets(shared(*DENSE)))) <= {0, 1, 2, 3}


@acts("dense.mode")
@pytest.mark.parametrize(
    ("mode", "classes", "maps"),
    [
        ("auto", ("background", "crack", "hole", "moss"), 1),
        ("multiclass", ("background", "crack", "hole", "moss"), 1),
        ("binary", ("foreground",), 1),
        ("multilabel", ("crack", "hole", "moss"), 3),
    ],
)
def test_mode_decides_classes_and_targets(mode, classes, maps, shared):
    worker = shared(*DENSE, f"dense.mode={mode}")
    assert worker.model.settings.classes == classes
    assert targets(worker).shape[1] == maps


@acts("dense.foreground")
def test_foreground_chooses_the_categories_of_binary(shared):
    # An object has 12 x 12 of 64 x 64 pixels; image 0 has three cracks and a hole.
    whole = "training.batch_size=4"  # an epoch
    both, holes = (shared(*DENSE, whole, f"dense.foreground={names}") for names in ("[crack,hole]", "[hole]"))
    images = [np.argmin(first_batch(worker).image_ids) for worker in (both, holes)]
    areas = [int(targets(worker)[image].sum()) for worker, image in zip((both, holes), images, strict=True)]
    assert areas[0] == pytest.approx(4 * areas[1], rel=0.2)


@acts("dense.adapter")
def test_adapter_decides_what_learns_in_the_trunk(shared):
    assert learning(shared(*FROZEN)) == {"dense_head"}
    lora = shared(*DENSE)
    assert any(".lora_A." in name for name, one in lora.model.named_parameters() if one.requires_grad)
    bottleneck = shared("task=dense", "lora={}", "dense.width=32", "dense.adapter=bottleneck")
    assert all(".bottleneck." in name for name, one in bottleneck.model.sam3.named_parameters() if one.requires_grad)
    assert learning(bottleneck) == learning(lora) == {"dense_head", "sam3"}


@acts("dense.bottleneck_width")
def test_bottleneck_width_is_the_inner_size(shared):
    worker = shared("task=dense", "lora={}", "dense.width=32", "dense.adapter=bottleneck", "dense.bottleneck_width=5")
    assert worker.model.trunk.layers[0].bottleneck.down.out_features == 5


@acts("dense.layers")
def test_layers_are_those_that_the_head_reads(shared):
    last = len(shared(*DENSE).model.trunk.layers) - 1
    chosen = {layers: shared(*DENSE, f"dense.layers={layers}").model.settings.layers for layers in ("last", "[0]")}
    assert chosen == {"last": (last,), "[0]": (0,)}
    layers = shared(*DENSE).model.trunk.layers
    assert shared(*DENSE).model.settings.layers == tuple(n for n, one in enumerate(layers) if one.window_size == 0)
    with pytest.raises(UserError, match="names layer 40"):
        shared(*DENSE, "dense.layers=[40]")


@acts("dense.width")
def test_width_is_that_of_the_head(shared):
    assert shared(*DENSE, "dense.width=64").model.dense_head.outputs[0].in_channels == 64


@acts("dense.norm")
def test_norm_of_the_head(shared):
    def norms(worker):
        return {type(one).__name__ for one in worker.model.dense_head.modules() if "Norm" in type(one).__name__}

    assert norms(shared(*DENSE)) == {"LayerNorm", "GroupNorm"}
    assert norms(shared(*DENSE, "dense.norm=batch")) == {"LayerNorm", "BatchNorm2d"}


@acts("dense.deep_supervision")
def test_deep_supervision_weighs_the_coarser_outputs(shared):
    def loss(weights: str) -> float:
        worker = shared(*FROZEN, f"dense.deep_supervision={weights}")
        worker.model.eval()
        batch = first_batch(worker)
        from sam3lora.training.step import StepCounts

        return sum(term.item() for term in worker.runner.evaluate(batch, StepCounts.of([batch]).normalizer()).values())

    fine, middle, all_three = loss("[1,0,0]"), loss("[1,1,0]"), loss("[1,1,1]")
    assert fine < middle < all_three


@acts("dense.boundary_weight")
def test_boundary_weight_reaches_the_loss(shared):
    assert shared(*DENSE, "dense.boundary_weight=2.5").runner.criterion.boundary_weight == 2.5
    weights = {take_step(shared(*FROZEN, f"dense.boundary_weight={weight}"))[0]["dense_ce"] for weight in (0, 5)}
    assert len(weights) == 2


@acts("dense.learning_rate")
def test_learning_rate_is_that_of_the_head(shared):
    worker = shared(*DENSE, "dense.learning_rate=0.02")
    rates = {
        name.split(".")[0]: group["peak_lr"]
        for group in worker.optimizer.param_groups
        for name, one in worker.model.named_parameters()
        if any(one is other for other in group["params"])
    }
    assert rates == {"sam3": 1e-3, "dense_head": 0.02}


@acts("dense.threshold")
def test_threshold_decides_the_foreground(run):
    # Of an untrained head half of the pixels are above 0.5, none above 0.999.
    found = {
        threshold: lines_of(
            run(
                *FROZEN,
                "dense.mode=binary",
                f"dense.threshold={threshold}",
                "evaluation.every_epochs=1",
                "training.max_steps=1",
            ),
            "epoch",
        )[-1]["pixel_accuracy"]
        for threshold in (0.001, 0.999)
    }
    assert found[0.001] < 0.1
    assert found[0.999] > 0.9


@acts("data.vertical_flip")
def test_vertical_flip_turns_image_and_labels(shared):
    plain, turned = (first_batch(shared(*DENSE, f"data.vertical_flip={share}")) for share in (0, 1))
    assert np.array_equal(turned.images_NHWC, plain.images_NHWC[:, ::-1])
    assert np.array_equal(turned.label_maps, plain.label_maps[:, :, ::-1])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("dense.width=64",), "dense has no effect while task is detection"),
        (
            ("evaluation.best_metric=mean_iou", "evaluation.every_epochs=1"),
            "not measured with task detection: write map",
        ),
        ((*DENSE, "training.num_negatives=2"), "training.num_negatives has no effect with task dense"),
        ((*DENSE, "training.loss.mask=3"), "training.loss has no effect with task dense"),
        ((*DENSE, "evaluation.nms_iou=0.5"), "evaluation.nms_iou has no effect with task dense"),
        ((*DENSE, "data.exhaustive=false"), "data.exhaustive has no effect with task dense"),
        ((*DENSE, "training.max_prompts_per_forward=4"), "max_prompts_per_forward has no effect"),
        ((*DENSE, "evaluation.best_metric=map", "evaluation.every_epochs=1"), "write mean_iou"),
        (("task=dense",), "apply_to_detr_decoder has no effect with task dense"),
        (("task=dense", "lora={}"), "apply_to_vision_encoder is false"),
        ((*DENSE, "dense.adapter=none"), "lora has no effect while dense.adapter is none"),
        ((*DENSE, "dense.width=33"), "multiple of 32"),
        ((*DENSE, "dense.layers=[3,1]"), "ascending"),
        ((*DENSE, "dense.deep_supervision=[0,1,1]"), "first above 0"),
        ((*DENSE, "dense.mode=multilabel", "dense.foreground=[crack]"), "foreground has no effect with mode"),
    ],
)
def test_what_does_not_go_with_the_task_is_refused(overrides, words, settings):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        settings(*overrides)


def test_a_dense_run_in_bfloat16_ends_in_finite_weights(settings):
    result = train(settings(*DENSE, "training.mixed_precision=bf16"))
    from safetensors.torch import load_file

    tensors = load_file(result.last_adapter / "dense_head.safetensors")
    assert all(torch.isfinite(one).all() for one in tensors.values())
    assert {one.dtype for one in tensors.values()} == {torch.float32}
    assert load_config(result.output_dir / "config.yaml").task == "dense"
