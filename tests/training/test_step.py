"""However a step is divided - chunks of prompts, accumulated batches, workers - its gradient is the same."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sam3lora.data.batch import Batch
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.training.launch import train
from sam3lora.training.step import StepCounts, TermSums
from sam3lora.training.trainer import Trainer
from sam3lora.training.update import optimizer_step

from .forked_workers import run_workers
from .two_workers import make_trainer, recorded_step

TEXT_TOO = "lora.apply_to_text_encoder=true"
VISION_FROZEN = "lora.apply_to_vision_encoder=false"
NO_CLIPPING = "training.max_grad_norm=1e9"
NO_MASKS = [f"training.loss.{term}=0" for term in ("mask", "dice", "semantic", "semantic_dice")]
SOME_COMPLETE = "data.exhaustive=[gear, bolt]"


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert sum(bool(gradient.any()) for gradient in expected.values()) > 0.9 * len(expected)
    rounding = 1e-7 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error, largest = (actual[name] - gradient).abs().max().item(), gradient.abs().max().item()
        assert error <= 1e-5 * largest + rounding, f"{name} is off by {error:.3g} of {largest:.3g}"


def first_batch(trainer: Trainer):
    return next(trainer.batches.training_batches(0, 0))


def gradients_of(trainer: Trainer, max_prompts: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    batch = first_batch(trainer)
    trainer.runner.max_prompts = max_prompts
    trainer.model.zero_grad(set_to_none=True)
    total, terms = trainer.runner.backward(batch, StepCounts.of([batch]).normalizer())
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    return gradients, {"total": total.item(), **{name: value.item() for name, value in terms.items()}}


@pytest.mark.parametrize(
    "override", ["lora.rank=4", TEXT_TOO, VISION_FROZEN, SOME_COMPLETE], ids=["vision", "text", "frozen", "labels"]
)
def test_chunks_of_prompts(make_config, override):
    # One, two, three or all prompts at a time: the towers that the chunks share get the sum of their gradients.
    worker = make_trainer(make_config(override, num_negatives=-1))
    num_queries = first_batch(worker).num_queries
    assert num_queries >= 5
    expected, expected_terms = gradients_of(worker, num_queries)
    for max_prompts in (1, 2, 3):
        gradients, terms = gradients_of(worker, max_prompts)
        assert_same_gradients(gradients, expected)
        assert terms == pytest.approx(expected_terms, rel=1e-5, abs=1e-7)


def test_masks_are_unpacked_for_one_chunk_at_a_time(make_config, monkeypatch):
    # The largest part of a batch's memory depends on the prompts of a forward, not on those of the batch.
    worker, unpacked = make_trainer(make_config()), []
    of_targets = Batch.masks

    def spy(batch, *arguments):
        unpacked.append(len(masks := of_targets(batch, *arguments)))
        return masks

    monkeypatch.setattr(Batch, "masks", spy)
    batch = first_batch(worker)
    gradients_of(worker, 1)
    worker.runner.evaluate(batch, StepCounts.of([batch]).normalizer())
    assert unpacked == 2 * batch.num_B.tolist()
    assert max(unpacked) < sum(batch.num_B)


def test_a_rejected_word_is_taught(make_config):
    # The base puts the presence of every prompt far below the limit of -10, and the adapter still gets a gradient.
    worker = make_trainer(make_config("training.loss.ce=0", "training.loss.bbox=0", "training.loss.giou=0", *NO_MASKS))
    head = worker.runner.staged.model.detr_decoder.presence_head.layer3
    getattr(head, "base_layer", head).bias.data.fill_(-50.0)
    gradients, terms = gradients_of(worker, 8)
    assert terms["presence_loss"] > 5
    assert any(gradient.any() for gradient in gradients.values())


def test_chunks_with_boxes_only(make_config, monkeypatch):
    # A chunk without masks computes no mask terms; the other terms are the same.
    worker = make_trainer(make_config())
    decode = type(worker.batches).training_batches

    def without_masks(*arguments):
        for batch in decode(*arguments):
            batch.mask_valid_T[len(batch.mask_valid_T) // 2 :] = False
            yield batch

    monkeypatch.setattr(type(worker.batches), "training_batches", without_masks)
    expected, expected_terms = gradients_of(worker, 100)
    gradients, terms = gradients_of(worker, 1)
    assert_same_gradients(gradients, expected)
    assert terms == pytest.approx(expected_terms, rel=1e-5, abs=1e-7)


def test_accumulation_equals_the_large_batch(make_config):
    # 4 images at once, 2 x 2 and 4 x 1: the same images, one gradient, one set of logged terms.
    steps = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        config = make_config(NO_CLIPPING, batch_size=batch_size, gradient_accumulation_steps=accumulation)
        steps.append(recorded_step(make_trainer(config)))
    for step in steps[1:]:
        assert step.image_ids == steps[0].image_ids
        assert_same_gradients(step.gradients, steps[0].gradients)
        assert step.terms == pytest.approx(steps[0].terms, rel=1e-5, abs=1e-7)


def test_gradients_are_clipped_to_the_limit(make_config):
    # max_grad_norm bounds the norm over all parameters together, without turning the gradient.
    free, clipped = (recorded_step(make_trainer(make_config(max_grad_norm=limit))).gradients for limit in (1e9, 0.01))
    norm = torch.cat([gradient.flatten() for gradient in free.values()]).norm()
    assert norm > 0.1
    assert_same_gradients({name: gradient * (norm / 0.01) for name, gradient in clipped.items()}, free)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """Runs two processes with real collectives on a configuration; their reports and gradients."""

    def run(config) -> tuple[list[dict], list[dict[str, Tensor]]]:
        scratch = tmp_path_factory.mktemp("workers")
        (scratch / "config.yaml").write_text(config.to_yaml())
        run_workers("two_workers", 2, scratch)
        reports = [json.loads((scratch / f"report_{rank}.json").read_text()) for rank in (0, 1)]
        return reports, [load_file(scratch / f"gradients_{rank}.safetensors") for rank in (0, 1)]

    return run


@pytest.mark.slow
def test_two_workers_equal_one(make_config, two_workers):
    # Two workers of 2 images have the gradients, terms, validation loss and metrics of one worker of 4 images, where
    # labels are complete for two of four categories. Where one of them meets a loss that is not finite, both stop
    # before their weights part; where one of them gets SIGTERM, both know after the same step.
    reports, gradients = two_workers(make_config(NO_CLIPPING, SOME_COMPLETE, output="two", batch_size=2))
    alone = make_trainer(make_config(NO_CLIPPING, SOME_COMPLETE, output="one", batch_size=4))
    step, valid = recorded_step(alone), alone.validator.loss_terms()
    metrics = alone.validator.metrics()
    assert reports[0]["image_ids"] + reports[1]["image_ids"] == step.image_ids
    for rank in (0, 1):
        assert_same_gradients(gradients[rank], step.gradients)
        assert reports[rank]["terms"] == pytest.approx(step.terms, rel=1e-5, abs=1e-7)
        assert reports[rank]["valid"] == pytest.approx(valid.means(), rel=1e-5, abs=1e-7)
        assert reports[rank]["metrics"] == pytest.approx(metrics, rel=1e-5, abs=1e-7)
        assert reports[rank]["valid_loss"] == pytest.approx(valid.loss(), rel=1e-5)
        assert f"not finite at step 1: images {reports[1]['image_ids']} with" in reports[rank]["failure"]
        assert reports[rank]["run_ends"]


@pytest.fixture
def encoded(monkeypatch) -> Counter:
    """Passes and rows of the towers: `text_passes`, `text_rows`, `vision_passes`, `vision_rows`."""
    counts: Counter = Counter()
    for kind, method in (("text", "encode_text"), ("vision", "encode_images")):
        original = getattr(StagedSam3, method)

        def counted(staged, inputs, *others, kind=kind, original=original):
            counts.update({f"{kind}_passes": 1, f"{kind}_rows": len(inputs)})
            return original(staged, inputs, *others)

        monkeypatch.setattr(StagedSam3, method, counted)
    return counts


def test_frozen_text_is_encoded_once_a_run(make_config, encoded):
    # 2 epochs over 4 categories and a negative prompt: five prompts once, and one vision pass for each batch, however
    # many chunks of prompts: 3 training and 2 validation batches an epoch, and the validation of the base.
    train(make_config("data.negative_prompts=[zebra]", max_prompts_per_forward=1))
    assert encoded == {"text_passes": 1, "text_rows": 5, "vision_passes": 12, "vision_rows": 2 * (6 + 3) + 3}


def test_learning_text_is_encoded_once_a_batch(make_config, encoded):
    # An adapted text tower is run for every batch, once for each distinct prompt in it.
    worker = make_trainer(make_config(TEXT_TOO, num_negatives=-1))
    batch = first_batch(worker)
    gradients_of(worker, 1)
    assert encoded["text_passes"] == 1
    assert encoded["text_rows"] == len(set(batch.prompts_B)) < batch.num_queries


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_vision_keeps_no_graph(make_config, monkeypatch, frozen):
    # Without a vision adapter nothing of the tower is kept for the backward pass; with one, its graph is there.
    worker = make_trainer(make_config("training.feature_cache=false", *[VISION_FROZEN] * frozen))
    maps = []
    original = StagedSam3.encode_images

    def spy(staged, pixel_values):
        maps.extend((features := original(staged, pixel_values)).maps_ICHW)
        return features

    monkeypatch.setattr(StagedSam3, "encode_images", spy)
    gradients_of(worker, 2)
    assert [features.grad_fn is None for features in maps] == [frozen] * 3


def test_evaluation_has_the_terms_of_training(make_config):
    # The same batch gives the same terms with and without gradients, in any number of chunks.
    worker = make_trainer(make_config())
    batch = first_batch(worker)
    _, trained = gradients_of(worker, 100)
    worker.runner.max_prompts = 2
    evaluated = worker.runner.evaluate(batch, StepCounts.of([batch]).normalizer())
    assert {name: value.item() for name, value in evaluated.items()} == pytest.approx(
        {name: value for name, value in trained.items() if name != "total"}, rel=1e-5, abs=1e-7
    )


def test_validation_is_without_dropout(make_config):
    # The same weights give the same validation loss, whatever the seed, also after a training step, where dropout acts.
    worker = make_trainer(make_config("lora.dropout=0.5"))
    worker.optimizer.step = lambda: None
    first = worker.validator.loss_terms().means()
    terms = []
    for worker.state.step in (0, 1):  # the seed of dropout
        batch = first_batch(worker)
        terms.append(optimizer_step(worker, [batch])[0])
        assert worker.validator.loss_terms().means() == first
    assert terms[0] != pytest.approx(terms[1], rel=1e-3)


def test_checkpointing_and_bfloat16_reach_the_loss(make_config):
    # Both are on by one key each: checkpointing changes nothing, bfloat16 little.
    plain, _ = gradients_of(make_trainer(make_config()), 2)
    worker = make_trainer(make_config("training.gradient_checkpointing=true"))
    worker.model.train()
    recomputed, _ = gradients_of(worker, 2)
    assert_same_gradients(recomputed, plain)
    half, _ = gradients_of(make_trainer(make_config("training.mixed_precision=bf16")), 2)
    ours, theirs = (torch.cat([gradient.flatten() for gradient in all_.values()]) for all_ in (half, plain))
    assert not torch.equal(ours, theirs)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95


def test_term_sums_are_means_over_steps():
    # By hand: 10 boxes of loss 0.5 and 30 of 0.1 have the mean 0.2; presence counts queries, semantic its own.
    from sam3lora.losses import LossSection

    sums = TermSums(LossSection().by_term())
    sums.add({"loss_bbox": 0.5, "presence_loss": 1.0, "loss_semantic_dice": 0.5}, StepCounts(2, 10, 1))
    sums.add({"loss_bbox": 0.1, "presence_loss": 0.0, "loss_semantic_dice": 0.0}, StepCounts(6, 30, 0))
    expected = {"loss_bbox": 0.2, "presence_loss": 0.25, "loss_semantic_dice": 0.5}
    assert sums.means() == pytest.approx(expected)
    assert sums.loss() == pytest.approx(5 * 0.2 + 20 * 0.25 + 30 * 0.5)
