"""What a replica does when memory runs out, the model is stuck or its device fails."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sam3lora.engine.engine import PromptedImage
from serve_app.http.errors import ServeError
from serve_app.messages import SegmentCall
from serve_app.replica import replica
from serve_app.replica.replica import ModelReplica
from serve_app.settings import Limits

from .replica_cases import (
    Gate,
    answered,
    call,
    image,
    refused,
    until_queued,
)

pytestmark = pytest.mark.anyio


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
    assert "replica_cases.py" in caplog.text  # where it came from
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
        gate.error = lambda images: monkeypatch.setattr(gate._finder, "run", fail) if len(images) > 1 else None
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
