"""Ours and the plain way train the same thing, and what the benchmarks tell about it. Times decide nothing here."""

from __future__ import annotations

import pytest
import torch

from jobs.bench.feature_cache import compare_feature_cache
from jobs.bench.our_training import OurSettings, make_runner, our_step
from jobs.bench.plain_training import PlainTraining
from jobs.bench.training import compare_train_step
from jobs.bench.training_work import TrainingWork, criterion, gradients, normalizer, tokenizer
from sam3lora.errors import UserError


@pytest.mark.parametrize(("preset", "whole_images"), [("light", True), ("full", False)])
def test_the_plain_way_has_our_loss_and_gradients(preset, whole_images):
    work = TrainingWork(preset, "tiny", num_images=2, num_prompts=2, dropout=0.0)
    model, batch = work.adapted_model(), work.batch()
    plain = PlainTraining(model, tokenizer(), criterion(work), whole_images=whole_images)
    expected_loss = float(plain.backward(batch, normalizer(batch)))
    expected = gradients(model)
    assert expected.abs().max() > 0
    model.zero_grad(set_to_none=True)
    loss, _ = make_runner(work, model, OurSettings(same_loss=True)).backward(batch, normalizer(batch))
    assert float(loss) == pytest.approx(expected_loss, rel=1e-4)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-2, atol=1e-4 * float(expected.abs().max()))


def test_a_batch_has_present_and_absent_prompts_and_exact_boxes():
    batch = TrainingWork("light", "tiny", num_images=3, num_prompts=4).batch(first_image=5)
    assert (batch.num_images, batch.num_queries) == (3, 12)
    assert len(set(batch.prompts_B[:4])) == 4
    assert batch.num_B.reshape(3, 4)[:, 0].all()
    assert not batch.num_B.reshape(3, 4)[:, -1].any()
    masks_THW = batch.masks()
    assert masks_THW is not None
    for mask, (x, y, width, height) in zip(masks_THW, batch.boxes_cxcywh_T4 * masks_THW.shape[-1], strict=True):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert (columns[0], columns[-1] + 1) == (pytest.approx(x - width / 2), pytest.approx(x + width / 2))
        assert (rows[0], rows[-1] + 1) == (pytest.approx(y - height / 2), pytest.approx(y + height / 2))


def test_the_same_number_is_the_same_image():
    work = TrainingWork("light", "tiny", num_prompts=2)
    assert torch.equal(work.batch(first_image=3).images_NHWC, work.batch(first_image=3).images_NHWC)
    assert not torch.equal(work.batch(first_image=3).images_NHWC, work.batch(first_image=4).images_NHWC)


def test_a_step_changes_the_adapter_and_leaves_no_gradient():
    work = TrainingWork("light", "tiny", num_prompts=1)
    model = work.adapted_model()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in adapter]
    assert our_step(work, model, make_runner(work, model))(work.batch()) > 0
    assert any(not torch.equal(old, new) for old, new in zip(before, adapter, strict=True))
    assert all(parameter.grad is None for parameter in adapter)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"model": "huge"}, "one of tiny, small, facebook/sam3, got 'huge'"), ({"num_prompts": 0}, "at least 1, got 0")],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(UserError, match=message):
        compare_train_step("light", **wrong)


def test_epochs_that_cannot_be_compared():
    with pytest.raises(UserError, match="at least 2, as the first one fills the cache, got 1"):
        compare_feature_cache(epochs=1)
    with pytest.raises(UserError, match="preset full adapts the vision encoder"):
        compare_feature_cache(preset="full")


@pytest.mark.slow
def test_a_step_beside_the_plain_way():
    found = compare_train_step("light", model="tiny", num_prompts=2, rounds=1, variants=True)
    names = [way.name for way in found.ways]
    assert names[:3] == ["sam3lora", "sam3lora, same loss", "transformers + PEFT"]
    assert "sam3lora, checkpointing all, 1 prompt at a time" in names
    facts = found.facts
    assert facts["loss, sam3lora, same loss"] == pytest.approx(facts["loss, transformers + PEFT"], rel=1e-4)
    assert facts["cosine of both gradients"] > 0.999
    for name in names:
        assert facts["images/s"][name] > 0
        assert facts["peak memory with the weights, MiB"][name] > 0
    tensors = facts["peak of the tensors of a step, MiB"]
    assert tensors["sam3lora, checkpointing all, 1 prompt at a time"] < tensors["sam3lora, no checkpointing"]
    assert tensors["transformers + PEFT"] < tensors["transformers + PEFT, an image's prompts at once"]


@pytest.mark.slow
def test_epochs_with_a_cache_beside_the_plain_way():
    first, later = compare_feature_cache(model="tiny", num_images=3, num_prompts=2, epochs=2)
    assert [way.name for way in first.ways] == ["sam3lora", "sam3lora, nothing kept", "transformers + PEFT"]
    assert first.facts["passes of the vision trunk"] == {"sam3lora": 3, "sam3lora, nothing kept": 3}
    assert later.facts["passes of the vision trunk"] == {"sam3lora": 0, "sam3lora, nothing kept": 3}
    assert later.facts["largest relative difference of an epoch's loss, kept and not"] < 1e-4
    side = 224 // 14
    width = 4  # bytes of a float32
    assert later.facts["MB kept of an image"] >= side * side * width / 1e6
