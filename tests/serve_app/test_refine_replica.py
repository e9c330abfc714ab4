"""Clicks in a replica with a real small model, without Ray: masks, mixed batches, kept masks, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sam3lora.data.rle import encode_rle
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.decoder import ClickedObject
from sam3lora.engine.clicks.kept_masks import MOST_MASKS
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt, drawn_mask_logits
from sam3lora.engine.engine import Engine
from sam3lora.engine.mask_codes import encode_logits
from sam3lora.engine.selection import NotFiniteError
from serve_app.http.errors import ServeError
from serve_app.messages import DenseReply, RefineCall, RefinedObject, RefineReply, SegmentReply
from serve_app.metrics import STAGES
from serve_app.replica.replica import ModelReplica
from serve_app.settings import Batching, Caches, Limits

from .replica_cases import LONG_S, Gate, answered, assert_same, call, image, metric, until_queued
from .test_dense_replica import dense_call

pytestmark = pytest.mark.anyio
ONE, TWO = RefinedObject((Click(30, 20),)), RefinedObject((Click(30, 20), Click(70, 40, 0)))
BOXED = RefinedObject((Click(30, 20, 0),), (10, 5, 60, 50))


@pytest.fixture
def serve(play: Callable, clickable_base: Path) -> Callable:
    """As `play`, over a base with a click head."""
    return lambda **options: play(**({"model": str(clickable_base)} | options))


@pytest.fixture(scope="module")
def root(clickable_tasks: Path) -> Path:
    return clickable_tasks


@pytest.fixture(scope="module")
def alone(clickable_base: Path, root: Path) -> Engine:
    """What one object alone is answered; "towers" is in slot 0, "heads" in slot 1."""
    engine = Engine.load(str(clickable_base), device="cpu", num_slots=2)
    for slot, name in enumerate(("towers", "heads")):
        engine.place_adapter(slot, engine.read_adapter(root / name))
    return engine


def refine_call(*objects: RefinedObject, seed: int = 0, **options: Any) -> RefineCall:
    return RefineCall(image(seed), objects or (ONE,), **({"timeout_s": LONG_S} | options))


def expected(
    alone: Engine, asked: RefinedObject, slot: int | None = None, seed: int = 0, start: torch.Tensor | None = None
) -> ClickAnswer:
    file = image(seed)
    prepared = alone.prepare_image(file.data or b"", file.key)
    prompt = ClickPrompt.of(asked.clicks, asked.box_xyxy, start, size_hw=prepared.size_hw, side=alone.resolution)
    (answer,) = alone.click([ClickedObject(prepared, prompt, slot)])
    assert isinstance(answer, ClickAnswer), answer
    return answer


async def refined(service: ModelReplica, one: RefineCall) -> RefineReply:
    reply = await service.refine(one)
    assert isinstance(reply, RefineReply), reply
    return reply


async def refused(service: ModelReplica, one: RefineCall) -> ServeError:
    reply = await service.refine(one)
    assert isinstance(reply, ServeError), reply
    return reply


def same(reply: RefineReply, number: int, answer: ClickAnswer, tolerance: float = 1e-5) -> None:
    masks, object_score = reply.objects[number]
    assert object_score == pytest.approx(answer.object_score, abs=tolerance)
    order = sorted(range(len(answer.scores)), key=lambda index: -answer.scores[index])
    assert [mask.score for mask in masks] == pytest.approx([answer.scores[index] for index in order], abs=tolerance)
    for mask, index in zip(masks, order, strict=True):
        wanted = coco_mask.decode(encode_logits(answer.logits_Mmm[index].numpy(), reply.size_hw))
        assert (coco_mask.decode(mask.rle) != wanted).mean() < 0.002


async def test_masks_are_those_of_the_engine(serve: Callable, alone: Engine):
    async with serve() as service:
        reply = await refined(service, refine_call(ONE, TWO, BOXED))
        assert (reply.size_hw, set(reply.timing_ms)) == ((60, 90), set(STAGES))
        assert [len(one.masks) for one in reply.objects] == [3, 1, 1]
        for number, asked in enumerate((ONE, TWO, BOXED)):
            same(reply, number, expected(alone, asked))
        areas = {coco_mask.area(one.masks[0].rle) for one in reply.objects}
        assert len(areas) == 3  # the three are told apart
        assert 0 not in areas
        # The image is there: a further click passes the head alone.
        await refined(service, refine_call(TWO))
        assert await metric(service, "images_encoded_total") == 1
        assert await metric(service, "objects_clicked_total") == 4


async def test_adapters_on_the_trunk_and_their_absence(serve: Callable, alone: Engine):
    async with serve() as service:
        towers = await refined(service, refine_call(adapter="towers"))
        same(towers, 0, expected(alone, ONE, 0))
        same(await refined(service, refine_call(adapter="heads")), 0, expected(alone, ONE))
        base = await refined(service, refine_call(adapter="towers", clicks_vision="base"))
        same(base, 0, expected(alone, ONE))
        assert base.objects[0].masks[0].score != pytest.approx(towers.objects[0].masks[0].score, abs=1e-4)
        assert await metric(service, "images_encoded_total") == 2  # one for towers, one for the others


async def test_the_number_of_masks_can_be_asked_for(serve: Callable):
    async with serve() as service:
        always = await refined(service, refine_call(TWO, BOXED, multimask=True))
        never = await refined(service, refine_call(ONE, multimask=False))
        assert [len(one.masks) for one in always.objects] == [3, 3]
        assert len(never.objects[0].masks) == 1


async def test_a_click_goes_on_from_a_kept_mask(serve: Callable, alone: Engine):
    async with serve() as service:
        first = (await refined(service, refine_call(ONE))).objects[0].masks
        assert len({mask.mask_id for mask in first}) == 3
        before = expected(alone, ONE)
        for mask, index in zip(first[:2], np.argsort([-score for score in before.scores]), strict=False):
            asked = RefinedObject(TWO.clicks, None, mask.mask_id)
            rounded = before.logits_Mmm[index].clamp(-32, 32).half().float()
            same(await refined(service, refine_call(asked)), 0, expected(alone, TWO, start=rounded), 1e-4)
        without = (await refined(service, refine_call(TWO))).objects[0].masks[0]
        asked = RefinedObject(TWO.clicks, None, first[0].mask_id)
        assert (await refined(service, refine_call(asked))).objects[0].masks[0].score != without.score


async def test_a_click_goes_on_from_a_mask_that_is_sent(serve: Callable, alone: Engine):
    mask_HW = np.zeros((60, 90), bool)
    mask_HW[10:50, 20:70] = True
    async with serve() as service:
        reply = await refined(service, refine_call(RefinedObject(TWO.clicks, None, encode_rle(mask_HW)), TWO))
        side = alone.click_mask_side
        same(reply, 0, expected(alone, TWO, start=drawn_mask_logits(mask_HW, side)))
        same(reply, 1, expected(alone, TWO))


async def test_kept_masks_go_with_their_image(serve: Callable):
    async with serve() as service:
        mask_id = (await refined(service, refine_call(ONE))).objects[0].masks[0].mask_id
        asked = RefinedObject(TWO.clicks, None, mask_id)
        service._engine.drop_features()  # as when memory ran out: masks stay
        await refined(service, refine_call(ONE, asked))
        error = await refused(service, refine_call(ONE, asked, seed=1))  # of another image
        assert (error.type, error.status, error.field) == ("mask_not_found", 404, "objects[1].mask.mask_id")
        unknown = RefinedObject(ONE.clicks, None, "msk_" + 32 * "0")
        assert (await refused(service, refine_call(unknown))).type == "mask_not_found"
        service._engine._features.images.forget(image(0).key)
        assert (await refused(service, refine_call(asked))).type == "mask_not_found"
        # Of one image the latest 64 are kept.
        ids = []
        for number in range(MOST_MASKS + 2):
            clicked = RefinedObject((Click(30, 20), Click(number, number % 50, 0)))
            ids.append((await refined(service, refine_call(clicked))).objects[0].masks[0].mask_id)
        await refined(service, refine_call(RefinedObject(ONE.clicks, None, ids[2])))
        assert (await refused(service, refine_call(RefinedObject(ONE.clicks, None, ids[0])))).type == "mask_not_found"


async def test_kept_masks_count_in_the_cache(serve: Callable):
    async with serve() as service:
        await refined(service, refine_call(TWO))
        before = await metric(service, "image_cache_bytes")
        await refined(service, refine_call(BOXED))
        side = service._engine.click_mask_side
        assert await metric(service, "image_cache_bytes") == before + 2 * side * side
        await refined(service, refine_call(BOXED))  # the same again
        assert await metric(service, "image_cache_bytes") == before + 2 * side * side


async def test_without_room_there_are_no_ids(serve: Callable, clickable_base: Path):
    engine = Engine.load(str(clickable_base), device="cpu", num_slots=2, image_cache_bytes=1000)
    async with serve(engine=engine, caches=Caches(images_mb=1)) as service:
        reply = await refined(service, refine_call(ONE))
        assert [mask.mask_id for mask in reply.objects[0].masks] == [None] * 3
        found = await answered(service, call(0, keep_masks=True))
        assert found.mask_ids == [[None] * len(found.results[0])]


async def test_detections_are_kept_as_the_detector_made_them(serve: Callable):
    async with serve() as service:
        everything = {"threshold": 0.0, "nms": "none", "max_detections": 100}
        asked = call(0, ("crack", "hole"), keep_masks=True, post_processing=everything)
        found = await answered(service, asked)
        assert found.mask_ids is not None
        assert [len(ids) for ids in found.mask_ids] == [len(result) for result in found.results]
        scores = np.concatenate([result.scores for result in found.results])
        ids = [one for of_prompt in found.mask_ids for one in of_prompt]
        kept = [one is not None for one in ids]
        assert sum(kept) == min(MOST_MASKS, len(scores))
        if not all(kept):
            assert scores[kept].min() >= scores[np.logical_not(kept)].max()  # the best
        for result, of_prompt in zip(found.results, found.mask_ids, strict=True):
            for rle, mask_id in zip(result.rles or (), of_prompt, strict=True):
                if mask_id is not None:
                    logits = service._engine.kept_mask(image(0).key, mask_id)
                    assert logits is not None
                    again = coco_mask.decode(encode_logits(logits.astype(np.float32), (60, 90)))
                    assert (again != coco_mask.decode(rle)).mean() < 0.002
        bare = await answered(service, call(0, keep_masks=True, masks=False, post_processing={"nms": "box"} | POST))
        assert bare.mask_ids is not None
        assert len(bare.mask_ids[0]) == len(bare.results[0]) > 0
        assert (await answered(service, call(0))).mask_ids is None
        seed = RefinedObject((Click(30, 20, 0),), None, bare.mask_ids[0][0])
        await refined(service, refine_call(seed))


POST = {"threshold": 0.0, "max_detections": 3}


@pytest.mark.parametrize("encode_ahead", [False, True])
async def test_one_batch_of_clicks_prompts_and_labels(
    serve: Callable, clickable_base: Path, root: Path, alone: Engine, encode_ahead: bool
):
    """Each is answered as if it were alone, and an image passes the trunk once for each of the trunk's adapters."""
    gate = Gate.load(str(clickable_base), device="cpu", num_slots=5)
    clicks = [
        refine_call(ONE, TWO),
        refine_call(TWO, adapter="heads"),
        refine_call(TWO, ONE, adapter="towers"),
        refine_call(ONE, seed=1),
    ]
    prompts = [call(0, ("crack", "hole")), call(0, adapter="towers"), call(2)]
    async with serve(max_resident_adapters=5) as service:
        by_itself = [await answered(service, one) for one in prompts]
        labels = await service.label(dense_call("gears", output="rle"))
    options = {"batching": Batching(encode_ahead=encode_ahead)}
    async with serve(engine=gate, max_resident_adapters=5, **options) as service:
        await service.reconfigure({"root": str(root), "preload": ["towers", "heads", "gears"]})
        first = await gate.occupy(service, seed=7)
        waiting: list[Any] = [asyncio.create_task(service.refine(one)) for one in clicks]
        waiting += [asyncio.create_task(service.segment(one)) for one in prompts]
        waiting.append(asyncio.create_task(service.label(dense_call("gears", output="rle"))))
        await until_queued(service, 8)
        gate.open.set()
        *found, gears = await asyncio.gather(*waiting)
        await first
        # The occupying image; image 0 for base, towers and gears; images 1 and 2.
        assert await metric(service, "images_encoded_total") == 1 + 3 + 2
        if not encode_ahead:  # single clicks together, and pairs
            assert await metric(service, "click_decodes_total") == 2
    for reply, (slot, asked, seed) in zip(
        found[:4],
        [(None, (ONE, TWO), 0), (1, (TWO,), 0), (0, (TWO, ONE), 0), (None, (ONE,), 1)],
        strict=True,
    ):
        assert isinstance(reply, RefineReply)
        for number, one in enumerate(asked):
            same(reply, number, expected(alone, one, slot, seed))
    for reply, before in zip(found[4:], by_itself, strict=True):
        assert isinstance(reply, SegmentReply)
        assert_same(reply.results, list(before.results))
    assert isinstance(gears, DenseReply)
    assert isinstance(labels, DenseReply)
    assert [one.area_px for one in gears.classes] == pytest.approx([one.area_px for one in labels.classes], abs=3)


async def test_one_bad_object_leaves_other_requests_alone(serve: Callable, clickable_base: Path):
    class Diverging(Gate):
        def click(self, objects: Any, beside: Any = ()) -> Any:
            return [
                NotFiniteError("NaN") if len(one.prompt.points_k2) == 2 else answer
                for one, answer in zip(objects, super().click(objects, beside), strict=True)
            ]

    gate = Diverging.load(str(clickable_base), device="cpu", num_slots=2)
    async with serve(engine=gate) as service:
        first = await gate.occupy(service, seed=7)
        waiting = [asyncio.create_task(service.refine(one)) for one in (refine_call(ONE, TWO), refine_call(ONE))]
        await until_queued(service, 2)
        gate.open.set()
        bad, good = await asyncio.gather(*waiting)
        await first
        assert isinstance(bad, ServeError)
        assert bad.type == "internal"
        assert isinstance(good, RefineReply)
        assert (await refused(service, refine_call(TWO, adapter="heads"))).type == "invalid_adapter"


WRONG: dict[str, tuple[Callable[[], RefineCall], str, str | None]] = {
    "a dense adapter": (lambda: refine_call(adapter="gears"), "wrong_task", "adapter"),
    "an unknown adapter": (lambda: refine_call(adapter="unknown"), "adapter_not_found", "adapter"),
    "a click beyond the image": (
        lambda: refine_call(ONE, RefinedObject((Click(30, 20), Click(90, 0)))),
        "invalid_click",
        "objects[1].clicks[1]",
    ),
    "a box beyond the image": (lambda: refine_call(RefinedObject((), (0, 0, 91, 60))), "invalid_box", "objects[0].box"),
    "a mask of another size": (
        lambda: refine_call(RefinedObject(ONE.clicks, None, encode_rle(np.ones((90, 60), bool)))),
        "invalid_mask",
        "objects[0].mask.size",
    ),
    "no time left": (lambda: refine_call(timeout_s=-1), "timeout", None),
}


async def test_refused_calls(serve: Callable):
    async with serve() as service:
        for make, type, field in WRONG.values():
            error = await refused(service, make())
            assert (error.type, error.field) == (type, field), error
        assert (await service.list_adapters()).clicks
    async with serve(limits=Limits(max_answer_bytes=20)) as service:
        assert (await refused(service, refine_call(ONE))).type == "answer_too_large"


async def test_a_base_without_a_click_head_says_so(play: Callable, serve: Callable, spread_base: Path):
    plain = {"model": str(spread_base)}
    for settings in (plain, {"clicks": False}):
        async with serve(**settings) as service:
            error = await refused(service, refine_call())
            assert (error.type, error.status) == ("no_click_head", 501)
            asked = await service.segment(call(0, keep_masks=True))
            assert isinstance(asked, ServeError)
            assert (asked.type, asked.field) == ("no_click_head", "keep_masks")
            assert not (await service.list_adapters()).clicks
            await answered(service, call(0))
    with pytest.raises(Exception, match="no tracker"):
        async with play(**plain, clicks=True):
            pass
