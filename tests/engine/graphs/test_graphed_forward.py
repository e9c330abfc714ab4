"""With captured stages an engine finds what it finds without: every number of rows, adapter, box and image."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.bench.pretend_gpu import pretend_gpu
from jobs.bench.recorded_graphs import RecordingCapturer
from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.detections import BoxPrompt
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.forward import MixedForward
from sam3lora.engine.graphs.capture import SWITCH
from sam3lora.engine.graphs.forward import GraphedForward

from ..engine_cases import EVERY, make_engine, make_images, write_adapter, write_adapters
from ..test_engine import ask, assert_same, differ, diverged, prompted_by_all

BOXES = tuple(BoxPrompt((2.0 + n, 3.0, 20.0 + n, 30.0), label=n % 2) for n in range(9))
PROMPTS = tuple(f"thing {number}" for number in range(12))
OPTIONS = {"max_rows": 8, "max_images": 3, "image_cache_bytes": 0, "max_cached_prompts": 0}  # no stage is left out


class Graphed:
    """An engine with recorded graphs beside a plain one, with the same adapters."""

    def __init__(self, base: Path, adapters: dict[str, Path], **options) -> None:
        self.capturer = RecordingCapturer()
        self.plain, self.slots = make_engine(base, adapters, **OPTIONS | options)
        self.engine, _ = make_engine(base, adapters, capturer=self.capturer, **OPTIONS | options)

    def check(self, questions: list[PromptedImage], turns: int = 3, atol: float = 1e-5) -> None:
        """The same as plain when a shape is new, when it is captured, and when it is repeated."""
        expected = ask(self.plain, questions)
        for _ in range(turns):
            assert_same(ask(self.engine, questions), expected, atol)

    def image(self, number: int = 0):
        return self.plain.prepare_image(make_images(4)[number], f"image {number}")

    def question(self, *prompts: str, image: int = 0, slot: str | None = None, **options) -> PromptedImage:
        return PromptedImage(self.image(image), prompts, slot=self.slots[slot], **{"post": EVERY} | options)


@pytest.fixture(scope="module")
def adapters(spread_base, tmp_path_factory) -> dict[str, Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"), spread_base)


@pytest.fixture(scope="module")
def every(spread_base, adapters) -> Graphed:
    """With all adapters."""
    return Graphed(spread_base, adapters)


@pytest.fixture
def bare(spread_base) -> Graphed:
    """Without adapters."""
    return Graphed(spread_base, {})


def test_a_cpu_has_no_graphs(spread_base):
    assert isinstance(make_engine(spread_base, {})[0]._forward, MixedForward)
    assert isinstance(make_engine(spread_base, {}, capturer=RecordingCapturer())[0]._forward, GraphedForward)


def test_a_gpu_has_them_unless_it_trains_or_somebody_says_no(spread_base, monkeypatch):
    monkeypatch.setattr("sam3lora.engine.engine.CudaCapturer", lambda device: RecordingCapturer())
    monkeypatch.delenv(SWITCH, raising=False)

    def kind(**options) -> type:
        return type(Engine.load(str(spread_base), device="cuda", precision="float32", **options)._forward)

    with pretend_gpu():
        assert kind() is GraphedForward
        assert kind(in_training=True) is kind(cuda_graphs=False) is MixedForward
        monkeypatch.setenv(SWITCH, "0")
        assert kind() is MixedForward
        assert kind(cuda_graphs=True) is GraphedForward


@pytest.mark.parametrize("graphs", [True, False])
def test_what_a_gpu_does_gives_what_a_cpu_gives(spread_base, adapters, graphs):
    # Uploads, downloads and overlaps of masks go other ways there.
    two = {name: adapters[name] for name in ("text", "vision")}
    plain, slots = make_engine(spread_base, two, **OPTIONS)
    post = PostProcessing(threshold=0.0, nms="mask", nms_iou=0.3)
    pixels = make_images(1)[0]

    def questions(engine: Engine) -> list[PromptedImage]:
        image = engine.prepare_image(pixels, "image")
        asked = PromptedImage(image, ("crack", "hole", "leaf"), slot=slots["text"], post=post)
        few = replace(asked, slot=slots["vision"], post=post.changed(max_detections=2, nms="box"), boxes=BOXES[:2])
        return [asked, few, replace(asked, slot=None, post=post.changed(merge=True))]

    expected = ask(plain, questions(plain))
    with pretend_gpu():
        capturer = RecordingCapturer()
        options = {"capturer": capturer if graphs else None, "cuda_graphs": graphs, "precision": "float32"} | OPTIONS
        engine = Engine.load(str(spread_base), device="cuda", **options)
        for name in two:
            engine.place_adapter(slots[name], engine.read_adapter(two[name]))
        for _ in range(3 if graphs else 1):
            assert_same(ask(engine, questions(engine)), expected)
        assert (capturer.num_replays > 0) == graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs: needs a GPU")
def test_cuda_graphs_give_what_single_launches_give(spread_base, adapters):
    two = {name: adapters[name] for name in ("text", "vision")}
    options = {"device": "cuda", "precision": "float32", "num_slots": 4} | OPTIONS
    engines = [Engine.load(str(spread_base), cuda_graphs=graphs, **options) for graphs in (False, True)]
    pixels = make_images(2)

    def check(*slots: int | None) -> None:
        for num_prompts in (1, 3, 8):
            for _ in range(3):  # new, captured, repeated
                plain, graphed = (
                    ask(
                        engine,
                        [
                            PromptedImage(
                                engine.prepare_image(pixels[number % 2], f"image {number % 2}"),
                                PROMPTS[:num_prompts],
                                BOXES[:number],
                                slot,
                                PostProcessing(threshold=0.0),
                            )
                            for number, slot in enumerate(slots)
                        ],
                    )
                    for engine in engines
                )
                assert_same(graphed, plain, atol=1e-4)

    check(None, None)
    for slot, name in enumerate(two):
        for engine in engines:
            engine.place_adapter(slot, engine.read_adapter(two[name]))
    check(0, None, 1)
    for engine in engines:  # the adapters' memory moves, and captures of before go
        engine.place_adapter(2, engine.read_adapter(adapters["detector"]))
    check(2, 0, 1)
    for engine in engines:
        engine.clear_adapter(0)
        engine.drop_features()
    check(2, None, 1)
    assert all(stage._replays for stage in engines[1]._forward.stages)


def test_any_number_of_prompts_is_as_plain(bare):
    # 1, 2, 3 (padded to 4), 8, and 12 (8 and 4)
    for num_prompts in (1, 2, 3, 8, 12):
        bare.check([bare.question(*PROMPTS[:num_prompts])])
    captured = bare.capturer.num_captures
    assert captured
    # from now on every shape is known
    for num_prompts in (5, 4, 11, 1):
        bare.check([bare.question(*PROMPTS[:num_prompts])], turns=1)
    assert bare.capturer.num_captures == captured


def test_a_program_that_asks_once_captures_nothing(bare):
    bare.check([bare.question("crack", "hole")], turns=1)
    assert bare.capturer.num_captures == 0


def test_every_adapter_in_every_mixture_and_order(every):
    images = make_images(4)
    questions = prompted_by_all(every.plain, images, every.slots)
    every.check(questions)
    # other mixtures of the same numbers of rows are no new shapes
    generator = np.random.default_rng(0)
    every.check([questions[place] for place in generator.permutation(len(questions))], turns=2)
    captured = every.capturer.num_captures
    every.check([questions[place] for place in generator.permutation(len(questions))], turns=1)
    assert every.capturer.num_captures == captured


def test_an_adapter_takes_the_place_of_another_in_the_same_graphs(spread_base, adapters, tmp_path):
    name = "text"
    other = write_adapter(tmp_path / "other", spread_base, name, seed=9)
    both = Graphed(spread_base, {name: adapters[name]})
    question = both.question("crack", slot=name)
    both.check([question])
    before, captured = ask(both.engine, [question]), both.capturer.num_captures
    for engine in (both.plain, both.engine):
        engine.place_adapter(0, engine.read_adapter(other))
    both.check([question])
    assert both.capturer.num_captures == captured
    assert differ(before[0], ask(both.engine, [question])[0])
    # the base was never touched, and is asked beside the adapter
    both.check([question, both.question("crack")])


def test_more_adapters_larger_ranks_and_none_at_all(spread_base, adapters):
    # each moves the adapters' memory or takes hooks away, and none may run a graph of the time before
    both = Graphed(spread_base, {"text": adapters["text"]}, num_slots=4)
    question = both.question("crack", "hole", slot="text")
    both.check([question])
    for slot, name in ((1, "no cls"), (2, "detector")):
        for engine in (both.plain, both.engine):
            engine.place_adapter(slot, engine.read_adapter(adapters[name]))
        both.check([question, replace(question, slot=slot)])
    captured = both.capturer.num_captures
    for engine in (both.plain, both.engine):
        engine.clear_adapter(1)
    both.check([question, replace(question, slot=2)])
    assert both.capturer.num_captures > captured
    for engine in (both.plain, both.engine):
        engine.clear_adapter(0)
        engine.clear_adapter(2)
    both.check([replace(question, slot=None)])


def test_boxes_few_and_many(every):
    for num_boxes in (1, 6, 7):
        shown = every.question("crack", "hole", boxes=BOXES[:num_boxes], slot="geometry")
        every.check([shown, every.question("crack", slot="text"), replace(shown, boxes=BOXES[:1], slot=None)])
    # the tokens of boxes are gone when nobody shows any
    every.check([every.question("crack", "hole", slot="geometry"), every.question("crack")])
    every.check([every.question(boxes=BOXES[:2])])  # no text


def test_images_of_different_numbers_of_prompts(every):
    for asked in ((1, 3), (1, 1, 1, 1)):
        questions = [
            every.question(*PROMPTS[:num], image=image, slot="vision" if image == 1 else None)
            for image, num in enumerate(asked)
        ]
        every.check(questions)


@pytest.mark.parametrize(
    "settings",
    [
        {"nms": "mask", "nms_iou": 0.3},
        {"nms": "mask", "merge": True, "merge_iou": 0.2},
        {"nms": "box", "nms_iou": 0.3},
        {"nms": "mask", "max_detections": 2},
    ],
)
def test_selection_is_as_plain(every, settings):
    scores = ask(every.plain, [every.question("crack")])[0][0].scores_N
    post = PostProcessing(**{"threshold": float(scores[5])} | settings)
    # some have many detections, some few, one none; not everybody wants masks
    questions = [
        every.question("crack", "hole", post=post),
        every.question("leaf", post=post, masks=False),
        every.question("crack", post=post.changed(threshold=1.0)),
        every.question("leaf", "hole", image=1, post=EVERY),
    ]
    every.check(questions)
    found = ask(every.engine, questions)
    assert len(found[0][0].scores_N) > 0
    assert len(found[2][0].scores_N) == 0


def test_nothing_found_makes_no_masks(bare):
    nothing = bare.question("crack", "hole", post=PostProcessing(threshold=1.0))
    bare.check([nothing])
    assert bare.engine._forward._masks.stage.controls_BF.eq(0).all()


def test_bfloat16_is_as_plain_in_bfloat16(spread_base, adapters):
    both = Graphed(spread_base, {"vision": adapters["vision"]}, precision="bfloat16")
    both.check([both.question("crack", "hole", "leaf", slot="vision"), both.question("crack")], atol=0.02)


def test_a_diverged_adapter_leaves_nothing_behind(spread_base, adapters):
    both = Graphed(spread_base, {"text": adapters["text"], "geometry": adapters["geometry"]}, num_slots=3)
    both.engine.place_adapter(2, diverged(both.engine.read_adapter(adapters["geometry"])))
    fine = both.question("crack", "hole")
    for _ in range(3):
        (failed,) = both.engine.detect_small([replace(fine, slot=2, boxes=BOXES[:2])])
        assert isinstance(failed, Exception)
        both.check([fine, both.question("crack", slot="text")], turns=1)


class _NoMemory(RecordingCapturer):
    def capture(self, function):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def test_without_captures_the_same_is_found(spread_base, caplog):
    both = Graphed(spread_base, {})
    for stage in both.engine._forward.stages:
        stage._capturer = _NoMemory()
    with caplog.at_level(logging.WARNING):
        for num_prompts in (1, 3):
            both.check([both.question(*PROMPTS[:num_prompts])])
    told = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert len(told) == len(both.engine._forward.stages)  # once for each
    assert both.capturer.num_captures == 0


def test_freed_memory_is_made_again(bare):
    question = bare.question("crack", "hole")
    bare.check([question])
    captured = bare.capturer.num_captures
    bare.engine.drop_features()
    bare.check([question], turns=1)
    assert bare.capturer.num_captures == captured
    bare.check([question])
    assert bare.capturer.num_captures == 2 * captured


def test_warm_up_captures_what_requests_need(bare):
    engine: Engine = bare.engine
    engine._warm_up_images = 3  # as on a GPU
    engine.warm_up()
    assert set(engine.counters.values()) == {0}
    captured = bare.capturer.num_captures
    for num_prompts in (1, 3, 8):
        bare.check([bare.question(*PROMPTS[:num_prompts])], turns=1)
    bare.check([bare.question("crack", image=image) for image in range(3)], turns=1)
    assert bare.capturer.num_captures == captured
