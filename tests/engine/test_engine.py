"""A mixed batch gives each prompted image the result that it has alone, and that PEFT gives with one adapter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.images import ImageError
from sam3lora.engine.detections import BoxPrompt
from sam3lora.engine.device import is_device_error, is_out_of_memory
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.forward import MixedForward
from sam3lora.engine.selection import NotFiniteError, SmallDetections, Wanted
from sam3lora.errors import UserError
from sam3lora.model.adapter.weights import AdapterWeights

from .engine_cases import (
    ADAPTERS,
    EVERY,
    PeftReference,
    make_engine,
    make_images,
    random_prompted_images,
    write_adapter,
    write_adapters,
    write_base,
)

BOXES = (BoxPrompt((4, 6, 30, 35)), BoxPrompt((10, 2, 38, 20), label=0))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return make_images(4)


@pytest.fixture(scope="module")
def adapters(spread_base, tmp_path_factory) -> dict[str, Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"), spread_base)


@pytest.fixture(scope="module")
def _placed(spread_base, adapters):
    return make_engine(spread_base, adapters, max_rows=6, max_images=3)


@pytest.fixture
def engine(_placed) -> Engine:
    """With every adapter, and nothing in its caches of images."""
    forget(_placed[0])
    return _placed[0]


@pytest.fixture(scope="module")
def slots(_placed) -> dict[str | None, int | None]:
    return _placed[1]


@pytest.fixture(scope="module")
def peft(adapters, spread_base) -> PeftReference:
    return PeftReference(adapters, spread_base)


def forget(engine: Engine) -> None:
    for number in range(10):
        engine._features.images.forget(f"image {number}")


def ask(engine: Engine, asked: list[PromptedImage]) -> list[list[SmallDetections]]:
    results = engine.detect_small(asked)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def assert_same(first: list[list[SmallDetections]], second: list[list[SmallDetections]], atol: float = 1e-5) -> None:
    for one, other in zip([d for r in first for d in r], [d for r in second for d in r], strict=True):
        assert (one.wanted.prompt, one.wanted.size_hw) == (other.wanted.prompt, other.wanted.size_hw)
        np.testing.assert_allclose(one.presence, other.presence, atol=atol)
        np.testing.assert_allclose(one.scores_N, other.scores_N, atol=atol)
        np.testing.assert_allclose(one.boxes_cxcywh_N4, other.boxes_cxcywh_N4, atol=atol)
        if other.mask_logits_NHW is None:
            assert one.mask_logits_NHW is None
        else:
            largest = np.abs(other.mask_logits_NHW).max(initial=1)
            np.testing.assert_allclose(one.mask_logits_NHW, other.mask_logits_NHW, atol=atol * largest)


def assert_as_peft(peft: PeftReference, slots, images, asked: list[PromptedImage], results) -> None:
    label = {slot: name for name, slot in slots.items()}
    for prompted, result in zip(asked, results, strict=True):
        image = images[int(prompted.image.key.split()[-1])]
        for small in result:
            wanted = Wanted(small.wanted.prompt, image.shape[:2], prompted.post, prompted.masks)
            other, one = peft.detect(image, label[prompted.slot], wanted, prompted.boxes), small.at_full_size()
            assert (one.prompt, one.size_hw, len(one)) == (other.prompt, other.size_hw, len(other))
            np.testing.assert_allclose(one.presence, other.presence, atol=1e-5)
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
            np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=2e-3)
            assert (one.rles is None) == (other.rles is None) == (not prompted.masks)
            if other.rles:
                assert (coco_mask.decode(one.rles) != coco_mask.decode(other.rles)).mean() < 1e-3


def differ(first: list[SmallDetections], second: list[SmallDetections]) -> bool:
    return not np.allclose(first[0].scores_N, second[0].scores_N, atol=1e-4)


def prompted_by_all(engine, images, slots) -> list[PromptedImage]:
    """Every adapter and the base, with and without boxes, about two images, in no order of anything."""
    prepared = [engine.prepare_image(image, f"image {number}") for number, image in enumerate(images)]
    questions = []
    for number, slot in enumerate(slots.values()):
        questions.append(PromptedImage(prepared[number % 2], ("crack",), (), slot, EVERY))
        questions.append(
            PromptedImage(prepared[1 - number % 2], ("hole", "crack"), BOXES[: 1 + number % 2], slot, EVERY)
        )
    return questions


def test_a_mixed_batch_is_each_alone_and_each_with_peft(engine, peft, slots, images):
    assert engine.detect_small([]) == []
    questions = prompted_by_all(engine, images, slots)
    together = ask(engine, questions)
    forget(engine)
    assert_same(together, [ask(engine, [question])[0] for question in questions])
    # and from features that are there already
    assert_same(together, ask(engine, questions))
    assert_as_peft(peft, slots, images, questions, together)
    # no adapter is without effect, so none could have been mistaken for another
    plain = [replace(question, slot=None) for question in questions]
    for answer, of_base, question in zip(together, ask(engine, plain), questions, strict=True):
        assert differ(answer, of_base) == (question.slot is not None)


@pytest.mark.parametrize("seed", range(5))
def test_random_batches(engine, slots, images, seed):
    generator = np.random.default_rng(seed)
    questions = random_prompted_images(generator, engine, images, slots, int(generator.integers(2, 9)))
    together = ask(engine, questions)
    forget(engine)
    for question, answer in zip(questions, together, strict=True):
        assert_same([answer], ask(engine, [question]))


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_as_many_rows_as_decoder_layers(engine, peft, slots, images, num_rows):
    # the model has 2: layers and rows can be mistaken for each other
    assert len(engine.base.model.detr_decoder.layers) == 2
    image = engine.prepare_image(images[0], "image 0")
    names = ("detector", None, "vision")[:num_rows]
    questions = [PromptedImage(image, ("crack",), (), slots[name], EVERY) for name in names]
    assert_as_peft(peft, slots, images, questions, ask(engine, questions))


def test_images_encoded_ahead_in_a_second_thread_give_the_same_answers(engine, slots, images):
    # under every adapter, while the model thread answers the same questions with features of its own
    questions = prompted_by_all(engine, images, slots)
    expected = ask(engine, questions)
    for _ in range(3):
        forget(engine)
        with ThreadPoolExecutor(2) as threads:
            ahead = threads.submit(engine.encode_ahead, [(question.image, question.slot) for question in questions])
            beside = threads.submit(ask, engine, questions[::-1])
            encoded = ahead.result()
            assert_same(beside.result()[::-1], expected)
        prepared = [replace(question, image=image) for question, image in zip(questions, encoded, strict=True)]
        forget(engine)
        engine._features.reset_counters()
        assert_same(ask(engine, prepared), expected)
        assert engine.counters["images_encoded"] == engine.counters["image_cache_misses"] == 0


def test_an_image_that_two_threads_want_is_encoded_once(engine, images):
    prepared = [engine.prepare_image(image, f"image {number}") for number, image in enumerate(images)]
    engine._features.reset_counters()
    assert not any(engine.has_features(image, None) for image in prepared)
    with ThreadPoolExecutor(2) as threads:
        for made in threads.map(engine.encode_ahead, [[(image, None) for image in prepared]] * 2):
            assert all(engine.has_features(image, None) for image in made)
    assert engine.counters["images_encoded"] == engine.counters["image_cache_misses"] == len(images)
    assert engine.counters["image_cache_hits"] == len(images)
    assert all(engine.cached_image(image.key).features is None for image in prepared)  # memory counts once


def test_windows_that_do_not_divide_the_image(tmp_path, images):
    # 8 x 8 patches in windows of 3 are filled up to 9 x 9
    windowed = write_base(tmp_path / "base", window=3)
    names = ("vision", "no cls vision")
    adapters = {name: write_adapter(tmp_path / name, windowed, name, seed) for seed, name in enumerate(names)}
    engine, slots = make_engine(windowed, adapters)
    questions = prompted_by_all(engine, images, slots)
    peft = PeftReference(adapters, windowed)
    assert_as_peft(peft, slots, images, questions, ask(engine, questions))


def test_boxes_alone(engine, peft, slots, images):
    image = engine.prepare_image(images[1], "image 1")
    questions = [
        PromptedImage(image, (), BOXES[:1], None, EVERY),
        PromptedImage(image, ("crack",), (), slots["no cls"], EVERY),  # neither boxes nor the CLS token
        PromptedImage(image, (), BOXES, slots["no cls"], EVERY),
    ]
    answers = ask(engine, questions)
    assert [small.wanted.prompt for result in answers for small in result] == ["visual", "crack", "visual"]
    assert [question.num_rows for question in questions] == [1, 1, 1]
    assert_as_peft(peft, slots, images, questions, answers)


def test_post_processing_of_each(engine, peft, slots, images):
    image = engine.prepare_image(images[0], "image 0")
    whole = ask(engine, [PromptedImage(image, ("crack",), post=EVERY)])[0][0].scores_N
    posts = [
        PostProcessing(threshold=float(np.median(whole)), nms="none"),
        PostProcessing(threshold=0.0, nms="mask", nms_iou=0.3),
        PostProcessing(threshold=0.0, merge=True),
        PostProcessing(threshold=0.0, nms="box", nms_iou=0.2, max_detections=2),
        PostProcessing(threshold=1.0),
    ]
    questions = [
        PromptedImage(image, ("crack", "hole"), (), slots[name], post, masks)
        for post in posts
        for name, masks in ((None, True), ("vision", False), ("no cls", True))
    ]
    answers = ask(engine, questions)
    assert_as_peft(peft, slots, images, questions, answers)
    assert {len(small.scores_N) for result in answers for small in result} >= {0, 1, 2}


def test_masks_are_made_a_few_rows_at_a_time(engine, slots, images, monkeypatch):
    image = engine.prepare_image(images[0], "image 0")
    questions = [PromptedImage(image, ("crack", "hole"), (), slot, EVERY) for slot in slots.values()]
    together = ask(engine, questions)
    monkeypatch.setattr("sam3lora.engine.selection.MASKS_AT_ONCE", 17)  # two rows of 8 queries
    assert_same(together, ask(engine, questions), atol=1e-7)


@pytest.fixture
def encoded(engine, monkeypatch) -> list[int]:
    """Images of each pass of the vision tower."""
    passes: list[int] = []
    handle = engine.base.model.vision_encoder.backbone.embeddings.register_forward_pre_hook(
        lambda _, arguments: passes.append(len(arguments[0]))
    )
    yield passes
    handle.remove()


def test_an_image_is_encoded_once_for_all_who_share_it(engine, slots, images, encoded):
    image = engine.prepare_image(images[0], "image 0")
    assert engine.cached_image("image 0") is None
    shared = [PromptedImage(image, ("crack",), (), slots[name]) for name in ("text", None, "detector", "no cls")]
    ask(engine, shared)
    assert encoded == [1]
    assert engine.cached_image("image 0") is image
    # again: not at all
    ask(engine, shared[::-1])
    assert encoded == [1]
    # two adapters with towers of their own, in one pass, once
    for _ in range(2):
        ask(engine, [replace(shared[0], slot=slots[name]) for name in ("vision", None, "no cls vision", "vision")])
        assert encoded == [1, 2]
    # others, at most three at a time
    more = [engine.prepare_image(images[number % 4], f"image {number}") for number in range(1, 6)]
    ask(engine, [replace(shared[0], image=one) for one in [image, *more]])
    assert encoded == [1, 2, 3, 2]


def test_a_kept_image_is_not_encoded_again(engine, slots, images, encoded):
    image = engine.prepare_image(images[0], "image 0")
    engine.keep_image(image)
    assert engine.cached_image("image 0") is image
    ask(engine, [PromptedImage(image, ("crack",), (), slots["detector"])])
    assert encoded == [1]
    # without room for features it is known, and encoded again
    engine.drop_features()
    assert engine.cached_image("image 0") is image
    ask(engine, [PromptedImage(image, ("crack",))])
    assert encoded == [1, 1]


def test_text_is_encoded_once_for_all_who_share_it(spread_base, adapters, images):
    engine, slots = make_engine(spread_base, adapters, max_cached_prompts=3)
    rows = []
    tower = engine.base.model.text_encoder
    tower.register_forward_pre_hook(lambda _, arguments, named: rows.append(len(named["input_ids"])), with_kwargs=True)
    image = engine.prepare_image(images[0], "image 0")
    ask(
        engine,
        [PromptedImage(image, ("crack", "hole"), (), slots[name]) for name in (None, "vision", "text", "no cls")],
    )
    assert rows == [4]  # two prompts, and the same two under the adapter of the text tower
    ask(engine, [PromptedImage(image, ("hole",), (), slots[name]) for name in ("text", None)])
    assert rows == [4]
    assert (engine.counters["text_cache_hits"], engine.counters["text_cache_misses"]) == (2, 4)
    # three are kept: what was used least recently is made again, with the same answer
    question = PromptedImage(image, ("leaf",), (), None, EVERY)
    first = ask(engine, [question])
    assert_same(first, ask(engine, [question]), atol=0)
    assert rows == [4, 1]
    ask(engine, [replace(question, prompts=("crack", "hole", "a long prompt"))])
    assert_same(first, ask(engine, [question]))
    assert rows == [4, 1, 2, 1]


def test_an_adapter_that_is_replaced_leaves_nothing_behind(spread_base, tmp_path, images):
    folders = [write_adapter(tmp_path / str(seed), spread_base, "vision", seed) for seed in (1, 2)]
    engine, _ = make_engine(spread_base, {}, num_slots=2)
    weights = [engine.read_adapter(folder) for folder in folders]
    question = PromptedImage(engine.prepare_image(images[0], "image 0"), ("crack",), (), 0, EVERY)
    answers = []
    for one in (weights[0], weights[1], weights[0]):
        engine.place_adapter(0, one)
        answers += ask(engine, [question])
    alone = [ask(make_engine(spread_base, {"it": folder})[0], [question])[0] for folder in folders]
    assert_same(answers, [alone[0], alone[1], alone[0]])
    assert differ(*alone)
    # both at once, in the other order
    engine.place_adapter(1, weights[0])
    engine.place_adapter(0, weights[1])
    assert_same(ask(engine, [replace(question, slot=1), question]), alone)
    # a cleared slot answers nothing, and the base is the base
    engine.clear_adapter(0)
    engine.clear_adapter(1)
    of_none, of_base = engine.detect_small([question, replace(question, slot=None)])
    assert isinstance(of_none, LookupError)
    assert_same([of_base], ask(make_engine(spread_base, {})[0], [replace(question, slot=None)]), atol=1e-7)


def test_the_cache_stays_within_its_limit(spread_base, adapters, images):
    plain, slots = make_engine(spread_base, {"vision": adapters["vision"]})
    image = plain.prepare_image(images[0], "image 0")
    ask(plain, [PromptedImage(image, ("crack",))])
    one = plain.counters["image_cache_bytes"]
    for limit, most in ((0, 0), (one - 1, one - 1), (2 * one + 1, 2 * one)):
        engine, slots = make_engine(spread_base, {"vision": adapters["vision"]}, image_cache_bytes=limit)
        for _ in range(2):
            questions = [
                PromptedImage(engine.prepare_image(picture, f"image {number}"), ("crack",), (), slot, EVERY)
                for number, picture in enumerate(images)
                for slot in slots.values()
            ]
            # more than fits, and yet each is answered from its own features
            together = ask(engine, questions)
            assert engine.counters["image_cache_bytes"] <= most
        assert_same(together, ask(plain, questions))
        assert (engine.counters["image_cache_evictions"] > 0) == (limit >= one - 1)


def test_bad_questions_leave_the_others_alone(engine, slots, images):
    image = engine.prepare_image(images[0], "image 0")
    height, width = image.size_hw
    good = [
        PromptedImage(image, ("crack",), (), slots["text"], EVERY),
        PromptedImage(image, ("hole",), BOXES, None, EVERY),
    ]
    bad = [
        (replace(good[0], prompts=("",)), UserError, "empty"),
        (replace(good[0], prompts=("crack", "x" * 40)), UserError, "42 tokens"),
        (replace(good[0], prompts=()), UserError, "or give boxes"),
        *(
            (replace(good[0], boxes=(BoxPrompt(xyxy),)), UserError, words)
            for xyxy, words in (
                ((0, 0, width + 1, 5), f"x1 <= {width}"),
                ((0, 0, 5, height + 1), f"y1 <= {height}"),
                ((-1, 0, 5, 5), "pixels"),
                ((5, 0, 5, 5), "x0 < x1"),
                ((0, 5, 5, 2), "y0 < y1"),
                ((float("nan"), 0, 5, 5), "pixels"),
            )
        ),
        (replace(good[0], boxes=(BoxPrompt((0, 0, 5, 5), 3),)), UserError, "label 1"),
        (replace(good[0], slot=15), LookupError, "slot 15 holds no adapter"),
    ]
    questions = [bad[0][0], good[0], *(question for question, *_ in bad[1:4]), good[1], *(one for one, *_ in bad[4:])]
    answers = engine.detect_small(questions)
    assert_same([answers[1], answers[5]], ask(engine, good))
    failures = [answer for answer in answers if isinstance(answer, Exception)]
    for failure, (_, kind, words) in zip(failures, bad, strict=True):
        assert isinstance(failure, kind)
        assert words in str(failure)


def test_only_the_culprit_of_a_broken_batch_fails(engine, slots, images, monkeypatch):
    image = engine.prepare_image(images[0], "image 0")
    questions = [PromptedImage(image, (prompt,), (), slots["text"], EVERY) for prompt in ("crack", "hole", "leaf")]
    expected = ask(engine, questions)
    detect = MixedForward.detect
    cursed = engine._features.text([("hole", engine._adapters[slots["text"]])]).popitem()[1]

    def break_on_hole(self, rows, max_rows):
        if any(row.text is cursed for row in rows):
            raise ZeroDivisionError("broken")
        return detect(self, rows, max_rows)

    monkeypatch.setattr(MixedForward, "detect", break_on_hole)
    answers = engine.detect_small(questions)
    assert isinstance(answers[1], ZeroDivisionError)
    assert_same([answers[0], answers[2]], [expected[0], expected[2]])


def diverged(weights: AdapterWeights) -> AdapterWeights:
    """Finite weights, far too large."""
    modules = {name: replace(one, down=one.down * 1e30, up=one.up * 1e30) for name, one in weights.modules.items()}
    return replace(weights, modules=modules, version="diverged")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_diverged_adapter_is_found_whatever_it_changes(engine, slots, adapters, images, name):
    # vision, text, detector, geometry or masks; what is in the other slots passes
    engine.place_adapter(9, diverged(engine.read_adapter(adapters[name])))
    with pytest.raises(NotFiniteError):
        engine.check_adapter(9)
    engine.clear_adapter(9)
    for slot in slots.values():
        if slot is not None:
            engine.check_adapter(slot)


@pytest.mark.parametrize("name", ADAPTERS)
def test_outputs_that_are_not_finite_fail_their_request_alone(engine, slots, adapters, images, name):
    image = engine.prepare_image(images[0], "image 0")
    boxes = BOXES if name == "geometry" else ()
    good = [PromptedImage(image, ("crack",), boxes, slot, EVERY) for slot in (None, slots["vision"], slots["text"])]
    expected = ask(engine, good)
    engine.place_adapter(9, diverged(engine.read_adapter(adapters[name])))
    bad = replace(good[0], slot=9, prompts=("crack", "hole"))
    first, failed, *others = engine.detect_small([good[0], bad, *good[1:]])
    assert isinstance(failed, NotFiniteError)
    assert_same([first, *others], expected)
    # nothing is kept of it that another request could meet
    engine.clear_adapter(9)
    assert_same(ask(engine, good), expected)
    engine.place_adapter(9, diverged(engine.read_adapter(adapters[name])))
    with pytest.raises(NotFiniteError, match="'crack'"):
        engine.detect([bad])
    engine.clear_adapter(9)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ],
)
def test_a_lack_of_memory_and_a_failed_device_are_everyones(engine, images, monkeypatch, error):
    asked = []

    def fail(self, rows, max_rows):
        asked.append(len(rows))
        raise error

    question = PromptedImage(engine.prepare_image(images[0], "image 0"), ("crack",), (), None, EVERY)
    with monkeypatch.context() as patched:
        patched.setattr(MixedForward, "detect", fail)
        with pytest.raises(type(error)):
            engine.detect_small([question, question])
    assert asked == [2]  # no question is tried alone
    # what comes after is well
    assert isinstance(engine.detect_small([question])[0], list)


def test_bad_images(engine):
    for data, words in ((b"", "empty"), (b"GIF89a", "format"), (np.zeros((4, 4), np.uint8), "expected an image")):
        with pytest.raises(ImageError, match=words):
            engine.prepare_image(data, "bad")
    with pytest.raises(ImageError, match="at most 1e-05 million"):
        engine.prepare_image(encoded_png(np.zeros((4, 4, 3), np.uint8)), "bad", max_megapixels=1e-5)


def encoded_png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def test_an_image_file_is_its_pixels(engine, images):
    prepared = engine.prepare_image(encoded_png(images[0]), "image 0")
    same = engine.prepare_image(images[0], "image 0")
    assert prepared.size_hw == same.size_hw == images[0].shape[:2]
    assert prepared.pixels_RR3.shape == (112, 112, 3)
    np.testing.assert_array_equal(prepared.pixels_RR3, same.pixels_RR3)


def test_prompts_are_checked_from_many_threads(spread_base):
    engine, _ = make_engine(spread_base, {}, max_cached_prompts=2)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: engine.check_prompts([f"prompt {number}"]), range(200)))
    for prompts in ([" "], ["fine", "x" * 31]):
        with pytest.raises(UserError):
            engine.check_prompts(prompts)


def test_warm_up_leaves_no_trace(spread_base):
    engine, _ = make_engine(spread_base, {}, max_rows=3)
    engine.warm_up()
    assert set(engine.counters.values()) == {0}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_come_and_go_between_forwards(spread_base, adapters, images, precision, tmp_path):
    # What a forward has cast is written to again when an adapter of the same modules is placed; it must then count.
    adapters = {"text": adapters["text"], "other text": write_adapter(tmp_path / "other", spread_base, "text", seed=9)}
    names = ["text", "other text", "other text", "text", "text"]
    told = {name: make_engine(spread_base, {name: adapters[name]}, precision=precision)[0] for name in adapters}
    shared = Engine.load(str(spread_base), device="cpu", precision=precision, num_slots=2)
    for turn, name in enumerate(names):
        slot = turn % 2
        shared.clear_adapter(slot)
        shared.place_adapter(slot, shared.read_adapter(adapters[name]))
        image = shared.prepare_image(images[0], "image 0")
        questions = [
            PromptedImage(image, ("crack",), post=EVERY),
            PromptedImage(image, ("crack",), slot=slot, post=EVERY),
        ]
        alone = ask(told[name], [replace(questions[1], slot=0)])
        assert_same(ask(shared, questions)[1:], alone, atol=1e-5 if precision == "float32" else 0.03)


@pytest.mark.parametrize("name", [None, "vision", "geometry", "no cls"])
def test_bfloat16_is_close(spread_base, adapters, engine, slots, images, name):
    half, _ = make_engine(spread_base, adapters, precision="bfloat16")
    image = engine.prepare_image(images[0], "image 0")
    questions = [PromptedImage(image, ("crack",), boxes, slots[name], EVERY) for boxes in ((), BOXES)]
    questions.append(replace(questions[0], slot=slots["detector"]))
    suppressed = replace(questions[0], post=PostProcessing(threshold=0.0, nms="mask", merge=True))
    assert len(ask(half, [suppressed])[0][0].scores_N)
    for one, other in zip(ask(engine, questions), ask(half, questions), strict=True):
        assert np.abs(one[0].scores_N - other[0].scores_N).max() < 0.03
        assert other[0].mask_logits_NHW.dtype == np.float32


@pytest.mark.parametrize(
    ("meaning", "error"),
    [
        ("lost", torch.AcceleratorError("CUDA error: device-side assert triggered")),
        ("lost", RuntimeError("CUDA error: an illegal memory access was encountered")),
        ("lost", RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`")),
        ("lost", RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")),
        ("lost", RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")),
        ("full", torch.OutOfMemoryError("CUDA out of memory")),
        ("full", torch.AcceleratorError("CUDA error: out of memory")),
        ("full", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        ("full", MemoryError()),
        ("full", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        ("neither", RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")),
        ("neither", RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`")),
        ("neither", torch.AcceleratorError("CUDA error: invalid configuration argument")),
        ("neither", RuntimeError("mat1 and mat2 shapes cannot be multiplied")),
        ("neither", ValueError("CUDA error: of somebody who says so")),
    ],
)
def test_a_lost_device_a_full_one_and_the_error_of_one_request(meaning, error):
    assert is_device_error(error) == (meaning == "lost")
    assert is_out_of_memory(error) == (meaning == "full")
