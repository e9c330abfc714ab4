"""Clients that know the right answers: every 200 is compared, everything else must be an error in the agreed form."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from sam3lora.engine.detections import Detections
from serve_app.http.errors import STATUS_OF

from .ray_service import wait_until

CLIENT_S = 90.0


@dataclass(frozen=True)
class Case:
    """A request and its right answers: any of `expected`."""

    image: bytes = field(repr=False)
    fields: dict[str, Any]
    expected: tuple[Sequence[Detections], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Sample:
    """What became of a request. `kind`: "ok", "wrong", a type of `ServeError`, "untyped" or "broken connection".

    `answer` is the number of the right answer that came, -1 where there was none.
    """

    kind: str
    case: int
    began: float
    seconds: float
    answer: int = -1
    retry_after: str | None = None
    detail: str = ""


@dataclass
class Load:
    """Samples so far, in the order in which they ended."""

    samples: list[Sample] = field(default_factory=list)

    def kinds(self, since: float = 0.0) -> Counter[str]:
        """How many of each kind, of requests that began at or after a time of `time.monotonic`."""
        return Counter(sample.kind for sample in self.samples if sample.began >= since)

    def wait_ok(self, count: int, *, since: float = 0.0, timeout_s: float = 240.0) -> None:
        """Until so many right answers came to requests that began at or after `since`.

        Raises:
            AssertionError: A wrong answer came.
        """

        def is_reached() -> bool:
            kinds = self.kinds(since)
            assert not self.kinds()["wrong"], self.failures()[-1]
            return kinds["ok"] >= count

        wait_until(is_reached, timeout_s)

    def failures(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.kind != "ok"]


@contextlib.contextmanager
def running_load(url: str, cases: Sequence[Case], *, clients: int = 8) -> Iterator[Load]:
    """Closed-loop clients in a thread, which take the cases in turns until the block ends."""
    load, stop = Load(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_clients(url, cases, clients, load, stop)))
    thread.start()
    try:
        yield load
    finally:
        stop.set()
        thread.join()


def send_all(url: str, cases: Sequence[Case], *, clients: int = 1) -> Load:
    """Each case once."""
    load = Load()
    asyncio.run(_clients(url, cases, clients, load, None))
    return load


async def ask(session: aiohttp.ClientSession, url: str, case: Case, number: int = 0) -> Sample:
    """One request, judged."""
    began = time.monotonic()

    def sample(kind: str, **more: Any) -> Sample:
        return Sample(kind, number, began, time.monotonic() - began, **more)

    form = aiohttp.FormData()
    form.add_field("image", case.image, filename="image.png")
    form.add_field("request", json.dumps(case.fields))
    try:
        async with session.post(f"{url}/v1/segment", data=form) as response:
            body, status, headers = await response.read(), response.status, response.headers
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        return sample("broken connection", detail=repr(error))
    try:
        reply = json.loads(body)
        if status == 200:
            right = [n for n, one in enumerate(case.expected) if is_same(reply["results"], one)]
            return sample("ok", answer=right[0]) if right else sample("wrong", detail=str(reply["results"])[:300])
        kind = reply["error"]["type"]
        assert STATUS_OF[kind] == status
        assert reply["error"]["request_id"] == headers["X-Request-ID"]
    except (ValueError, KeyError, TypeError, AssertionError):
        return sample("untyped", detail=f"{status} {body[:300]!r}")
    return sample(kind, retry_after=headers.get("Retry-After"), detail=reply["error"]["message"])


def is_same(results: Sequence[Any], expected: Sequence[Detections]) -> bool:
    """Whether a reply says what the model finds; batches differ in the last digits."""
    if [one["prompt"] for one in results] != [one.prompt for one in expected]:
        return False
    for one, known in zip(results, expected, strict=True):
        found = one["detections"]
        if len(found) != len(known):
            return False
        if not np.allclose([each["score"] for each in found], known.scores, atol=1e-4):
            return False
        boxes = np.reshape([each["box_xyxy"] for each in found], (-1, 4))
        areas = [each["area_px"] for each in found]
        if not np.allclose(boxes, known.boxes_xyxy, atol=0.1) or not np.allclose(areas, known.areas_px, atol=9):
            return False
    return True


async def _clients(url: str, cases: Sequence[Case], clients: int, load: Load, stop: threading.Event | None) -> None:
    turns = iter(enumerate(cases)) if stop is None else itertools.cycle(enumerate(cases))

    async def client() -> None:
        for number, case in turns:
            if stop is not None and stop.is_set():
                return
            load.samples.append(await ask(session, url, case, number))
            if load.samples[-1].kind == "broken connection":
                await asyncio.sleep(0.05)  # nobody is there

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=CLIENT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(client() for _ in range(clients)))
