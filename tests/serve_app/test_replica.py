"""The answers of a replica with a real small model, without Ray: each is that of its request alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from safetensors.torch import load_file, save_file

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.detections import BoxPrompt
from sam3lora.engine.engine import Engine, PromptedImage
from serve_app.http.errors import ServeError
from serve_app.http.schemas import AdapterResponse
from serve_app.messages import ImageFile, ImageReply, SegmentReply
from serve_app.metrics import STAGES
from serve_app.replica import adapter_store
from serve_app.replica.replica import ModelReplica
from serve_app.settings import AdapterSettings, Batching, Limits, ServeSettings

from ..engine.engine_cases import write_adapter
from .replica_cases import (
    POST,
    Gate,
    answered,
    assert_same,
    call,
    image,
    metric,
    refused,
    until_queued,
)

pytestmark = pytest.mark.anyio


BOX = BoxPrompt((4.0, 5.0, 40.0, 44.0))


@pytest.mark.parametrize("encode_ahead", [False, True])
async def test_mixed_batches_equal_single_requests(
    play: Callable, gate: Gate, spread_base: Path, root: Path, encode_ahead: bool
):
    calls = [
        call(0, ("crack", "hole")),
        call(0, ("crack",), adapter="towers"),
        call(1, ("crack",), adapter="heads"),
        call(1, ("hole",), boxes=(BOX,), adapter="heads"),
        call(2, (), boxes=(BOX,)),
        call(2, ("crack",), masks=False),
        call(0, ("crack", "hole", "rust"), adapter="towers", boxes=(BOX,)),
    ]
    alone = Engine.load(str(spread_base), device="cpu", num_slots=2)
    slots = {None: None, "towers": 0, "heads": 1}
    for adapter_id, slot in slots.items():
        if adapter_id is not None:
            alone.place_adapter(slot, alone.read_adapter(root / adapter_id))
    expected = []
    for one in calls:
        prepared = alone.prepare_image(one.image.data, one.image.key)
        post = PostProcessing(**POST)
        asked = PromptedImage(prepared, one.prompts, one.boxes, slots[one.adapter], post, one.masks)
        expected += alone.detect([asked])
    async with play(engine=gate, batching=Batching(encode_ahead=encode_ahead)) as service:
        for replies in (
            [await answered(service, one) for one in calls],
            await asyncio.gather(*(answered(service, one) for one in calls)),
        ):
            for one, reply, wanted in zip(calls, replies, expected, strict=True):
                assert reply.size_hw == (60, 90)
                assert set(reply.timing_ms) == set(STAGES)
                assert all(len(result) for result in reply.results)
                assert all((result.rles is not None) == one.masks for result in reply.results)
                assert_same(reply.results, wanted)
    adapted = [expected[0][0].scores, expected[1][0].scores]
    assert not np.allclose(*adapted, atol=1e-3)  # or the comparison would prove little


async def test_waiting_calls_share_a_batch(play: Callable, gate: Gate, root: Path):
    async with play(engine=gate) as service:
        await service.reconfigure({"root": str(root), "preload": ["towers", "heads"]})
        first = await gate.occupy(service)
        adapters = (None, "towers", "heads")
        rest = [asyncio.create_task(answered(service, call(seed, adapter=id))) for seed, id in enumerate(adapters)]
        await until_queued(service, 3)
        gate.open.set()
        await asyncio.gather(first, *rest)
    assert [len(batch) for batch in gate.batches] == [1, 3]


FAILURES = {
    "unknown adapter": (lambda: call(adapter="unknown"), "adapter_not_found"),
    "adapter with a path": (lambda: call(adapter="../towers"), "invalid_adapter"),
    "broken adapter": (lambda: call(adapter="broken"), "invalid_adapter"),
    "long prompt": (lambda: call(prompts=("word " * 40,)), "invalid_prompt"),
    "empty prompt": (lambda: call(prompts=("crack", "")), "invalid_prompt"),
    "nothing asked": (lambda: call(prompts=()), "invalid_request"),
    "merge_iou without merge": (lambda: call(post_processing={"merge_iou": 0.3}), "invalid_request"),
    "nms_iou without nms": (lambda: call(post_processing={"nms": "none", "nms_iou": 0.3}), "invalid_request"),
    "no image": (lambda: replace(call(), image=ImageFile("0" * 64, b"no image")), "invalid_image"),
    "empty image": (lambda: replace(call(), image=ImageFile("1" * 64, b"")), "invalid_image"),
    "half an image": (
        lambda: replace(call(), image=ImageFile("2" * 64, (image().data or b"")[:2000])),
        "invalid_image",
    ),
    "image of no upload": (lambda: replace(call(), image=ImageFile("3" * 64)), "image_not_found"),
    "no time left": (lambda: call(timeout_s=-1), "timeout"),
}


async def test_errors_are_typed_values_and_the_replica_continues(play: Callable, root: Path, caplog: Any):
    async with play() as service:
        for name, (make, type) in FAILURES.items():
            error = await refused(service, make())
            assert error.type == type, name
            assert str(root) not in error.message, name
        good = [call(0), call(1)]
        mixed = await asyncio.gather(
            *(service.segment(one) for one in [good[0], *(make() for make, _ in FAILURES.values()), good[1]])
        )
        assert [reply.type for reply in mixed[1:-1]] == [type for _, type in FAILURES.values()]
        assert isinstance(mixed[0], SegmentReply)
        assert isinstance(mixed[-1], SegmentReply)
    # Only the call that the ingress would have refused is a fault to look into.
    assert {record.message.split("\n")[0] for record in caplog.records if record.levelno >= logging.ERROR} == {
        "a request failed with UserError"
    }


async def test_an_adapter_that_diverged_is_refused_and_answers_nothing_if_it_was_not_noticed(
    play: Callable, gate: Gate, spread_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, kind in (("good", "text"), ("diverged", "vision")):
        write_adapter(tmp_path / name, spread_base, kind, 1)
    weights = tmp_path / "diverged" / "adapter_model.safetensors"
    save_file({name: 1e30 * tensor for name, tensor in load_file(weights).items()}, weights)
    async with play(adapters=AdapterSettings(root=tmp_path)) as service:
        error = await refused(service, call(adapter="diverged"))
        assert (error.type, "NaN" in error.message) == ("invalid_adapter", True)
        expected = await answered(service, call(adapter="good"))
    # the test image showed nothing: its requests fail, and others of the same batch do not
    monkeypatch.setattr(gate, "check_adapter", lambda slot: None)
    async with play(gate, adapters=AdapterSettings(root=tmp_path)) as service:
        loaded = AdapterSettings(root=tmp_path, preload=("good", "diverged"))
        await service.reconfigure(loaded.model_dump(mode="json"))
        first = await gate.occupy(service)
        names = ("good", "diverged", None, "good")
        waiting = [asyncio.create_task(service.segment(call(adapter=name))) for name in names]
        while service._batcher.queue_length < len(names):
            await asyncio.sleep(0.001)
        gate.open.set()
        good, diverged, base, again = await asyncio.gather(*waiting)
        assert isinstance(diverged, ServeError)
        assert (diverged.type, "'diverged'" in diverged.message) == ("invalid_adapter", True)
        assert isinstance(base, SegmentReply)
        for reply in (good, again):
            np.testing.assert_allclose(reply.results[0].scores, expected.results[0].scores, atol=1e-5)
        await first


async def test_recorded_settings_hold_where_the_request_gives_none(
    play: Callable, gate: Gate, monkeypatch: pytest.MonkeyPatch
):
    recorded = PostProcessing(threshold=0.0, nms="none", max_detections=2)
    monkeypatch.setattr(adapter_store, "recorded_post_processing", lambda metadata: recorded)
    requested: list[dict[str, Any]] = [{}, {"nms": "box", "max_detections": 9}, {"threshold": 0.4}]
    async with play(engine=gate, limits=Limits(max_detections=5)) as service:
        for fields in requested:
            await answered(service, call(adapter="heads", post_processing=fields))
        await answered(service, call(post_processing={}))
    asked = [image.post for batch in gate.batches for image in batch]
    assert [(post.threshold, post.nms, post.max_detections) for post in asked] == [
        (0.0, "none", 2),
        (0.0, "box", 5),  # no more than the service allows
        (0.4, "none", 2),
        (0.5, "mask", 5),  # the base: the documented defaults
    ]


async def test_an_answer_beyond_the_limit_is_refused(play: Callable):
    async with play(limits=Limits(max_answer_bytes=200)) as service:
        few = call(post_processing={"threshold": 0.0, "max_detections": 1})
        assert isinstance(await service.segment(few), SegmentReply)
        many = call(prompts=("crack", "hole", "seam", "dent"), post_processing={"threshold": 0.0, "nms": "none"})
        assert (await refused(service, many)).type == "answer_too_large"


@pytest.mark.parametrize("fields", [{"nms": "mask", "nms_iou": 0.2}, {"merge": True}, {"nms": "box"}], ids=str)
async def test_without_masks_the_same_detections_are_found(play: Callable, gate: Gate, fields: dict[str, Any]):
    """Masks decide what is one object, whether or not the client wants to see them."""
    asked = call(post_processing={"threshold": 0.0, **fields})
    async with play(engine=gate) as service:
        (with_masks,) = (await answered(service, asked)).results
        (without,) = (await answered(service, replace(asked, masks=False))).results
        assert len(with_masks.rles) == len(with_masks) > 0
        assert without.rles is None
        np.testing.assert_array_equal(without.scores, with_masks.scores)
        np.testing.assert_array_equal(without.boxes_xyxy, with_masks.boxes_xyxy)


async def test_boxes_in_an_uploaded_image_are_checked_against_its_upright_size(play: Callable):
    async with play() as service:
        boxes = (BoxPrompt((0, 61, 59, 89)),)
        tall, wide = image(orientation=6), image(orientation=1)
        for file in (tall, wide):
            await service.keep_image(file)
        assert (await answered(service, replace(call(boxes=boxes), image=ImageFile(tall.key)))).size_hw == (90, 60)
        assert (await refused(service, replace(call(boxes=boxes), image=ImageFile(wide.key)))).type == "invalid_box"


async def test_an_uploaded_image_needs_no_second_vision_pass(play: Callable):
    async with play() as service:
        file, other = image(5), image(6)
        expected = await answered(service, call(5))
        for cached in (False, True):
            assert await service.keep_image(other) == ImageReply(other.key, (60, 90), cached=cached)
        encoded = await metric(service, "images_encoded_total")
        by_key = await answered(service, replace(call(), image=ImageFile(file.key)))
        assert_same(by_key.results, list(expected.results))
        await answered(service, replace(call(), image=ImageFile(other.key)))
        assert await metric(service, "images_encoded_total") == encoded


async def test_uploads_and_images_that_are_refused(play: Callable):
    async with play(limits=Limits(max_megapixels=0.001)) as service:
        for file, type in (
            (ImageFile("4" * 64, b"no image"), "invalid_image"),
            (ImageFile("4" * 64), "image_not_found"),
        ):
            reply = await service.keep_image(file)
            assert isinstance(reply, ServeError)
            assert reply.type == type
        assert (await refused(service, call())).type == "invalid_image"  # too large


async def test_settings_of_adapters_change_while_it_runs(play: Callable, root: Path):
    async with play() as service:
        await service.reconfigure(AdapterSettings(root=root, preload=("towers",)).model_dump(mode="json"))
        listed = {row.id: AdapterResponse.model_validate_json(row.json) for row in (await service.list_adapters()).rows}
        assert [(id, info.resident) for id, info in listed.items()] == [
            ("broken", False),
            ("heads", False),
            ("towers", True),
        ]
        assert listed["towers"].adapts == ["vision_encoder", "detr_decoder"]
        assert listed["broken"].error
        await service.reconfigure({"root": str(root), "allowed": ["heads"]})
        assert [row.id for row in (await service.list_adapters()).rows] == ["heads"]
        assert (await refused(service, call(adapter="towers"))).type == "adapter_not_found"
        with pytest.raises(pydantic.ValidationError):
            await service.reconfigure({"roots": "typo"})
        await answered(service, call(adapter="heads"))


async def test_the_metrics_of_a_replica(play: Callable):
    async with play(batching=Batching(max_rows=2)) as service:
        await asyncio.gather(*(answered(service, call(seed, adapter="heads")) for seed in range(3)))
        expected = {"adapter_loads_total": 1, "adapters_resident": 1, "queue_length": 0, "images_encoded_total": 3}
        assert {name: await metric(service, name) for name in expected} == expected
        name, text = await service.named_metrics()
        assert name
        assert 'sam3lora_stage_duration_seconds_count{stage="masks"} 3.0' in text


def test_a_missing_model_fails_at_the_start(tmp_path: Path):
    with pytest.raises(ValueError, match="missing"):
        ModelReplica(ServeSettings(model=str(tmp_path / "missing"), local_files_only=True))
