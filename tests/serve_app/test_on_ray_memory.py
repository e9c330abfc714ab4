"""Thousands of requests, each for an adapter that is not in memory: no process grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from .checked_load import running_load, send_all
from .ray_service import get, start_service
from .small_service import SmallService

pytestmark = pytest.mark.slow
PORT = 18825
KINDS = ("vision", "text", "detector", "no cls")
NUM_ADAPTERS = 8
NUM_SWAPS = 1000
NUM_REQUESTS = 5000
NUM_WARM = 1500


def test_memory_stays_flat_over_a_thousand_swaps(tmp_path: Path) -> None:
    small = SmallService(tmp_path)
    names = [f"adapter-{number}" for number in range(NUM_ADAPTERS)]
    for number, name in enumerate(names):
        small.add_adapter(name, KINDS[number % len(KINDS)], number)
    cases = small.cases(names)
    with start_service(PORT) as service:
        service.deploy(small.settings(max_resident_adapters=2, caches={"images_mb": 16}))
        service.wait_running(Segmenter=1, Ingress=1)
        rss_mb = {}
        with running_load(service.url, cases, clients=8) as load:
            for number in (NUM_WARM, NUM_REQUESTS):
                load.wait_ok(number, timeout_s=600)
                rss_mb[number] = {name: service.rss_mb(name) for name in ("Segmenter", "Ingress")}
                print(number, rss_mb[number])
        assert load.failures() == []
        loads = [
            line for line in get(f"{service.url}/metrics")[1].splitlines() if "sam3lora_adapter_loads_total{" in line
        ]
        swaps = sum(float(line.rpartition(" ")[2]) for line in loads)
        print(swaps)
        assert swaps >= NUM_SWAPS
        for name in ("Segmenter", "Ingress"):
            assert rss_mb[NUM_REQUESTS][name] < 1.1 * rss_mb[NUM_WARM][name]
        assert set(send_all(service.url, cases).kinds()) == {"ok"}
