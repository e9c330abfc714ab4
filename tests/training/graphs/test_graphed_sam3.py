"""Steps of the stages as graphs, beside steps without graphs."""

from __future__ import annotations

import pytest
import torch

from jobs.bench.our_training import OurSettings, make_runner
from jobs.bench.recorded_graphs import RecordingCapturer
from jobs.bench.training_work import TrainingWork, gradients, normalizer
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.training.graphs.graphed_sam3 import GraphedSam3


def losses_and_gradients(work, capturer, *, max_prompts, checkpointing=()):
    model = work.adapted_model()
    runner = make_runner(work, model, OurSettings(checkpointing, max_prompts), capturer=capturer)
    assert isinstance(runner.staged, GraphedSam3 if capturer else StagedSam3)
    found = []
    for number in range(3):
        for parameter in model.parameters():
            parameter.grad = None
        torch.manual_seed(number)
        batch = work.batch(first_image=2 * number)
        total, _ = runner.backward(batch, normalizer(batch))
        found.append((total.item(), gradients(model)))
    for _ in range(3):
        terms = runner.evaluate(batch, normalizer(batch))
        found.append((float(sum(terms.values())), torch.stack(list(terms.values()))))
    return found


@pytest.mark.parametrize(
    ("preset", "checkpointing", "max_prompts"),
    [("light", (), 4), ("full", ("vision_encoder",), 8)],
    ids=["frozen trunk", "recomputed trunk"],
)
def test_gradients_are_those_without_graphs(preset, checkpointing, max_prompts):
    # 6 find queries: a chunk of 4 and one of 2, or one of 6 that is padded to 8.
    work = TrainingWork(preset, "tiny", num_images=2, num_prompts=3, dropout=0.0, geometry_cls=True)
    capturer = RecordingCapturer()
    options = {"max_prompts": max_prompts, "checkpointing": checkpointing}
    plain = losses_and_gradients(work, None, **options)
    mine = losses_and_gradients(work, capturer, **options)
    for (loss, values), (expected_loss, expected) in zip(mine, plain, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert capturer.num_replays > 20


@pytest.mark.parametrize(("preset", "checkpointing"), [("light", ()), ("full", ("vision_encoder",))])
def test_steps_in_bfloat16_see_each_update(preset, checkpointing):
    work = TrainingWork(preset, "tiny", num_prompts=2, dropout=0.0, geometry_cls=True, precision="bf16")

    def train(capturer):
        model = work.adapted_model()
        runner = make_runner(work, model, OurSettings(checkpointing), capturer=capturer)
        batch, found = work.batch(), []
        torch.manual_seed(0)
        for _ in range(5):
            total = runner.backward(batch, normalizer(batch))[0].item()
            found.append((total, gradients(model)))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=0.02)
                        parameter.grad = None
        return found

    plain, mine = train(None), train(RecordingCapturer())
    for (loss, values), (expected_loss, expected) in zip(mine, plain, strict=True):
        assert loss == pytest.approx(expected_loss, rel=0.01)
        assert torch.cosine_similarity(values, expected, dim=0) > 0.999
    assert torch.cosine_similarity(plain[2][1], plain[4][1], dim=0) < 0.99  # so what was captured is not enough
