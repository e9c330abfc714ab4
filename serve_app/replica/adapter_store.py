"""The store that loads adapters into slots of the engine on request and never evicts one in use."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.engine import Engine
from sam3lora.model.adapter.folder import FolderSignature
from sam3lora.model.adapter.metadata import AdapterMetadata, recorded_post_processing
from sam3lora.model.adapter.weights import AdapterWeights
from sam3lora.model.clicks.origin import ClickOrigin
from sam3lora.model.dense.settings import DenseSettings
from serve_app.http.errors import ServeError, refuse_as
from serve_app.messages import EVERY_ADAPTER, AdapterPage, AdapterQuery, AdapterRow
from serve_app.metrics import ReplicaMetrics
from serve_app.replica.adapter_folders import AdapterFolder, AdapterFolders, Described
from serve_app.replica.adapter_slots import Load, LoadedAdapter, Recorded, SlotTable
from serve_app.replica.shared_calls import SharedCalls
from serve_app.replica.vision_trunks import VisionTrunks
from serve_app.settings import AdapterSettings, Limits

logger = logging.getLogger(__name__)

MAX_LOADS = 4  # at a time; bounds the weights that are in memory and in no slot
FAILURE_KEPT_S = 2.0
MAX_PAGE_BYTES = 4 << 20  # of a listing with a limit

T = TypeVar("T")


class HeldAdapter(NamedTuple):
    """What a request needs of its adapter; `slot` is None for the base, the settings say what it can be asked."""

    slot: int | None
    settings: Recorded


@dataclass(frozen=True)
class _Failure:
    signature: FolderSignature
    until: float
    message: str


class AdapterStore:
    """Maps adapter ids to slots of the engine. Belongs to one event loop.

    Every request looks at its adapter's folder. If the folder was replaced, the new version is loaded beside the old
    one, which keeps its users until they finish. While the new version cannot be read, the old one is served.

    `run_in_model_thread` runs a function between two batches.
    """

    def __init__(
        self,
        engine: Engine,
        run_in_model_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
        settings: AdapterSettings,
        *,
        num_slots: int,
        metrics: ReplicaMetrics,
        most_detections: int = Limits().max_detections,
        answers_clicks: bool = True,
    ) -> None:
        self._engine = engine
        self._run_in_model_thread = run_in_model_thread
        self._metrics = metrics
        self._most_detections = most_detections
        self._answers_clicks = answers_clicks
        self._listers = ThreadPoolExecutor(1, thread_name_prefix="adapter-list")
        self._look_into(settings)
        self._table = SlotTable(num_slots, lambda slot: self._spawn(self._empty(slot)), metrics.adapter_evictions.inc)
        self._loads: dict[str, Load] = {}
        self._load_turns = asyncio.Semaphore(MAX_LOADS)
        self._pair_turns = asyncio.Semaphore(num_slots - 1)
        self._failures: dict[str, _Failure] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Separate pools: a slow read must not delay a request that only looks at its loaded adapter's folder.
        self._readers = ThreadPoolExecutor(MAX_LOADS, thread_name_prefix="adapter-read")
        self._lookers = ThreadPoolExecutor(2, thread_name_prefix="adapter-look")

    @property
    def num_resident(self) -> int:
        """Adapters that a request could use at once."""
        return len(self._table)

    @asynccontextmanager
    async def hold(self, adapter_id: str | None, timeout_s: float = 30.0) -> AsyncIterator[HeldAdapter]:
        """The adapter in its slot; it keeps the slot within the block. An id of None is the base.

        Raises:
            ServeError: The adapter is unknown or unusable, or the time is up: `overloaded` if all slots were in use.
        """
        if adapter_id is None:
            yield HeldAdapter(None, PostProcessing())
            return
        adapter = await self._acquire(adapter_id, time.monotonic() + timeout_s)
        try:
            yield HeldAdapter(adapter.slot, adapter.settings)
        finally:
            self._table.release(adapter)

    @asynccontextmanager
    async def hold_both(
        self, adapter_id: str | None, click_adapter_id: str | None, timeout_s: float = 30.0
    ) -> AsyncIterator[tuple[HeldAdapter, HeldAdapter]]:
        """As `hold`, of an adapter and a click adapter.

        Raises:
            ServeError: As `hold`, with the field at fault; or there is one slot only.
        """
        deadline = time.monotonic() + timeout_s
        async with AsyncExitStack() as held, AsyncExitStack() as turn:
            if adapter_id is not None and click_adapter_id is not None:
                if self._table.num_slots < 2:
                    message = "this service holds one adapter at a time: leave out adapter, or click_adapter"
                    raise ServeError("invalid_request", message, field="click_adapter")
                await turn.enter_async_context(self._second_slot(deadline))
            adapter = await held.enter_async_context(self.hold(adapter_id, deadline - time.monotonic()))
            try:
                clicks = await held.enter_async_context(self.hold(click_adapter_id, deadline - time.monotonic()))
            except ServeError as error:
                raise replace(error, field="click_adapter" if error.field == "adapter" else error.field) from None
            await turn.aclose()
            yield adapter, clicks

    @asynccontextmanager
    async def _second_slot(self, deadline: float) -> AsyncIterator[None]:
        """A turn to take one slot and then another: fewer than there are slots, so that they cannot wait in a ring."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._pair_turns.acquire()
        except TimeoutError:
            raise ServeError("overloaded", "all adapter slots are in use: try again later", 1.0) from None
        try:
            yield
        finally:
            self._pair_turns.release()

    async def list(self, query: AdapterQuery = EVERY_ADAPTER) -> AdapterPage:
        """The adapters that may be served and match the query, by id."""
        matching = await self._listing.run("all", self._describe_all)
        if query.task is not None:
            matching = [one for one in matching if one.info.task in (query.task, None)]
        if query.search is not None:
            text = query.search.casefold()
            matching = [one for one in matching if any(text in each for each in one.searched)]
        following = matching if query.after is None else [one for one in matching if one.info.id > query.after]
        page = following if query.limit is None else _within_bytes(following[: query.limit])
        return AdapterPage([self._row(one) for one in page], len(matching), len(page) < len(following))

    def reconfigure(self, settings: AdapterSettings) -> None:
        """Use other folders from the next request on."""
        self._look_into(settings)
        self._failures.clear()
        for adapter_id in self._table.ids():
            if not self._folders.allows(adapter_id) and (adapter := self._table.get(adapter_id)):
                self._table.retire(adapter)

    async def preload(self, ids: Iterable[str], timeout_s: float = 300.0) -> None:
        """Load adapters before the first request; one that fails is logged, and the others are still loaded."""
        for adapter_id in ids:
            try:
                async with self.hold(adapter_id, timeout_s):
                    pass
            except ServeError as error:
                logger.warning("adapter %s was not preloaded: %s", adapter_id, error.message)

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._lookers.shutdown(wait=False, cancel_futures=True)
        self._listers.shutdown(wait=False, cancel_futures=True)

    def _look_into(self, settings: AdapterSettings) -> None:
        folders = self._folders = AdapterFolders(
            settings,
            self._engine.summarise_adapter,
            self._most_detections,
            answers_clicks=self._answers_clicks,
        )
        trunks = VisionTrunks(lambda adapter_id: self._read(adapter_id)[1].trunk_digest)
        self._describe_all = lambda: trunks.named(folders.describe_all())
        self._listing: SharedCalls[list[Described]] = SharedCalls(self._listers)
        self._listers.submit(self._describe_all)  # so that the first listing need not read thousands of folders

    async def _acquire(self, adapter_id: str, deadline: float) -> LoadedAdapter:
        folder = await self._find(adapter_id)
        load = self._loads.get(adapter_id)
        try:
            adapter = await self._use(folder, deadline)
        except ServeError:
            if load is None or load.folder.signature == folder.signature or not load.finished.is_set():
                raise
        else:
            if load is None or adapter.folder.signature == folder.signature:
                return adapter
            self._table.release(adapter)
        # The load that was in progress may have read an earlier version. One that begins now reads the present one.
        return await self._use(await self._find(adapter_id), deadline)

    async def _find(self, adapter_id: str) -> AdapterFolder:
        try:
            return await _in_thread(self._lookers, partial(self._folders.find, adapter_id))
        except ServeError as error:
            if error.type == "adapter_not_found":
                self._failures.pop(adapter_id, None)
                if gone := self._table.get(adapter_id):
                    self._table.retire(gone)
            raise

    async def _use(self, folder: AdapterFolder, deadline: float) -> LoadedAdapter:
        """Add a user to the loaded adapter, or load it first; to an earlier version if this one is unusable."""
        adapter = self._table.get(folder.id)
        if adapter is not None and adapter.folder.signature == folder.signature:
            return self._table.use(adapter)
        try:
            # Many requests for a broken folder must not read it each time.
            failure = self._failures.get(folder.id)
            if failure and failure.signature == folder.signature and time.monotonic() < failure.until:
                raise ServeError("invalid_adapter", failure.message, 1.0)
            return await self._join_load(folder, deadline)
        except ServeError as error:
            earlier = self._table.get(folder.id)
            if earlier is None or error.type != "invalid_adapter":
                raise
            return self._table.use(earlier)

    async def _join_load(self, folder: AdapterFolder, deadline: float) -> LoadedAdapter:
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
        if load.loaded is None:
            assert load.error is not None
            raise load.error.with_traceback(None)
        return load.loaded

    def _leave(self, load: Load) -> None:
        """A request stops waiting; the load continues, or has finished at this moment."""
        if load.loaded is not None:
            self._table.release(load.loaded)
        else:
            load.waiters -= 1

    def _too_late(self, load: Load) -> ServeError:
        if load.waits_for_others:
            message = f"all {self._table.num_slots} adapter slots are in use: try again later"
            return ServeError("overloaded", message, 1.0)
        return ServeError("timeout", f"adapter {load.folder.id!r} was not loaded in time: try again", 1.0)

    async def _load(self, load: Load) -> None:
        """Load from disk into a slot; continues when the requests that wait for it leave."""
        try:
            load.waits_for_others = True
            async with self._load_turns:
                load.waits_for_others = False
                load.folder, weights = await _in_thread(self._readers, partial(self._read, load.folder.id))
                load.waits_for_others = True
                slot = await self._table.take()
                load.waits_for_others = False
                try:
                    await self._run_in_model_thread(partial(self._place, slot, weights, load.folder))
                except Exception:
                    self._spawn(self._empty(slot))
                    raise
            self._failures.pop(load.folder.id, None)
            self._metrics.adapter_loads.inc()
            settings = _recorded_settings(weights.metadata)
            load.loaded = LoadedAdapter(load.folder, slot, settings, users=load.waiters)
            self._table.add(load.loaded)
            if not self._folders.allows(load.folder.id):
                self._table.retire(load.loaded)
        except Exception as error:
            self._metrics.adapter_failures.inc()
            self._remember(load.folder, error)
            load.error = error
        finally:
            self._loads.pop(load.folder.id, None)
            load.finished.set()

    def _place(self, slot: int, weights: AdapterWeights, folder: AdapterFolder) -> None:
        """In the model thread. An adapter whose outputs are not finite is refused before a request meets it."""
        self._engine.place_adapter(slot, weights)
        with refuse_as("invalid_adapter", folder.path):
            self._engine.check_adapter(slot)

    def _read(self, adapter_id: str) -> tuple[AdapterFolder, AdapterWeights]:
        """Read an adapter, in a thread. `read_any_adapter` guards against a folder that changes meanwhile."""
        folder = self._folders.find(adapter_id)
        try:
            with refuse_as("invalid_adapter", folder.path):
                self._folders.check_task(folder.path)
                weights = self._engine.read_any_adapter(folder.path)
        except (ServeError, MemoryError):
            raise
        except Exception:  # a damaged file may raise anything
            logger.exception("adapter %s cannot be read", adapter_id)
            message = f"adapter {adapter_id!r} cannot be read: the log of the service has the reason"
            raise ServeError("invalid_adapter", message) from None
        if weights.signature != folder.signature:
            # It was replaced just before it was read: this version, too, must lie within the root.
            folder = self._folders.find(adapter_id)
        if weights.signature != folder.signature:
            raise ServeError("invalid_adapter", f"adapter {adapter_id!r} is being written: try again later", 1.0)
        return folder, weights

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
            await self._run_in_model_thread(partial(self._engine.clear_adapter, slot))
        except Exception:
            logger.exception("adapter slot %d was not cleared", slot)
        finally:
            self._table.give_back(slot)

    def _row(self, described: Described) -> AdapterRow:
        info, json = described.info, described.json
        failure = self._failures.get(info.id)
        error = failure.message if failure is not None and failure.signature == described.signature else info.error
        resident = info.id in self._table
        if resident or error != info.error:
            json = info.model_copy(update={"resident": resident, "error": error}).model_dump_json()
        return AdapterRow(info.id, resident, json)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _recorded_settings(metadata: AdapterMetadata | None) -> Recorded:
    if metadata is not None and metadata.dense is not None:
        return DenseSettings(**metadata.dense)
    if metadata is not None and metadata.clicks is not None:
        return ClickOrigin(**metadata.clicks)
    return recorded_post_processing(metadata)


def _within_bytes(page: Sequence[Described]) -> Sequence[Described]:
    """As many from the beginning as a page may hold, at least one."""
    num_bytes = 0
    for number, one in enumerate(page):
        num_bytes += len(one.json)
        if num_bytes > MAX_PAGE_BYTES and number:
            return page[:number]
    return page


async def _in_thread(pool: ThreadPoolExecutor, fn: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, fn)
