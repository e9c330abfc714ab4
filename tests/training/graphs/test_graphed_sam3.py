"""Steps of the stages as graphs, beside steps without graphs."""

from __future__ import annotations

import pytest
import torch
from transformers import Sam3Config

from jobs.bench.models import CONFIGS
from jobs.bench.our_training import OurSettings, make_runner
from jobs.bench.recorded_graphs import RecordingCapturer
from jobs.bench.training_work import TrainingWork, gradients, normalizer, tokenizer
from sam3lora.model import checkpointing as checkpointing_module
from sam3lora.model.adapter import keyed_dropout
from sam3lora.model.components import COMPONENTS
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.training.graphs.graphed_sam3 import GraphedSam3

from ...model.conftest import small_config

MODEL = "as small as in tests"
IN_GRAPHS = tuple(name for name in COMPONENTS if name != "text_encoder")


@pytest.fixture(autouse=True)
def _small_model(monkeypatch):
    def config() -> Sam3Config:
        return small_config(text_config=small_config().text_config.to_dict() | {"vocab_size": len(tokenizer())})

    monkeypatch.setitem(CONFIGS, MODEL, config)


def losses_and_gradients(work, capturer, *, max_prompts, checkpointing=(), evaluations=3):
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
    for _ in range(evaluations):
        terms = runner.evaluate(batch, normalizer(batch))
        found.append((float(sum(terms.values())), torch.stack(list(terms.values()))))
    return found


def assert_same(mine, others):
    for (loss, values), (expected_loss, expected) in zip(mine, others, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("preset", "checkpointing", "max_prompts"),
    [("light", (), 4), ("full", ("vision_encoder",), 8)],
    ids=["frozen trunk", "recomputed trunk"],
)
def test_gradients_are_those_without_graphs(preset, checkpointing, max_prompts):
    # 6 find queries: a chunk of 4 and one of 2, or one of 6 that is padded to 8.
    work = TrainingWork(preset, MODEL, num_images=2, num_prompts=3, dropout=0.0, geometry_cls=True)
    capturer = RecordingCapturer()
    options = {"max_prompts": max_prompts, "checkpointing": checkpointing}
    plain = losses_and_gradients(work, None, **options)
    mine = losses_and_gradients(work, capturer, **options)
    assert_same(mine, plain)
    assert capturer.num_replays > 20


def test_recomputed_layers_draw_their_dropout_again(monkeypatch):
    # 4 find queries, 2 of them with masks: nothing is padded, so that all dropout is drawn for the same values.
    work = TrainingWork("full", MODEL, num_images=2, num_prompts=2, dropout=0.3, geometry_cls=True)
    options = {"max_prompts": 4, "checkpointing": IN_GRAPHS, "evaluations": 0}
    capturer = RecordingCapturer()
    mine = losses_and_gradients(work, capturer, **options)
    # the same without a graph and with nothing computed again
    monkeypatch.setattr(checkpointing_module, "checkpoint", lambda function, *arguments, **_: function(*arguments))
    monkeypatch.setattr(capturer, "capture", lambda function: 1 / 0)
    assert_same(mine, losses_and_gradients(work, capturer, **options))
    assert capturer.num_replays > 10


@pytest.mark.parametrize(("dropout", "num_captures"), [(0.0, 2), (0.3, 0)])
def test_the_layers_after_kept_tokens_are_a_graph_if_they_repeat(dropout, num_captures, monkeypatch):
    monkeypatch.setattr(keyed_dropout, "stateless", None)  # an older torch, which cannot draw dropout again in a graph
    work = TrainingWork("full", MODEL, dropout=dropout)
    model, capturer = work.adapted_model(), RecordingCapturer()
    graphed = make_runner(work, model, OurSettings(("vision_encoder",)), capturer=capturer).staged
    plain = StagedSam3(graphed.model)
    pixels = torch.randn(1, 3, work.resolution, work.resolution, generator=torch.Generator().manual_seed(0))
    for number in range(3):
        found = []
        with torch.no_grad():
            tokens = plain.encode_trunk(pixels + number, 2)
        for staged in (plain, graphed):
            torch.manual_seed(number)
            vision = staged.encode_rest(tokens, 2)
            sum(one.square().mean() for one in vision.maps_ICHW).backward()
            found.append([*vision.maps_ICHW, *vision.positions_1CHW, gradients(model)])
            model.zero_grad()
        torch.testing.assert_close(found[0], found[1])
    assert capturer.num_captures == num_captures


@pytest.mark.parametrize(("preset", "checkpointing"), [("light", ()), ("full", ("vision_encoder",))])
def test_steps_in_bfloat16_see_each_update(preset, checkpointing):
    work = TrainingWork(preset, MODEL, num_prompts=2, dropout=0.0, geometry_cls=True, precision="bf16")

    def train(capturer):
        model = work.adapted_model()
        runner = make_runner(work, model, OurSettings(checkpointing), capturer=capturer)
        batch, found = work.batch(), []
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            total = runner.backward(batch, normalizer(batch))[0].item()
            found.append((total, gradients(model)))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
                        parameter.grad = None
        return found

    plain, mine = train(None), train(RecordingCapturer())
    for (loss, values), (expected_loss, expected) in zip(mine, plain, strict=True):
        assert loss == pytest.approx(expected_loss, rel=0.01)
        assert torch.cosine_similarity(values, expected, dim=0) > 0.999
    assert torch.cosine_similarity(plain[2][1], plain[4][1], dim=0) < 0.99  # so what was captured is not enough
