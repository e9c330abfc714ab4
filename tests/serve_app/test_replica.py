"""A replica with a real small model, without Ray."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine import selection
from sam3lora.engine.detections import BoxPrompt, Detections
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.selection import SmallDetections
from sam3lora.model.loading import LoadedBase
from serve_app.http.errors import ServeError
from serve_app.http.schemas import AdapterResponse
from serve_app.messages import ImageFile, ImageReply, SegmentCall, SegmentReply
from serve_app.metrics import STAGES
from serve_app.replica import adapter_store, mask_encoder, replica
from serve_app.replica.replica import ModelReplica
from serve_app.settings import AdapterSettings, Batching, Limits, ServeSettings

from ..engine.engine_cases import write_adapter

pytestmark = pytest.mark.anyio
LONG_S = 60.0
POST = {"threshold": 0.0, "max_detections": 3}
BOX = BoxPrompt((4.0, 5.0, 40.0, 44.0))


@pytest.fixture(scope="module")
def root(spread_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters and a broken one."""
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(root / "towers", spread_base, "vision", 1)
    write_adapter(root / "heads", spread_base, "no cls", 2)
    write_adapter(root / "broken", spread_base, "text", 3)
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"junk")
    return root


def image(seed: int = 0, size_hw: tuple[int, int] = (60, 90), orientation: int = 1) -> ImageFile:
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8))
    exif = picture.getexif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    return ImageFile(hashlib.sha256(file.getvalue()).hexdigest(), file.getvalue())


def call(seed: int = 0, prompts: tuple[str, ...] = ("crack",), **options: Any) -> SegmentCall:
    return SegmentCall(image(seed), prompts, **({"post_processing": POST, "timeout_s": LONG_S} | options))


class Gate(Engine):
    """The real model; while closed, `detect_small` waits with the batch in hand."""

    def __init__(self, base: LoadedBase, **options: Any) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[PromptedImage]] = []
        self.decoded: list[str] = []
        self.error: Callable[[list[PromptedImage]], Exception | None] = lambda images: None
        super().__init__(base, **options)

    def warm_up(self) -> None:
        pass

    def prepare_image(self, data: Any, key: str, **options: Any) -> Any:
        self.decoded.append(key)
        return super().prepare_image(data, key, **options)

    def detect_small(self, images: Any) -> list[list[SmallDetections] | Exception]:
        if images:
            self.batches.append(list(images))
            self.entered.release()
            assert self.open.wait(LONG_S)
            if error := self.error(images):
                raise error
        return super().detect_small(images)

    async def busy(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=LONG_S)

    async def occupy(self, service: ModelReplica, seed: int = 0) -> asyncio.Task[SegmentReply]:
        """The model has the batch of a first request in hand, until `open` is set."""
        self.open.clear()
        first = asyncio.create_task(answered(service, call(seed)))
        await self.busy()
        return first


@pytest.fixture
def gate(spread_base: Path) -> Gate:
    return Gate.load(str(spread_base), device="cpu", num_slots=2)


async def answered(service: ModelReplica, one: SegmentCall) -> SegmentReply:
    reply = await service.segment(one)
    assert isinstance(reply, SegmentReply), reply
    return reply


async def refused(service: ModelReplica, one: SegmentCall) -> ServeError:
    reply = await service.segment(one)
    assert isinstance(reply, ServeError), reply
    return reply


async def metric(service: ModelReplica, name: str) -> int:
    found = re.search(rf"^sam3lora_{name} (.+)$", (await service.named_metrics())[1], re.MULTILINE)
    assert found, name
    return int(float(found[1]))


async def until_queued(service: ModelReplica, num: int) -> None:
    """So many prepared requests wait for the model."""
    await until(lambda: service._batcher.queue_length == num)


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def assert_same(found: Any, expected: list[Detections]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.prompt, one.size_hw, len(one)) == (other.prompt, other.size_hw, len(other))
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=1e-3)
        assert (one.rles is None) == (other.rles is None)
        if one.rles is not None:
            np.testing.assert_allclose(one.areas_px, other.areas_px, atol=5)


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


async def test_concurrent_equal_images_are_decoded_once(play: Callable, gate: Gate):
    async with play(engine=gate) as service:
        first = await gate.occupy(service)
        same = [asyncio.create_task(answered(service, call(7))) for _ in range(10)]
        await until_queued(service, 10)
        same.append(asyncio.create_task(answered(service, call(7))))  # decoded, but not yet known to the model
        await until_queued(service, 11)
        gate.open.set()
        await asyncio.gather(first, *same)
        await answered(service, call(7))  # in the cache
    assert gate.decoded.count(image(7).key) == 1


async def test_one_of_many_waiting_for_a_decoder_may_leave(play: Callable, gate: Gate, monkeypatch: pytest.MonkeyPatch):
    go, begun = threading.Event(), threading.Event()
    decode = gate.prepare_image

    def slow(*args: Any, **options: Any) -> Any:
        begun.set()
        assert go.wait(LONG_S)
        return decode(*args, **options)

    async with play(engine=gate) as service:
        monkeypatch.setattr(gate, "prepare_image", slow)
        leaving, staying = (asyncio.create_task(service.segment(call())) for _ in range(2))
        assert await asyncio.to_thread(begun.wait, LONG_S)
        leaving.cancel()
        await asyncio.wait([leaving])
        go.set()
        assert isinstance(await staying, SegmentReply)
    assert len(gate.decoded) == 1


@pytest.mark.parametrize(("status", "type"), [(503, "overloaded"), (429, "too_many_requests")])
async def test_one_request_too_many_is_refused_before_it_is_decoded(play: Callable, gate: Gate, status: int, type: str):
    async with play(engine=gate, limits=Limits(max_queued=2, overload_status=status)) as service:
        first = await gate.occupy(service)
        waiting = [asyncio.create_task(service.segment(call(seed))) for seed in (1, 2, 3, 4)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        await until(lambda: sum(task.done() for task in waiting) == 2)
        gate.open.set()
        await first
        replies = await asyncio.gather(*waiting)
        assert [isinstance(reply, SegmentReply) for reply in replies] == [True, True, False, False]
        assert [(reply.type, reply.retry_after_s >= 1) for reply in replies[2:]] == [(type, True)] * 2
    assert set(gate.decoded) == {image(seed).key for seed in (0, 1, 2)}


async def test_a_request_that_ends_while_it_waits_is_not_computed(play: Callable, gate: Gate):
    async with play(engine=gate) as service:
        await answered(service, call(1, adapter="towers"))
        await gate.busy()
        first = await gate.occupy(service)
        leaving = asyncio.create_task(service.segment(call(1, adapter="towers")))
        await until_queued(service, 1)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert await metric(service, "queue_length") == 0
        assert (await refused(service, call(1, timeout_s=0.05))).type == "timeout"
        gate.open.set()
        await first
    assert [len(batch) for batch in gate.batches] == [1, 1]


async def test_when_memory_runs_out_features_are_dropped_and_batches_halved(play: Callable, gate: Gate):
    async with play(engine=gate) as service:
        gate.error = lambda images: torch.OutOfMemoryError("CUDA out of memory") if len(images) > 1 else None
        first = await gate.occupy(service)
        rest = [asyncio.create_task(answered(service, call(seed))) for seed in (1, 2)]
        await until_queued(service, 2)
        gate.open.set()
        await asyncio.gather(first, *rest)
        gate.error = lambda images: torch.OutOfMemoryError("CUDA out of memory")
        error = await refused(service, call(3))
        assert error.type == "out_of_memory"
        assert error.retry_after_s is not None
        assert "sam3lora_out_of_memory_total 2.0" in (await service.named_metrics())[1]
    assert [len(batch) for batch in gate.batches] == [1, 2, 1, 1, 1, 1]


async def test_a_bug_is_logged_without_client_text(play: Callable, gate: Gate, caplog: Any):
    async with play(engine=gate) as service:
        gate.error = lambda images: KeyError(images[0].prompts[0])
        error = await refused(service, call(prompts=("secret prompt",)))
        assert (error.type, "secret" in error.message) == ("internal", False)
    assert "KeyError" in caplog.text
    assert "test_replica.py" in caplog.text  # where it came from
    assert "secret" not in caplog.text


async def test_failures_keep_no_images_alive(play: Callable, gate: Gate):
    """A remembered failure must not hold the request that met it."""
    async with play(engine=gate) as service:
        calls = [call(adapter="broken", prompts=("crack", f"number {number}")) for number in range(3)]
        prompts = {one.prompts for one in calls}
        for one in calls:
            assert (await refused(service, one)).type == "invalid_adapter"
        del calls, one
        gc.collect()
        alive = [found for found in gc.get_objects() if type(found) is SegmentCall and found.prompts in prompts]
        assert not alive


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


async def test_a_closing_replica_finishes_its_calls_and_refuses_new_ones(play: Callable, gate: Gate):
    async with play(engine=gate) as service:
        assert await service.ready()
        first = await gate.occupy(service)
        second = asyncio.create_task(answered(service, call(1, adapter="heads")))
        while await metric(service, "queue_length") != 1:  # its adapter waits for the model thread
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(service.close())
        await asyncio.sleep(0)
        assert not await service.ready()
        assert (await refused(service, call(2))).type == "not_ready"
        assert not closing.done()
        gate.open.set()
        await asyncio.gather(first, second, closing)


async def test_a_stuck_model_is_unhealthy(play: Callable, gate: Gate, monkeypatch: pytest.MonkeyPatch):
    async with play(engine=gate) as service:
        service.check_health()
        gate.open.clear()
        first = asyncio.create_task(service.segment(call(0)))
        await gate.busy()
        service.check_health()  # busy, but not for long
        monkeypatch.setattr(replica, "STUCK_AFTER_S", 0.0)
        monkeypatch.setattr(service, "_limits", Limits(timeout_s=1e-9))
        with pytest.raises(RuntimeError, match="busy"):
            service.check_health()
        gate.open.set()
        await first
        await answered(service, call(1))
        service.check_health()


async def test_a_failed_device_is_unhealthy_and_runs_nothing_more(
    play: Callable, gate: Gate, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []

    def fail(images: list[PromptedImage]) -> Any:
        asked.append(len(images))
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    async with play(engine=gate) as service:
        first = await gate.occupy(service)
        service.check_health()
        rest = [asyncio.create_task(refused(service, call(seed))) for seed in (1, 2)]
        await until_queued(service, 2)
        gate.error = lambda images: monkeypatch.setattr(gate, "_run", fail) if len(images) > 1 else None
        gate.open.set()
        await first
        assert [(await error).type for error in rest] == ["replica_failed"] * 2
        with pytest.raises(RuntimeError, match="device"):
            service.check_health()
        for one in (call(3), call(3, adapter="towers")):
            assert (await refused(service, one)).type == "replica_failed"
    assert asked == [2]  # neither one by one nor for those that came later


async def test_a_device_that_fails_at_an_upload_or_a_slot_is_reported(
    play: Callable, spread_base: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async def upload(service: ModelReplica) -> None:
        reply = await service.keep_image(image(1))
        assert isinstance(reply, ServeError)
        assert reply.type == "replica_failed"

    async def place(service: ModelReplica) -> None:
        assert (await refused(service, call(adapter="towers"))).type == "replica_failed"

    for name, act in (("keep_image", upload), ("place_adapter", place)):
        engine = Gate.load(str(spread_base), device="cpu", num_slots=2)
        monkeypatch.setattr(engine, name, fail)

        async with play(engine=engine) as service:
            service.check_health()
            await act(service)
            with pytest.raises(RuntimeError, match="device"):
                service.check_health()


class SlowMasks:
    """In place of `encode_logits`; while closed, it waits with a mask in hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.num = 0
        self._encode = selection.encode_logits
        monkeypatch.setattr(selection, "encode_logits", self)

    def __call__(self, *args: Any) -> Any:
        self.num += 1
        self.entered.release()
        assert self.open.wait(LONG_S)
        return self._encode(*args)

    async def busy(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=LONG_S)


async def test_requests_that_wait_for_masks_count_as_queued(
    play: Callable, gate: Gate, monkeypatch: pytest.MonkeyPatch
):
    masks = SlowMasks(monkeypatch)
    async with play(engine=gate, limits=Limits(max_queued=2)) as service:
        first = [asyncio.create_task(answered(service, call(seed))) for seed in (0, 1)]
        await masks.busy()
        await masks.busy()
        assert (await refused(service, call(2))).type == "overloaded"
        masks.open.set()
        await asyncio.gather(*first)
        await answered(service, call(2))


async def test_every_stage_works_on_another_request_at_the_same_time(
    play: Callable, gate: Gate, monkeypatch: pytest.MonkeyPatch
):
    masks = SlowMasks(monkeypatch)
    async with play(engine=gate, batching=Batching(encode_ahead=True)) as service:
        first = asyncio.create_task(answered(service, call(0)))
        await masks.busy()  # its masks are being encoded, until `masks.open` is set
        await gate.busy()
        second = await gate.occupy(service, 1)
        third = asyncio.create_task(answered(service, call(2)))
        await until(lambda: (known := gate.cached_image(image(2).key)) and gate.has_features(known, None))
        gate.open.set()
        await gate.busy()  # the third is in the model
        assert not any(task.done() for task in (first, second, third))
        masks.open.set()
        await asyncio.gather(first, second, third)
    assert [len(batch) for batch in gate.batches] == [1, 1, 1]
    assert [asked.image.features is not None for (asked,) in gate.batches] == [False, False, True]
    assert await metric(service, "images_encoded_total") == 3


async def test_an_uploaded_image_may_be_encoded_ahead(play: Callable, gate: Gate):
    async with play(engine=gate, batching=Batching(encode_ahead=True)) as service:
        first = await gate.occupy(service)
        upload = asyncio.create_task(service.keep_image(image(1)))
        await until(lambda: (known := gate.cached_image(image(1).key)) and gate.has_features(known, None))
        gate.open.set()
        await first
        assert await upload == ImageReply(image(1).key, (60, 90), cached=False)
        await answered(service, replace(call(1), image=ImageFile(image(1).key)))
        assert await metric(service, "images_encoded_total") == 2


async def test_encoding_ahead_can_be_switched_off(play: Callable, gate: Gate):
    async with play(engine=gate) as service:
        first = await gate.occupy(service)
        rest = [asyncio.create_task(answered(service, call(seed))) for seed in (1, 2)]
        await until_queued(service, 2)
        gate.open.set()
        await asyncio.gather(first, *rest)
    assert [asked.image.features for batch in gate.batches for asked in batch] == [None] * 3


@pytest.mark.parametrize("how", ["timeout", "cancel"])
async def test_masks_of_a_request_that_ended_are_not_encoded(
    play: Callable, gate: Gate, monkeypatch: pytest.MonkeyPatch, how: str
):
    masks = SlowMasks(monkeypatch)
    async with play(engine=gate) as service:
        await service.keep_image(image())  # leaves little to do before the masks
        task = asyncio.create_task(service.segment(call(timeout_s=2.0 if how == "timeout" else LONG_S)))
        await masks.busy()
        if how == "cancel":
            task.cancel()
            await asyncio.wait([task])
        else:
            reply = await task
            assert isinstance(reply, ServeError)
            assert (reply.type, "masks" in reply.message) == ("timeout", True)
        masks.open.set()  # one mask is being encoded
        reply = await answered(service, call())
        assert masks.num == 1 + sum(map(len, reply.results))


async def test_the_model_pauses_while_answers_hold_too_much_memory(
    play: Callable, gate: Gate, root: Path, monkeypatch: pytest.MonkeyPatch
):
    masks = SlowMasks(monkeypatch)
    monkeypatch.setattr(mask_encoder, "MAX_WAITING_BYTES", 1)
    async with play(engine=gate) as service:
        first = await gate.occupy(service)
        rest = [asyncio.create_task(answered(service, call(seed))) for seed in (1, 2)]
        late = asyncio.create_task(refused(service, call(3, timeout_s=2.0)))
        await until_queued(service, 3)
        gate.open.set()
        await masks.busy()
        assert (await late).type == "timeout"
        await service.reconfigure({"root": str(root), "preload": ["towers"]})  # other work in the model thread goes on
        assert await metric(service, "adapters_resident") == 1
        assert len(gate.batches) == 1
        masks.open.set()
        await asyncio.gather(first, *rest)
    assert [len(batch) for batch in gate.batches] == [1, 2]


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
