"""The whole service on a real Ray: replicas that are killed, too much load, clients that leave."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from PIL import Image

from sam3lora.client import Client, InvalidRequest
from sam3lora.inference.dense.predictor import DensePredictor

from ..model.dense.dense_cases import write_dense
from .checked_load import Case, Load, Sample, ask, is_same, running_load, send_all
from .ray_service import RayService, get, start_service, wait_until
from .small_service import ADAPTERS, IMAGES, SmallService, fields

pytestmark = pytest.mark.slow
PORT = 18810
WORDS = [f"crack {letter}" for letter in "abcdefghijklmnop"]
UNAVAILABLE = {"replica_failed", "not_ready", "overloaded"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallService:
    return SmallService(tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def cases(small: SmallService) -> list[Case]:
    found = small.cases()
    for one, other in itertools.combinations(found, 2):  # a mix-up would be seen
        assert not is_same(_as_reply(one), other.expected[0])
    return found


@pytest.fixture(scope="module")
def service() -> Iterator[RayService]:
    with start_service(PORT) as service:
        yield service


def _as_reply(case: Case) -> list[dict]:
    return [
        {
            "prompt": one.prompt,
            "detections": [
                {"score": score, "box_xyxy": box, "area_px": area}
                for score, box, area in zip(one.scores, one.boxes_xyxy, one.areas_px, strict=True)
            ],
        }
        for one in case.expected[0]
    ]


def assert_only(load: Load, allowed: set[str]) -> None:
    """Nothing but right answers and these errors, the 503 among them with `Retry-After`."""
    for sample in load.failures():
        assert sample.kind in allowed, sample
        assert sample.kind not in UNAVAILABLE or int(sample.retry_after or 0) >= 1, sample


def kill_under_load(service: RayService, cases: list[Case], deployment: str, num_replicas: int) -> tuple[Load, float]:
    """SIGKILL one of the replicas; gives the load and when all were there again."""
    with running_load(service.url, cases) as load:
        load.wait_ok(60)
        victim = service.pids(deployment)[0]
        os.kill(victim, signal.SIGKILL)
        if deployment == "Segmenter" and num_replicas == 1:
            wait_until(lambda: get(f"{service.url}/readyz")[0] == 503)
        wait_until(lambda: victim not in (alive := service.pids(deployment)) and len(alive) == num_replicas)
        service.wait_running(**{deployment: num_replicas})
        recovered = time.monotonic()
        load.wait_ok(60, since=recovered)
    print(deployment, num_replicas, load.kinds(), {s.detail for s in load.failures()})
    return load, recovered


def test_equal_images_go_to_the_same_replica(service: RayService, small: SmallService) -> None:
    service.deploy(small.settings(replicas=2))
    service.wait_running(Segmenter=2, Ingress=1)
    assert set(send_all(service.url, small.cases([None]) * 3).kinds()) == {"ok"}
    assert metric(service, "sam3lora_images_encoded_total") == len(IMAGES)
    assert [json.loads(get(f"{service.url}/v1/adapters")[1])["adapters"][n]["id"] for n in range(3)] == sorted(ADAPTERS)


def test_labels_of_a_dense_adapter(service: RayService, small: SmallService, tmp_path: Path) -> None:
    """Through all processes of the service, beside a prompted adapter, as the predictor gives them."""
    write_dense(small.base, tmp_path / "gears")
    shutil.copytree(small.root / "towers", tmp_path / "towers")
    service.deploy(small.settings(adapters={"root": str(tmp_path)}))
    service.wait_running(Segmenter=1, Ingress=1)
    expected = DensePredictor(tmp_path / "gears", device="cpu")
    with Client(service.url) as client:
        assert {one.id: one.task for one in client.adapters()} == {"gears": "dense", "towers": "detection"}
        for data in IMAGES[:2]:
            (result,) = expected.predict([np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))])
            labels = client.dense(data, "gears")
            assert (labels.label_HW != result.label_HW).mean() < 0.001
            assert client.segment(data, ["crack"], adapter="towers", threshold=0.0)[0].num_detections > 0
        for question in (
            lambda: client.segment(IMAGES[0], ["a"], adapter="gears"),
            lambda: client.dense(IMAGES[0], "towers"),
        ):
            with pytest.raises(InvalidRequest) as refused:
                question()
            assert refused.value.type == "wrong_task"


@pytest.mark.parametrize(
    ("settings", "deployment", "replicas"),
    [
        ({"replicas": 2}, "Segmenter", {"Segmenter": 2, "Ingress": 1}),
        ({"limits": {"timeout_s": 60}}, "Segmenter", {"Segmenter": 1, "Ingress": 1}),
        ({"ingress_replicas": 2}, "Ingress", {"Segmenter": 1, "Ingress": 2}),
    ],
    ids=["one of two segmenters", "the only segmenter", "one of two ingresses"],
)
def test_a_replica_is_killed(
    service: RayService,
    small: SmallService,
    cases: list[Case],
    settings: dict[str, Any],
    deployment: str,
    replicas: dict[str, int],
) -> None:
    service.deploy(small.settings(**settings))
    service.wait_running(**replicas)
    load, recovered = kill_under_load(service, cases, deployment, replicas[deployment])
    # Serve's proxy answers for a dead ingress, in words of its own: 500, as plain text.
    assert_only(load, UNAVAILABLE | ({"untyped"} if deployment == "Ingress" else set()))
    assert load.kinds()["untyped"] <= 8  # clients
    if replicas["Segmenter"] == 2:
        assert len(load.failures()) < 0.05 * len(load.samples)
    assert set(load.kinds(since=recovered)) == {"ok"}


def test_overload_is_refused_at_once_and_the_rest_is_answered(service: RayService, small: SmallService) -> None:
    limits = {"max_queued": 8, "timeout_s": 20}
    service.deploy(small.settings(limits=limits, batching={"max_rows": 8, "max_images": 1}))
    service.wait_running(Segmenter=1, Ingress=1)
    heavy = Case(
        IMAGES[0], fields(None, prompts=[*WORDS, *(f"{word} hole" for word in WORDS)], nms="box", masks="none")
    )
    load = send_all(service.url, [heavy] * 64, clients=64)
    refused = [sample for sample in load.samples if sample.kind == "overloaded"]
    accepted = [sample for sample in load.samples if sample.kind == "wrong"]  # 200; what was found is not compared
    print(load.kinds(), np.percentile([s.seconds for s in refused], [50, 99]), max(s.seconds for s in accepted))
    assert len(refused) + len(accepted) == 64, load.kinds()
    assert_only(Load(refused), {"overloaded"})
    assert len(accepted) >= 8
    # They do not wait for those who were let in.
    assert np.median([_ended(sample) for sample in refused]) < max(_ended(sample) for sample in accepted)
    assert max(sample.seconds for sample in accepted) <= limits["timeout_s"] + 1
    assert set(send_all(service.url, small.cases([None])).kinds()) == {"ok"}


def test_a_request_of_a_disconnected_client_is_not_computed(service: RayService, small: SmallService) -> None:
    limits = {"max_prompts": 64, "timeout_s": 60}
    service.deploy(small.settings(limits=limits, batching={"max_rows": 64}, max_resident_adapters=1))
    service.wait_running(Segmenter=1, Ingress=1)
    towers = small.cases(["towers"])
    assert set(send_all(service.url, towers).kinds()) == {"ok"}
    rows = metric(service, "sam3lora_rows_total")
    # Batches of 64 rows, one after the other: those who leave wait behind most of them.
    blocker = Case(IMAGES[0], fields("towers", prompts=[f"{one} {two}" for one in WORDS[:8] for two in WORDS[:8]]))
    waiting = Case(IMAGES[1], fields("towers", prompts=WORDS))
    num_blockers = 8

    async def leave() -> None:
        async with aiohttp.ClientSession() as session:
            blocking = [asyncio.create_task(ask(session, service.url, blocker)) for _ in range(num_blockers)]
            # One more than these is that of /metrics.
            await until(lambda: metric(service, "sam3lora_requests_in_flight") >= num_blockers + 1)
            leaving = [asyncio.create_task(ask(session, service.url, waiting)) for _ in range(6)]
            await until(
                lambda: (
                    metric(service, "sam3lora_requests_in_flight") >= num_blockers + 7
                    or any(one.done() for one in blocking)
                )
            )
            for one in leaving:
                one.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            assert {one.kind for one in await asyncio.gather(*blocking)} == {"wrong"}  # 200; the rest is not compared

    asyncio.run(leave())
    wait_until(lambda: metric(service, "sam3lora_requests_in_flight") == 1)
    assert cancelled(service) >= 1
    assert metric(service, "sam3lora_queue_length") == 0
    computed = metric(service, "sam3lora_rows_total") - rows
    assert computed < 64 * num_blockers + 6 * len(WORDS)
    # The only slot is free for another adapter.
    assert set(send_all(service.url, small.cases(["heads"])).kinds()) == {"ok"}


def test_a_slow_request_times_out(service: RayService, small: SmallService) -> None:
    service.deploy(small.settings(limits={"timeout_s": 0.02}))
    service.wait_running(Segmenter=1, Ingress=1)
    load = send_all(service.url, [Case(IMAGES[0], fields("towers", prompts=WORDS))] * 5)
    assert set(load.kinds()) == {"timeout"}
    assert get(f"{service.url}/readyz")[0] == 200


def _ended(sample: Sample) -> float:
    return sample.began + sample.seconds


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition)


def cancelled(service: RayService) -> float:
    return metric(service, "sam3lora_requests_total", 'outcome="cancelled"')


def metric(service: RayService, name: str, label: str = "") -> float:
    """Sum of a metric's samples over all replicas."""
    lines = get(f"{service.url}/metrics")[1].splitlines()
    found = [line for line in lines if line.partition("{")[0].partition(" ")[0] == name and label in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)
