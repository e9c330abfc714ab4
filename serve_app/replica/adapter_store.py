"""Adapters in the model's slots: loaded when asked for, never taken away while in use."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from serve_app.calls import AdapterInfo
from serve_app.http.errors import ServeError
from serve_app.http.refusals import refuse_as
from serve_app.replica.adapter_folders import AdapterFolder, AdapterFolders, Signature
from serve_app.replica.adapter_slots import Load, Resident, SlotTable
from serve_app.replica.shared_calls import SharedCalls
from serve_app.settings import AdapterSettings

logger = logging.getLogger(__name__)

MAX_LOADS = 4  # at a time; bounds the weights that are in memory and in no slot
FAILURE_KEPT_S = 2.0
_ATTEMPTS_TO_READ = 3

T = TypeVar("T")
Described = list[tuple[Signature, AdapterInfo]]


class AdapterModel(Protocol):
    """The model side; `read_adapter` works in any thread, the others in the model thread."""

    def read_adapter(self, folder: Path) -> Any: ...

    def place_adapter(self, slot: int, weights: Any) -> None: ...

    def clear_adapter(self, slot: int) -> None: ...


class LoadObserver(Protocol):
    """Who wants to know about loads."""

    def adapter_loaded(self) -> None: ...

    def adapter_failed(self) -> None: ...

    def adapter_evicted(self) -> None: ...


@dataclass(frozen=True)
class _Failure:
    signature: Signature
    until: float
    message: str


class AdapterStore:
    """Ids to slots. Belongs to one event loop.

    The folder is looked at for every request: a replaced one is loaded beside the old version, which its users keep
    until they are done. While the new version cannot be read, the old one is served.

    Args:
        model: The model side.
        run_in_model_thread: Runs a function between two batches.
        settings: Where the folders are and which may be served.
        num_slots: Adapters in memory at a time.
        observer: Told about loads.
    """

    def __init__(
        self,
        model: AdapterModel,
        run_in_model_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
        settings: AdapterSettings,
        *,
        num_slots: int,
        observer: LoadObserver,
    ) -> None:
        self._model = model
        self._run_in_model_thread = run_in_model_thread
        self._observer = observer
        self._listers = ThreadPoolExecutor(1, thread_name_prefix="adapter-list")
        self._look_into(settings)
        self._table = SlotTable(num_slots, lambda slot: self._spawn(self._empty(slot)), observer.adapter_evicted)
        self._loads: dict[str, Load] = {}
        self._load_turns = asyncio.Semaphore(MAX_LOADS)
        self._failures: dict[str, _Failure] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # A slow read must not keep a request whose adapter is in memory from looking at its folder.
        self._readers = ThreadPoolExecutor(MAX_LOADS, thread_name_prefix="adapter-read")
        self._lookers = ThreadPoolExecutor(2, thread_name_prefix="adapter-look")

    @property
    def num_resident(self) -> int:
        """Adapters that a request could use at once."""
        return len(self._table)

    @asynccontextmanager
    async def hold(self, adapter_id: str | None, timeout_s: float = 30.0) -> AsyncIterator[int | None]:
        """The slot of an adapter, which stays its own inside; None for the base.

        Raises:
            ServeError: The adapter is unknown or unusable, or the time is up: `overloaded` when all slots were in use.
        """
        if adapter_id is None:
            yield None
            return
        resident = await self._acquire(adapter_id, time.monotonic() + timeout_s)
        try:
            yield resident.slot
        finally:
            self._table.release(resident)

    async def list(self) -> list[AdapterInfo]:
        """All adapters that may be served, sorted by id."""
        return [self._with_state(*known) for known in await self._listing.run("all", self._folders.describe_all)]

    def reconfigure(self, settings: AdapterSettings) -> None:
        """Other folders from the next request on."""
        self._look_into(settings)
        self._failures.clear()
        for adapter_id in self._table.ids():
            if not self._folders.allows(adapter_id) and (resident := self._table.get(adapter_id)):
                self._table.retire(resident)

    async def preload(self, ids: Iterable[str], timeout_s: float = 300.0) -> None:
        """Load before somebody asks; one that cannot be loaded is logged and does not hinder the others."""
        for adapter_id in ids:
            try:
                async with self.hold(adapter_id, timeout_s):
                    pass
            except ServeError as error:
                logger.warning("adapter %s was not preloaded: %s", adapter_id, error.message)

    def close(self) -> None:
        """Let the threads end."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._lookers.shutdown(wait=False, cancel_futures=True)
        self._listers.shutdown(wait=False, cancel_futures=True)

    def _look_into(self, settings: AdapterSettings) -> None:
        self._folders = AdapterFolders(settings)
        self._listing: SharedCalls[Described] = SharedCalls(self._listers)

    async def _acquire(self, adapter_id: str, deadline: float) -> Resident:
        folder = await self._find(adapter_id)
        load = self._loads.get(adapter_id)
        try:
            resident = await self._resident(folder, deadline)
        except ServeError:
            if load is None or load.folder.signature == folder.signature or not load.finished.is_set():
                raise
        else:
            if load is None or resident.folder.signature == folder.signature:
                return resident
            self._table.release(resident)
        # A load that was under way may have read an earlier version; one that begins after it has not.
        return await self._resident(await self._find(adapter_id), deadline)

    async def _find(self, adapter_id: str) -> AdapterFolder:
        try:
            return await _in_thread(self._lookers, partial(self._folders.find, adapter_id))
        except ServeError as error:
            if error.type == "adapter_not_found":
                self._failures.pop(adapter_id, None)
                if gone := self._table.get(adapter_id):
                    self._table.retire(gone)
            raise

    async def _resident(self, folder: AdapterFolder, deadline: float) -> Resident:
        """One more user of what is in a slot, or of what is loaded; an earlier version if this one is unusable."""
        resident = self._table.get(folder.id)
        if resident is not None and resident.folder.signature == folder.signature:
            return self._table.use(resident)
        try:
            # A broken folder that many ask for is not read for each of them.
            failure = self._failures.get(folder.id)
            if failure and failure.signature == folder.signature and time.monotonic() < failure.until:
                raise ServeError("invalid_adapter", failure.message, 1.0)
            return await self._join_load(folder, deadline)
        except ServeError as error:
            earlier = self._table.get(folder.id)
            if earlier is None or error.type != "invalid_adapter":
                raise
            return self._table.use(earlier)

    async def _join_load(self, folder: AdapterFolder, deadline: float) -> Resident:
        load = self._loads.get(folder.id)
        if load is None:
            load = self._loads[folder.id] = Load(folder)
            self._spawn(self._load(load))
        load.waiters += 1
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await load.finished.wait()
        except TimeoutError:
            self._leave(load)
            raise self._too_late(load) from None
        except asyncio.CancelledError:
            self._leave(load)
            raise
        if load.resident is None:
            assert load.error is not None
            raise load.error.with_traceback(None)
        return load.resident

    def _leave(self, load: Load) -> None:
        """Of a request that waits no longer; the load goes on, or has finished in this moment."""
        if load.resident is not None:
            self._table.release(load.resident)
        else:
            load.waiters -= 1

    def _too_late(self, load: Load) -> ServeError:
        if load.waits_for_others:
            message = f"all {self._table.num_slots} adapter slots are in use: try again later"
            return ServeError("overloaded", message, 1.0)
        return ServeError("timeout", f"adapter {load.folder.id!r} was not loaded in time: try again", 1.0)

    async def _load(self, load: Load) -> None:
        """From disk to a slot; outlives the requests that wanted it."""
        try:
            load.waits_for_others = True
            async with self._load_turns:
                load.waits_for_others = False
                load.folder, weights = await _in_thread(self._readers, partial(self._read, load.folder.id))
                load.waits_for_others = True
                slot = await self._table.take()
                load.waits_for_others = False
                try:
                    await self._run_in_model_thread(partial(self._model.place_adapter, slot, weights))
                except Exception:
                    self._spawn(self._empty(slot))
                    raise
            self._failures.pop(load.folder.id, None)
            self._observer.adapter_loaded()
            load.resident = self._table.settle(load.folder, slot, load.waiters)
            if not self._folders.allows(load.folder.id):
                self._table.retire(load.resident)
        except Exception as error:
            self._observer.adapter_failed()
            self._remember(load.folder, error)
            load.error = error
        finally:
            self._loads.pop(load.folder.id, None)
            load.finished.set()

    def _read(self, adapter_id: str) -> tuple[AdapterFolder, Any]:
        """In a thread. A folder that changes while it is read is read again."""
        folder = self._folders.find(adapter_id)
        for _ in range(_ATTEMPTS_TO_READ):
            try:
                with refuse_as("invalid_adapter", folder.path):
                    weights = self._model.read_adapter(folder.path)
            except (ServeError, MemoryError):
                raise
            except Exception as error:  # whatever a damaged file provokes
                logger.exception("adapter %s cannot be read", adapter_id)
                raise ServeError("invalid_adapter", f"{adapter_id} cannot be read: {type(error).__name__}") from None
            before, folder = folder, self._folders.find(adapter_id)
            if before.signature == folder.signature:
                return folder, weights
        raise ServeError("invalid_adapter", f"adapter {adapter_id!r} is being written: try again later", 1.0)

    def _remember(self, folder: AdapterFolder, error: Exception) -> None:
        if not isinstance(error, ServeError) or error.type != "invalid_adapter":
            return
        known = self._failures.get(folder.id)
        if known is None or known.signature != folder.signature:
            kept = "; its earlier version stays served" if folder.id in self._table else ""
            logger.warning("adapter %s cannot be used: %s%s", folder.id, error.message, kept)
        self._failures[folder.id] = _Failure(folder.signature, time.monotonic() + FAILURE_KEPT_S, error.message)

    async def _empty(self, slot: int) -> None:
        try:
            await self._run_in_model_thread(partial(self._model.clear_adapter, slot))
        except Exception:
            logger.exception("adapter slot %d was not cleared", slot)
        finally:
            self._table.give_back(slot)

    def _with_state(self, signature: Signature, info: AdapterInfo) -> AdapterInfo:
        failure = self._failures.get(info.id)
        error = failure.message if failure is not None and failure.signature == signature else info.error
        return replace(info, resident=info.id in self._table, error=error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _in_thread(pool: ThreadPoolExecutor, fn: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, fn)
