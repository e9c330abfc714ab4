"""The store of adapters over a model whose adapters are numbers in slots."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from safetensors.numpy import load_file

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import FolderSignature, read_unchanged
from sam3lora.model.adapter.weights import AdapterSummary, read_summary
from serve_app.http.errors import ServeError
from serve_app.http.schemas import AdapterResponse
from serve_app.messages import AdapterPage
from serve_app.replica import adapter_store
from serve_app.replica.adapter_store import AdapterStore
from serve_app.replica.batcher import Batcher
from serve_app.settings import AdapterSettings

from .adapter_folders import write_adapter

pytestmark = pytest.mark.anyio
LONG_S = 60.0


class Weights(NamedTuple):
    """What the store looks at of `AdapterWeights`, and the number."""

    value: float
    signature: FolderSignature
    metadata: None = None


class Model:
    """Slots with the value of the adapter that is in them. Reading a folder in `slow` waits for its event."""

    def __init__(self) -> None:
        self.slots: dict[int, float] = {}
        self.reads: Counter[str] = Counter()
        self.slow: dict[str, threading.Event] = {}
        self.reading = threading.Semaphore(0)
        self.threads: set[int] = set()
        self.place_error: Exception | None = None
        self.diverged: float | None = None

    def read_any_adapter(self, folder: Path) -> Weights:
        def read(signature: FolderSignature) -> Weights:
            self.reads[folder.name] += 1
            self.reading.release()
            if event := self.slow.get(folder.name):
                assert event.wait(LONG_S)
            try:
                (tensor,) = load_file(folder / "adapter_model.safetensors").values()
            except Exception as error:
                raise UserError(f"{folder / 'adapter_model.safetensors'} is damaged: {error}") from error
            return Weights(float(tensor[0, 0]), signature)

        return read_unchanged(folder, read)

    def place_adapter(self, slot: int, weights: Weights) -> None:
        self.threads.add(threading.get_ident())
        if self.place_error is not None:
            raise self.place_error
        self.slots[slot] = weights.value

    def check_adapter(self, slot: int) -> None:
        if self.slots[slot] == self.diverged:
            raise UserError("its outputs are NaN or infinite")

    def summarise_adapter(self, folder: Path) -> AdapterSummary:
        return read_summary(folder)

    def clear_adapter(self, slot: int) -> None:
        self.threads.add(threading.get_ident())
        self.slots.pop(slot, None)


class Counts(Counter):
    """In place of `ReplicaMetrics`."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(inc=lambda: self.update([name]))


def listed(page: AdapterPage) -> list[AdapterResponse]:
    return [AdapterResponse.model_validate_json(row.json) for row in page.rows]


class Stage:
    """A store with a model behind it."""

    def __init__(self, root: Path, num_slots: int, **settings: Any) -> None:
        self.root = root
        self.model = Model()
        self.counts = Counts()
        self.batcher: Batcher[int, int] = Batcher(lambda items: items, max_rows=4, max_queued=100)
        self.store = AdapterStore(
            self.model,
            self.batcher.run_in_model_thread,
            AdapterSettings(root=root, **settings),
            num_slots=num_slots,
            metrics=self.counts,
        )

    async def value(self, adapter_id: str, timeout_s: float = LONG_S) -> float:
        """What a request under this adapter would compute with."""
        async with self.store.hold(adapter_id, timeout_s) as (slot, _):
            assert slot is not None
            return self.model.slots[slot]

    async def resident(self) -> list[str]:
        return [info.id for info in await self.listed() if info.resident]

    async def listed(self) -> list[AdapterResponse]:
        return listed(await self.store.list())

    async def reading(self) -> None:
        """A read has begun."""
        assert await asyncio.to_thread(self.model.reading.acquire, timeout=LONG_S)

    async def waits_for_a_slot(self, adapter_id: str) -> None:
        """The adapter is read, and no slot is free for it."""
        while not (self.model.reads[adapter_id] and self.store._loads[adapter_id].waits_for_others):
            await asyncio.sleep(0.001)


@asynccontextmanager
async def open_stage(root: Path, num_slots: int = 4, **settings: Any) -> AsyncIterator[Stage]:
    stage = Stage(root, num_slots, **settings)
    try:
        async with asyncio.timeout(LONG_S):
            yield stage
    finally:
        for event in stage.model.slow.values():
            event.set()
        await stage.batcher.close()
        stage.store.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, adapter_id in enumerate("abcde", start=1):
        write_adapter(tmp_path, adapter_id, number)
    return tmp_path


async def refused(work: Coroutine[Any, Any, Any]) -> ServeError:
    with pytest.raises(ServeError) as found:
        await work
    return found.value


async def test_an_adapter_is_loaded_once_and_stays(root: Path):
    async with open_stage(root) as stage:
        async with stage.store.hold(None) as (slot, _):
            assert slot is None  # the base needs none
        assert not stage.model.reads
        assert [await stage.value(id) for id in "abaab"] == [1, 2, 1, 1, 2]
        assert await stage.resident() == ["a", "b"]
        assert stage.store.num_resident == 2
    assert stage.model.reads == {"a": 1, "b": 1}
    assert len(stage.model.threads) == 1  # nothing but the model thread touches slots
    assert stage.counts == {"adapter_loads": 2}


async def test_the_least_recently_used_adapter_is_evicted(root: Path):
    async with open_stage(root, num_slots=2) as stage:
        for adapter_id in "abac":  # b is the oldest when c comes
            await stage.value(adapter_id)
        assert await stage.resident() == ["a", "c"]
        assert await stage.value("a") == 1
        assert stage.model.reads["a"] == 1
    assert stage.counts["adapter_evictions"] == 1


async def test_an_adapter_in_use_is_never_evicted(root: Path):
    async with open_stage(root, num_slots=2) as stage, stage.store.hold("a") as (slot, _):
        assert slot is not None
        for adapter_id in "bcdebcde":  # all of them have to share the other slot
            assert await stage.value(adapter_id) == "abcde".index(adapter_id) + 1
            assert stage.model.slots[slot] == 1


async def test_a_load_waits_for_a_slot_but_not_too_long(root: Path):
    async with open_stage(root, num_slots=2) as stage, stage.store.hold("a"):
        async with stage.store.hold("b"):
            patient = asyncio.create_task(stage.value("c"))
            await stage.waits_for_a_slot("c")
            error = await refused(stage.value("c", timeout_s=0.01))
            assert (error.type, error.retry_after_s) == ("overloaded", 1.0)
            assert not patient.done()
        assert await patient == 3  # b went, a is still there
        assert await stage.resident() == ["a", "c"]


async def test_twenty_concurrent_requests_load_once_and_hold_the_slot_until_the_last_one_ends(root: Path):
    """All users that waited for the load are counted: the slot is not given away between load and use."""
    async with open_stage(root, num_slots=1) as stage:
        stage.model.slow["a"] = threading.Event()

        async def use(event: asyncio.Event) -> None:
            async with stage.store.hold("a") as (slot, _):
                assert slot is not None
                await event.wait()
                assert stage.model.slots[slot] == 1

        done = [asyncio.Event() for _ in range(20)]
        users = [asyncio.create_task(use(event)) for event in done]
        await stage.reading()
        stage.model.slow["a"].set()
        newcomer = None
        for event, user in zip(done, users, strict=True):
            assert newcomer is None or not newcomer.done()
            event.set()
            await user
            newcomer = newcomer or asyncio.create_task(stage.value("b"))
        assert newcomer is not None
        assert await newcomer == 2
    assert (stage.model.reads["a"], stage.counts["adapter_loads"]) == (1, 2)


async def test_a_slow_load_times_out_continues_and_delays_no_other_adapter(root: Path):
    async with open_stage(root) as stage:
        await stage.value("b")
        stage.model.slow["a"] = threading.Event()
        slow = asyncio.create_task(stage.value("a"))
        assert (await refused(stage.value("a", timeout_s=0.5))).type == "timeout"
        assert await stage.value("b") == 2  # in memory
        assert await stage.value("c") == 3  # not yet
        assert not slow.done()
        stage.model.slow["a"].set()
        assert await slow == 1
    assert stage.model.reads["a"] == 1


async def test_an_abandoned_load_finishes_and_can_be_evicted(root: Path):
    async with open_stage(root, num_slots=1) as stage:
        stage.model.slow["a"] = threading.Event()
        asked = [asyncio.create_task(stage.value("a")) for _ in range(3)]
        await stage.reading()
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
        stage.model.slow["a"].set()
        assert await stage.value("b") == 2  # takes the only slot, before "a" or after it, so nobody holds it
        async with asyncio.timeout(LONG_S):
            while stage.counts["adapter_loads"] < 2:
                await asyncio.sleep(0.001)


async def test_a_cancelled_holder_gives_its_slot_back(root: Path):
    async with open_stage(root, num_slots=1) as stage:

        async def use(held: asyncio.Event) -> None:
            async with stage.store.hold("a"):
                held.set()
                await asyncio.Event().wait()

        held = asyncio.Event()
        user = asyncio.create_task(use(held))
        await held.wait()
        user.cancel()
        await asyncio.wait([user])
        assert await stage.value("b") == 2


async def test_a_replaced_folder_is_loaded_beside_the_version_in_use(root: Path):
    async with open_stage(root) as stage:
        async with stage.store.hold("a") as (old, _):
            assert old is not None
            write_adapter(root, "a", 10)
            assert await stage.value("a") == 10
            assert stage.model.slots[old] == 1
            assert await stage.resident() == ["a"]
        while old in stage.model.slots:  # the last user left: it goes
            await asyncio.sleep(0.001)
        assert await stage.value("a") == 10
    assert stage.model.reads["a"] == 2


async def test_updates_under_load_never_mix_versions(root: Path):
    async with open_stage(root, num_slots=3) as stage:
        stop = False
        seen: set[float] = set()

        async def client() -> None:
            while not stop:
                try:
                    async with stage.store.hold("a") as (slot, _):
                        assert slot is not None
                        value = stage.model.slots[slot]
                        seen.add(value)
                        for _ in range(3):
                            await asyncio.sleep(0)
                            assert stage.model.slots[slot] == value
                except ServeError as error:  # read while it was written, by a machine that is slow at it
                    if not error.retry_after_s:
                        raise
                    await asyncio.sleep(0.01)

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for value in range(10, 30):
            await asyncio.to_thread(write_adapter, root, "a", value)
            assert await stage.value("a") == value  # who comes after the update gets the update
        stop = True
        await asyncio.gather(*clients)
        assert seen <= {1.0, *map(float, range(10, 30))}


async def test_an_unreadable_new_version_leaves_the_old_one_in_service(root: Path, caplog: pytest.LogCaptureFixture):
    async with open_stage(root) as stage:
        await stage.value("a")
        (root / "a" / "adapter_model.safetensors").write_bytes(b"half a fi")
        assert [await stage.value("a") for _ in range(50)] == [1] * 50
        (info,) = [info for info in await stage.listed() if info.id == "a"]
        assert info.resident
        assert "damaged" in str(info.error)
    assert stage.model.reads["a"] == 2
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


async def test_folders_that_go_and_come_are_followed(root: Path):
    async with open_stage(root) as stage:
        async with stage.store.hold("a") as (slot, _):
            assert slot is not None
            shutil.rmtree(root / "a")
            for adapter_id in ("a", "late"):
                assert (await refused(stage.value(adapter_id))).type == "adapter_not_found"
            assert stage.model.slots[slot] == 1
        for value, adapter_id in enumerate(("a", "late"), start=11):
            write_adapter(root, adapter_id, value)
            assert await stage.value(adapter_id) == value


async def test_a_broken_folder_is_refused_without_paths_and_read_again_only_after_a_while(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(adapter_store, "FAILURE_KEPT_S", LONG_S)
    async with open_stage(root) as stage:
        (root / "a" / "adapter_model.safetensors").write_bytes(b"junk")
        for _ in range(50):
            error = await refused(stage.value("a"))
            assert error.type == "invalid_adapter"
            assert "adapter_model.safetensors is damaged" in error.message
            assert str(root) not in error.message
        assert await stage.value("b") == 2
        assert stage.model.reads["a"] == 1
        monkeypatch.setattr(adapter_store, "FAILURE_KEPT_S", 0.0)
        write_adapter(root, "a", 12)
        assert await stage.value("a") == 12
        assert [info.error for info in await stage.listed()] == [None] * 5


async def test_any_exception_while_reading_makes_the_adapter_invalid(root: Path, monkeypatch: pytest.MonkeyPatch):
    async with open_stage(root) as stage:
        monkeypatch.setattr(stage.model, "read_any_adapter", lambda folder: 1 / 0)
        error = await refused(stage.value("a"))
        assert (error.type, "log of the service" in error.message) == ("invalid_adapter", True)


async def test_an_adapter_whose_outputs_are_not_finite_is_refused_and_its_slot_is_free_again(root: Path):
    async with open_stage(root, num_slots=1) as stage:
        stage.model.diverged = 2
        error = await refused(stage.value("b"))
        assert (error.type, "NaN" in error.message) == ("invalid_adapter", True)
        assert await stage.value("a") == 1  # in the only slot
        assert {info.id: info.error for info in await stage.listed()}["b"] == error.message
        assert stage.model.slots == {0: 1.0}


async def test_a_folder_that_changes_while_it_is_read_is_read_again(root: Path):
    async with open_stage(root) as stage:
        stage.model.slow["a"] = threading.Event()
        asked = asyncio.create_task(stage.value("a"))
        await stage.reading()
        write_adapter(root, "a", 13)
        stage.model.slow["a"].set()
        assert await asked == 13
    assert stage.model.reads["a"] == 2


async def test_an_adapter_moved_out_of_the_root_before_it_is_read_is_refused(root: Path, tmp_path: Path):
    async with open_stage(root) as stage:
        outside = write_adapter(tmp_path.parent / f"{tmp_path.name} outside", "secret", 66)
        read = stage.model.read_any_adapter

        def move_and_read(folder: Path) -> Weights:
            shutil.rmtree(folder)
            folder.symlink_to(outside)
            return read(folder)

        stage.model.read_any_adapter = move_and_read  # type: ignore[method-assign]
        error = await refused(stage.value("a"))
        assert (error.type, str(outside) in error.message) == ("invalid_adapter", False)


async def test_an_adapter_that_changes_after_every_look_is_refused(root: Path):
    async with open_stage(root) as stage:
        stage.model.read_any_adapter = lambda folder: Weights(1.0, ())  # type: ignore[method-assign]
        error = await refused(stage.value("a"))
        assert (error.type, error.retry_after_s) == ("invalid_adapter", 1.0)


async def test_a_request_after_a_replacement_gets_the_new_version(root: Path):
    async with open_stage(root, num_slots=1) as stage:
        async with stage.store.hold("b"):
            first = asyncio.create_task(stage.value("a"))
            await stage.waits_for_a_slot("a")
            write_adapter(root, "a", 20)
            second = asyncio.create_task(stage.value("a"))
            while stage.store._loads["a"].waiters < 2:
                await asyncio.sleep(0.001)
        assert await second == 20
        assert await first == 1
        assert stage.store._table.get("a").users == 0  # type: ignore[union-attr]
    assert stage.model.reads["a"] == 2


async def test_a_request_after_a_repair_is_not_refused_for_the_old_version(root: Path):
    async with open_stage(root) as stage:
        read, has_read, go = stage.model.read_any_adapter, threading.Event(), threading.Event()

        def read_and_wait(folder: Path) -> float:
            try:
                return read(folder)
            finally:
                has_read.set()
                assert go.wait(LONG_S)

        stage.model.read_any_adapter = read_and_wait  # type: ignore[method-assign]
        (root / "a" / "adapter_model.safetensors").write_bytes(b"junk")
        first = asyncio.create_task(stage.value("a"))
        assert await asyncio.to_thread(has_read.wait, LONG_S)
        write_adapter(root, "a", 20)
        second = asyncio.create_task(stage.value("a"))
        while stage.store._loads["a"].waiters < 2:
            await asyncio.sleep(0.001)
        go.set()
        assert await second == 20
        assert (await refused(first)).type == "invalid_adapter"


async def test_concurrent_lists_are_one_and_delay_no_request(root: Path):
    async with open_stage(root) as stage:
        describe, go, calls = stage.store._folders.describe_all, threading.Event(), []

        def slow() -> Any:
            calls.append(threading.get_ident())
            assert go.wait(LONG_S)
            return describe()

        stage.store._folders.describe_all = slow  # type: ignore[method-assign]
        lists = [asyncio.create_task(stage.store.list()) for _ in range(40)]
        while not calls:
            await asyncio.sleep(0.001)
        assert await stage.value("a") == 1
        go.set()
        for page in await asyncio.gather(*lists):
            assert [row.id for row in page.rows if row.resident] == ["a"]
        assert len(calls) == 1
        stage.store.reconfigure(AdapterSettings(root=root, allowed=("b",)))
        assert [info.id for info in await stage.listed()] == ["b"]


async def test_a_slot_that_could_not_be_filled_is_not_lost(root: Path):
    async with open_stage(root, num_slots=2) as stage:
        for _ in range(5):
            stage.model.place_error = MemoryError()
            with pytest.raises(MemoryError):
                await stage.value("a")
        stage.batcher._free_memory = lambda: setattr(stage.model, "place_error", None)
        assert await stage.value("a") == 1  # caches are emptied to place an adapter
        assert [await stage.value(id) for id in "abcd"] == [1, 2, 3, 4]


async def test_new_settings_retire_adapters_and_another_root_has_others_under_the_same_ids(
    root: Path, tmp_path_factory: pytest.TempPathFactory
):
    other = tmp_path_factory.mktemp("other")
    write_adapter(other, "c", 100)
    async with open_stage(root, num_slots=2) as stage:
        await stage.value("a")
        await stage.value("b")
        stage.store.reconfigure(AdapterSettings(root=root, allowed=("b", "c")))
        assert (await stage.resident(), stage.store.num_resident) == (["b"], 1)
        assert (await refused(stage.value("a"))).type == "adapter_not_found"
        async with stage.store.hold("b") as (one, _), stage.store.hold("c") as (two, _):
            assert {one, two} == {0, 1}
            assert stage.model.slots == {one: 2, two: 3}
        assert stage.model.reads["b"] == 1
        stage.store.reconfigure(AdapterSettings(root=other))
        assert await stage.value("c") == 100
        assert (await refused(stage.value("b"))).type == "adapter_not_found"


async def test_preloading_continues_after_a_failure(root: Path, caplog: pytest.LogCaptureFixture):
    async with open_stage(root) as stage:
        await stage.store.preload(("a", "unknown", "b"))
        assert await stage.resident() == ["a", "b"]
    assert "unknown was not preloaded" in caplog.text


async def test_a_thousand_swaps_lose_no_slot_and_mix_nothing(root: Path):
    async with open_stage(root, num_slots=2) as stage:

        async def client(start: int) -> None:
            for step in range(125):
                adapter_id = "abcde"[(start + step) % 5]
                assert await stage.value(adapter_id) == "abcde".index(adapter_id) + 1

        await asyncio.gather(*(client(start) for start in range(8)))
        assert len(stage.model.slots) <= 2
        assert stage.store.num_resident == 2
        assert not stage.store._loads
        async with stage.store.hold("a") as (one, _), stage.store.hold("b") as (two, _):
            assert {one, two} == {0, 1}
    assert stage.counts["adapter_loads"] == stage.counts["adapter_evictions"] + 2
    assert stage.counts["adapter_evictions"] > 100
