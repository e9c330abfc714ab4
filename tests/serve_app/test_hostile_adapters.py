"""A replica among adapter folders that an attacker wrote: others are answered throughout, and rightly."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from sam3lora.engine.detections import Detections
from serve_app.http.errors import ServeError
from serve_app.http.schemas import AdapterResponse
from serve_app.messages import SegmentCall, SegmentReply
from serve_app.replica.replica import ModelReplica
from serve_app.settings import AdapterSettings, Limits, ServeSettings

from ..engine.engine_cases import write_adapter
from .hostile_adapters import write_hostile
from .ray_service import start_service
from .replica_cases import image
from .small_service import SmallService, fields

pytestmark = pytest.mark.anyio
REFUSED = {"invalid_adapter", "adapter_not_found"}
PORT = 18837
PATIENCE_S = 20.0  # of a busy machine; what an expression in `re` takes is minutes


def numbers(found: Detections) -> list[float]:
    return [found.presence, *found.scores.tolist(), *found.boxes_xyxy.ravel().tolist()]


@pytest.fixture
def root(tmp_path: Path, spread_base: Path) -> Path:
    for seed, (name, kind) in enumerate({"good": "text", "towers": "vision", "shapes": "geometry"}.items()):
        write_adapter(tmp_path / name, spread_base, kind, seed)
    return tmp_path


@pytest.mark.parametrize("count", [54, pytest.param(200, marks=pytest.mark.slow)])
async def test_a_replica_answers_others_throughout(root: Path, spread_base: Path, count: int):
    hostile = write_hostile(root, root / "towers", count, seed=count)
    settings = ServeSettings(
        model=str(spread_base),
        adapters=AdapterSettings(root=root),
        max_resident_adapters=4,
        torch_threads=1,
        limits=Limits(timeout_s=60),
    )
    service = ModelReplica(settings)

    async def ask(adapter: str | None) -> SegmentReply | ServeError:
        post = {"threshold": 0.0, "max_detections": 3}
        return await service.segment(SegmentCall(image(), ("crack",), (), adapter, post, timeout_s=60))

    expected = {}
    for adapter in (None, "good"):
        reply = await ask(adapter)
        assert isinstance(reply, SegmentReply)
        expected[adapter] = numbers(reply.results[0])
    slowest_s, done = 0.0, asyncio.Event()

    async def others() -> None:
        nonlocal slowest_s
        while not done.is_set():
            for adapter, right in expected.items():
                started = time.monotonic()
                reply = await ask(adapter)
                slowest_s = max(slowest_s, time.monotonic() - started)
                assert isinstance(reply, SegmentReply), reply
                assert numbers(reply.results[0]) == pytest.approx(right, abs=1e-3)
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(others())
    before = listed(await service.list_adapters())
    served, at_once = set(), asyncio.Semaphore(3)

    async def attack(adapter: str) -> None:
        async with at_once:
            reply = await ask(adapter)
        if isinstance(reply, ServeError):
            assert reply.type in REFUSED, (adapter, reply)
            check_message(adapter, reply.message, root)
        else:
            served.add(adapter)
            assert all(map(math.isfinite, numbers(reply.results[0]))), adapter

    async with asyncio.timeout(300):
        await asyncio.gather(*map(attack, hostile))
    after = listed(await service.list_adapters())
    done.set()
    await watching
    await service.close()
    print(f"{count} folders: {len(served)} served, slowest answer of others {slowest_s:.2f} s")
    assert slowest_s < PATIENCE_S
    assert 0 < len(served) < count
    assert {"good", "towers", "shapes"} <= {id for id, info in after.items() if info.error is None}
    for adapter in hostile:
        if adapter not in served and adapter in after:
            assert after[adapter].error, adapter
    # what is refused from files alone is known before anybody asks
    assert {id for id, info in before.items() if info.error} <= {id for id, info in after.items() if info.error}
    assert sum(info.error is not None for info in before.values()) > count / 3


def listed(page: Any) -> dict[str, AdapterResponse]:
    return {row.id: AdapterResponse.model_validate_json(row.json) for row in page.rows}


def check_message(adapter: str, message: str, root: Path) -> None:
    """For people: short, without paths, patterns or names of exceptions."""
    assert 10 < len(message) < 1000, (adapter, message)
    assert message.isprintable(), (adapter, message)
    assert str(root) not in message, (adapter, message)
    assert not any(word in message for word in ("Traceback", "Error:", "RuntimeError", "[A-Za-z0-9]")), message


@pytest.mark.slow
def test_the_service_on_ray_answers_others_throughout(tmp_path: Path, spread_base: Path):
    small = SmallService(tmp_path, base=spread_base)
    hostile = write_hostile(small.root, small.root / "towers", 200, seed=3)
    (small.root / "my adapter").mkdir()
    shutil.copy(small.root / "towers" / "adapter_config.json", small.root / "my adapter")
    with start_service(PORT) as service, httpx.Client(base_url=service.url, timeout=60) as client:
        service.deploy(small.settings())

        def scores_of(answer: httpx.Response) -> list[float]:
            assert answer.status_code == 200, answer.text
            results = answer.json()["results"]
            return [one["score"] for result in results for one in result["detections"]]

        def ask(adapter: str | None) -> httpx.Response:
            form = {"request": json.dumps(fields(adapter))}
            return client.post("/v1/segment", files={"image": ("image", image().data)}, data=form)

        expected = {adapter: scores_of(ask(adapter)) for adapter in (None, "heads")}
        pids = service.pids()
        times: list[float] = []

        def attack(adapter: str) -> None:
            reply = ask(adapter)
            if reply.status_code != 200:
                assert reply.json()["error"]["type"] in REFUSED, (adapter, reply.text)
            assert not {"NaN", "null", "Infinity"} & set(reply.text.replace(",", ":").split(":")), adapter

        with ThreadPoolExecutor(4) as attackers:
            started = time.monotonic()
            assert client.get("/v1/adapters?limit=1000").json()["total"] > len(hostile) / 2
            listing_s = time.monotonic() - started
            running = [attackers.submit(attack, adapter) for adapter in hostile]
            while not all(one.done() for one in running):
                for adapter, right in expected.items():
                    started = time.monotonic()
                    assert scores_of(ask(adapter)) == pytest.approx(right, abs=1e-3)
                    times.append(time.monotonic() - started)
            for one in running:
                one.result()
        print(f"first listing {listing_s:.2f} s; {len(times)} answers of others: ", end="")
        print(", ".join(f"{share:.0%} in {np.quantile(times, share):.2f} s" for share in (0.5, 0.95, 1)))
        assert max(times) < PATIENCE_S
        assert service.pids() == pids
        found = {one["id"]: one["error"] for one in client.get("/v1/adapters").json()["adapters"]}
        assert "rename" in found["my adapter"]
        assert os.path.isdir(small.root)
