"""Changes to a service that runs under load: settings, adapter lists, adapter folders. No request may fail."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sam3lora.files import replace_folder

from .checked_load import Case, Load, running_load, send_all
from .ray_service import RayService, get, start_service, wait_until
from .small_service import ADAPTERS, IMAGES, SmallService, fields

pytestmark = pytest.mark.slow
PORT = 18820


@pytest.fixture(scope="module")
def service() -> Iterator[RayService]:
    with start_service(PORT) as service:
        yield service


@pytest.fixture
def small(tmp_path: Path) -> SmallService:
    return SmallService(tmp_path)


def assert_all_right(load: Load) -> None:
    assert load.samples
    assert load.failures() == []


def is_replaced(service: RayService, old: dict[str, list[int]], **number: int) -> bool:
    new = {name: service.pids(name) for name in old}
    return all(len(new[name]) == number[name] and not set(new[name]) & set(old[name]) for name in old)


def replace_under_load(service: RayService, cases: list[Case], change: Any, **number: int) -> None:
    """`change` starts new replicas of both deployments; so many there are in the end."""
    old = {name: service.pids(name) for name in number}
    with running_load(service.url, cases, clients=4) as load:
        load.wait_ok(20)
        change()
        wait_until(lambda: is_replaced(service, old, **number))
        service.wait_running(**number)
        done = time.monotonic()
        load.wait_ok(20, since=done)
    print(load.kinds(), max(sample.seconds for sample in load.samples))
    assert_all_right(load)


def test_other_settings_reach_two_segmenters_one_after_the_other(service: RayService, small: SmallService) -> None:
    cases = small.cases()
    service.deploy(small.settings(replicas=2))
    service.wait_running(Segmenter=2, Ingress=1)
    changed = small.settings(replicas=2, limits={"max_prompts": 3}, caches={"images_mb": 64})
    replace_under_load(service, cases, lambda: service.deploy(changed, wait=False), Segmenter=2, Ingress=1)
    [refused] = send_all(service.url, [Case(IMAGES[0], fields(None, prompts=list("abcd")))]).samples
    assert refused.kind == "invalid_prompt", refused


def test_a_segmenter_alone_is_replaced_where_there_is_room_for_two(service: RayService, small: SmallService) -> None:
    cases, surge = small.cases(), {"max_surge_percent": 100}
    service.configure(small.settings(), surge)
    service.wait_running(Segmenter=1, Ingress=1)
    changed = small.settings(limits={"max_prompts": 3})
    replace_under_load(service, cases, lambda: service.configure(changed, surge, wait=False), Segmenter=1, Ingress=1)


def test_another_root_is_taken_in_place(service: RayService, small: SmallService, tmp_path: Path) -> None:
    other = SmallService(tmp_path / "other", base=small.base, first_seed=50)
    served = [None, "towers", "heads"]
    old, new = small.cases(served), other.cases(served)
    service.configure(small.settings(), {"user_config": {"root": str(small.root)}})
    service.wait_running(Segmenter=1, Ingress=1)
    pids = service.pids("Segmenter") + service.pids("Ingress")
    either = [replace(one, expected=(*one.expected, *two.expected)) for one, two in zip(old, new, strict=True)]
    with running_load(service.url, either, clients=4) as load:
        load.wait_ok(20)
        user_config = {"root": str(other.root), "allowed": ["towers", "heads"], "preload": ["heads"]}
        service.configure(small.settings(), {"user_config": user_config}, wait=False)
        seen = set()
        wait_until(lambda: seen.add(get(f"{service.url}/readyz")[0]) or load.samples[-1].answer == 1)
        assert seen == {200}
        service.wait_running(Segmenter=1, Ingress=1)
        switched = time.monotonic()
        load.wait_ok(20, since=switched)
    assert_all_right(load)
    assert set(send_all(service.url, new).kinds()) == {"ok"}
    assert set(send_all(service.url, other.cases(["words"])).kinds()) == {"adapter_not_found"}
    assert service.pids("Segmenter") + service.pids("Ingress") == pids


def test_folders_that_appear_and_change_are_served_at_once(
    service: RayService, small: SmallService, tmp_path: Path
) -> None:
    service.deploy(small.settings())
    service.wait_running(Segmenter=1, Ingress=1)
    cases = small.cases()
    small.add_adapter("late", "detector", 7)
    with running_load(service.url, cases, clients=4) as load:
        assert set(send_all(service.url, small.cases(["late"])).kinds()) == {"ok"}
    assert_all_right(load)

    later = SmallService(tmp_path / "later", base=small.base, first_seed=90)
    either = [
        replace(one, expected=(*one.expected, *two.expected))
        for one, two in zip(small.cases(list(ADAPTERS)), later.cases(list(ADAPTERS)), strict=True)
    ]
    with running_load(service.url, either, clients=4) as load:
        load.wait_ok(20)
        for name in ADAPTERS:  # as `save_adapter` does it
            scratch = small.root / f".{name}.tmp"
            shutil.copytree(later.root / name, scratch)
            replace_folder(scratch, small.root / name)
        switched = time.monotonic()
        load.wait_ok(20, since=switched)
    assert_all_right(load)
    assert {sample.answer for sample in load.samples if sample.began >= switched} == {1}
    assert 0 in {sample.answer for sample in load.samples}
