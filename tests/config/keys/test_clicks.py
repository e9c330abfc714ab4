"""Keys of `clicks`."""

from __future__ import annotations

import pytest
import torch

from sam3lora.errors import UserError
from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora, save_adapter
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.loading import load_base
from sam3lora.training.clicks.objects import click_targets
from tests.model.clicks.click_bases import write_click_base

from .conftest import acts, first_batch, loss_terms

CLICKS = ("task=clicks", "lora.apply_to_detr_decoder=false")


@pytest.fixture(scope="module")
def worker_of(shared, small_base, tmp_path_factory):
    """`worker_of("clicks.iterations=1")` -> a worker of task clicks."""
    folder = write_click_base(tmp_path_factory.mktemp("clicks") / "base", small_base)
    return lambda *overrides: shared(*CLICKS, f"model.name={folder}", *overrides)


def starts_of(worker) -> set[str]:
    batch = first_batch(worker)
    objects = [
        one for seed in range(20) for one in click_targets(batch, worker.runner.starts, seed, torch.device("cpu"))
    ]
    return {one.start for one in objects}


@acts("clicks.iterations")
def test_iterations_are_correcting_clicks(worker_of):
    # Every prediction adds its loss, and the first one is the same.
    losses = [sum(loss_terms(worker_of(f"clicks.iterations={number}")).values()) for number in (0, 1, 3)]
    assert losses[0] < losses[1] < losses[2]


@acts("clicks.starts.click", "clicks.starts.box", "clicks.starts.mask", "clicks.starts.mask_and_box")
@pytest.mark.parametrize("start", ["click", "box", "mask", "mask_and_box"])
def test_starts_have_the_given_shares(start, worker_of):
    shares = dict.fromkeys(("click", "box", "mask", "mask_and_box"), 0) | {start: 1}
    given = ", ".join(f"{name}: {share}" for name, share in shares.items())
    assert starts_of(worker_of(f"clicks.starts={{{given}}}")) == {start}
    assert starts_of(worker_of()) == {"click", "box"}


@acts("clicks.loss.focal", "clicks.loss.dice", "clicks.loss.iou", "clicks.loss.object")
@pytest.mark.parametrize("term", ["focal", "dice", "iou", "object"])
def test_a_term_of_the_loss_has_the_given_weight(term, worker_of):
    plain, heavier = worker_of().runner.weights, worker_of(f"clicks.loss.{term}=7").runner.weights
    assert heavier == {**plain, f"click_{term}": 7.0}


@acts("clicks.objects_per_image")
def test_objects_of_an_image_are_bounded(worker_of):
    # Image 0 has four objects.
    most = [
        first_batch(worker_of("training.batch_size=4", f"clicks.objects_per_image={n}")).num_B.sum() for n in (1, 16)
    ]
    assert most[0] == len(first_batch(worker_of("training.batch_size=4", "clicks.objects_per_image=1")).image_ids)
    assert most[1] > most[0]


@acts("clicks.vision_adapter")
def test_vision_adapter_changes_the_trunk_under_the_clicks(worker_of, small_base, tmp_path):
    base = load_base(str(small_base))
    lora = LoraSettings(rank=2, target_modules=("q_proj",), components=("vision_encoder",))
    model = apply_lora(base.model, lora)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = save_adapter(model, tmp_path / "trunk", AdapterMetadata(base_fingerprint=base.fingerprint))
    plain, adapted = worker_of(), worker_of(f"clicks.vision_adapter={folder}")
    assert plain.metadata.clicks["vision_adapter"] is None
    assert len(adapted.metadata.clicks["vision_adapter"]) == 64
    assert [name for name, one in adapted.model.named_parameters() if one.requires_grad] == [
        name for name, one in plain.model.named_parameters() if one.requires_grad
    ]
    pixels = torch.zeros(1, 3, base.resolution, base.resolution)
    pixels[..., 20:50, 20:50] = 1
    ours, theirs = (worker.runner.images.whole(pixels).coarse for worker in (plain, adapted))
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("clicks.iterations=1",), "clicks has no effect while task is detection"),
        (("task=clicks",), "apply_to_detr_decoder has no effect with task clicks"),
        ((*CLICKS, "dense.width=64"), "dense has no effect while task is clicks"),
        ((*CLICKS, "lora.apply_to_mask_decoder=true"), "apply_to_mask_decoder has no effect with task clicks"),
        ((*CLICKS, "training.num_negatives=2"), "training.num_negatives has no effect with task clicks"),
        ((*CLICKS, "training.loss.mask=3"), "training.loss has no effect with task clicks"),
        ((*CLICKS, "training.gradient_checkpointing=true"), "gradient_checkpointing has no effect"),
        ((*CLICKS, "evaluation.threshold=0.2"), "evaluation.threshold has no effect with task clicks"),
        ((*CLICKS, "training.max_prompts_per_forward=4"), "max_prompts_per_forward has no effect"),
        ((*CLICKS, "evaluation.best_metric=map", "evaluation.every_epochs=1"), "write mean_iou_3"),
        (("evaluation.best_metric=noc_85", "evaluation.every_epochs=1"), "not measured with task detection: write map"),
        ((*CLICKS, "clicks.objects_per_image=33"), "clicks.objects_per_image"),
        ((*CLICKS, "clicks.starts={click: 0, box: 0}"), "all shares are 0"),
        ((*CLICKS, "clicks.loss={focal: 0, dice: 0}"), "no mask is learned"),
        ((*CLICKS, "clicks.loss.dice=-1"), "clicks.loss.dice"),
    ],
)
def test_what_does_not_go_with_the_task_is_refused(overrides, words, settings):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        settings(*overrides)
