"""The model replica: a call passes image decoding, the adapter's slot, the queue, a forward pass and mask encoding."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.dense_slots import LabelledImage
from sam3lora.engine.detections import Detections
from sam3lora.engine.device import is_device_error, is_out_of_memory
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.selection import NotFiniteError
from sam3lora.errors import UserError
from sam3lora.model.dense.settings import DenseSettings
from sam3lora.model.tokenization import PromptError
from sam3lora.start_marks import mark
from serve_app.http.errors import ServeError, answer_too_large, no_click_head
from serve_app.http.refine import check_places
from serve_app.http.schemas import check_boxes
from serve_app.logs import log_as_serve
from serve_app.messages import (
    EVERY_ADAPTER,
    AdapterPage,
    AdapterQuery,
    DenseCall,
    DenseReply,
    ImageFile,
    ImageReply,
    RefineCall,
    RefineReply,
    SegmentCall,
    SegmentReply,
)
from serve_app.metrics import ReplicaMetrics, StageClock
from serve_app.replica.adapter_store import AdapterStore
from serve_app.replica.batcher import Batcher
from serve_app.replica.clicks import click_slots, keep_detections, refined_masks, to_clicked
from serve_app.replica.engine_work import Answer, Asked, build_engine, enable_clicks, encoding_ahead, run_batch
from serve_app.replica.image_decoder import ImageDecoder
from serve_app.replica.labels import LARGE_PIXELS, make_labels, wanted_labels
from serve_app.replica.mask_encoder import MaskEncoder
from serve_app.replica.tasks import expect
from serve_app.settings import AdapterSettings, ServeSettings

logger = logging.getLogger(__name__)

STUCK_AFTER_S = 120.0

T = TypeVar("T")


class ModelReplica:
    """The deployment with the model. `__init__` returns when the model is warm; the methods run on one event loop.

    Errors for the client are returned as `ServeError`s and never raised. The engine is built from the settings if it is
    not given.
    """

    def __init__(self, settings: ServeSettings, *, engine: Engine | None = None) -> None:
        mark("imports of the replica")
        log_as_serve()
        limits = settings.limits
        self._limits = limits
        self._ongoing = 0
        self._preparing = 0
        self._idle = asyncio.Event()
        self._closing = False
        self._metrics = ReplicaMetrics(
            engine_counters=lambda: self._engine.counters,
            queue_length=lambda: self._batcher.queue_length + self._preparing,
            resident_adapters=lambda: self._store.num_resident,
        )
        self._batcher: Batcher[Asked, Answer] = Batcher(
            lambda asked: run_batch(self._engine, asked),
            max_rows=settings.batching.max_rows,
            max_queued=limits.max_queued,
            overload_type="too_many_requests" if limits.overload_status == 429 else "overloaded",
            free_memory=lambda: self._engine.drop_features(),
            metrics=self._metrics,
        )
        self._engine = engine or self._batcher.run_at_start(lambda: build_engine(settings))
        self._answers_clicks = self._batcher.run_at_start(lambda: enable_clicks(self._engine, settings))
        mark("model")
        if (ahead := encoding_ahead(self._engine, settings)) is not None:
            self._batcher.work_ahead(ahead)
        threads = min(8, max(2, os.cpu_count() or 2))
        self._decoder = ImageDecoder(self._engine, threads, max_megapixels=limits.max_megapixels)
        self._encoder = MaskEncoder(threads, pause=self._batcher.pause, resume=self._batcher.resume)
        self._store = AdapterStore(
            self._engine,
            self._batcher.run_in_model_thread,
            settings.adapters,
            num_slots=settings.max_resident_adapters,
            metrics=self._metrics,
            most_detections=limits.max_detections,
            answers_clicks=self._answers_clicks,
        )
        self._batcher.run_at_start(self._engine.warm_up)
        mark("warm-up")
        logger.info(
            "replica is ready: model %s on %s, %s, %d pixels",
            settings.model,
            self._engine.device,
            self._engine.precision,
            self._engine.resolution,
        )

    async def segment(self, call: SegmentCall) -> SegmentReply | ServeError:
        return await self._answered(self._segment(call))

    async def label(self, call: DenseCall) -> DenseReply | ServeError:
        return await self._answered(self._label(call))

    async def refine(self, call: RefineCall) -> RefineReply | ServeError:
        return await self._answered(self._refine(call))

    async def keep_image(self, image: ImageFile, timeout_s: float = 30.0) -> ImageReply | ServeError:
        """Encode an image and keep it, so that later calls may send its key alone."""
        return await self._answered(self._keep(image, timeout_s))

    async def list_adapters(self, query: AdapterQuery = EVERY_ADAPTER) -> AdapterPage:
        """The adapters that may be served, sorted by id; `resident` says whether this replica holds the adapter."""
        return (await self._store.list(query))._replace(clicks=self._answers_clicks)

    async def named_metrics(self) -> tuple[str, str]:
        """A name that no other replica has, and the metrics in Prometheus' text format."""
        return f"{socket.gethostname()}-{os.getpid()}", self._metrics.text()

    async def ready(self) -> bool:
        return not self._closing

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply the fields of `AdapterSettings`. Serve calls it before the first request and at each change.

        Returns when the adapters to preload are loaded.

        Raises:
            pydantic.ValidationError: The settings are invalid; the earlier ones stay in force.
        """
        settings = AdapterSettings.model_validate(user_config)
        self._store.reconfigure(settings)
        await self._store.preload(settings.preload)

    def check_health(self) -> None:
        """Serve calls it periodically, and replaces a replica that raises.

        Raises:
            RuntimeError: The device failed, or the model thread has been stuck for very long.
        """
        if self._batcher.device_error is not None:
            raise RuntimeError(f"the device failed: {type(self._batcher.device_error).__name__}")
        stuck_after_s = max(STUCK_AFTER_S, 4 * self._limits.timeout_s)
        if self._batcher.busy_s > stuck_after_s:
            raise RuntimeError(f"the model has been busy with one batch for more than {stuck_after_s:.0f} s")

    async def close(self) -> None:
        """Finish the calls in progress and refuse new ones."""
        self._closing = True
        while self._ongoing:
            self._idle.clear()
            await self._idle.wait()
        await self._batcher.close()
        self._stop()

    def __del__(self) -> None:
        """Serve deletes the replica after the last response."""
        if hasattr(self, "_store"):
            self._batcher.stop()
            self._stop()

    def _stop(self) -> None:
        self._store.close()
        self._decoder.close()
        self._encoder.close()

    async def _answered(self, work: Awaitable[T]) -> T | ServeError:
        """The only place where an exception becomes a reply."""
        self._ongoing += 1
        try:
            return await work
        except ServeError as error:
            return error.with_traceback(None)  # its frames would keep the call alive
        except PromptError as error:  # its own message shows the prompt
            name = f"prompts[{error.number}]"
            return ServeError("invalid_prompt", f"{name} {error.fault}", field=name)
        except UserError as error:  # the checks of the ingress come first; its message may repeat the request
            _log(error)
            return ServeError("invalid_request", "the model refuses the request: check its prompts and boxes")
        except Exception as error:
            if is_out_of_memory(error):
                return ServeError("out_of_memory", "memory ran out: try again later", 1.0)
            _log(error)
            if is_device_error(error):
                return ServeError("replica_failed", "the device of this replica failed: send the request again", 2.0)
            return ServeError("internal", "the service failed on this request: its log has the reason")
        finally:
            self._ongoing -= 1
            if not self._ongoing:
                self._idle.set()

    async def _segment(self, call: SegmentCall) -> SegmentReply:
        deadline = time.monotonic() + call.timeout_s
        clock = StageClock()
        if call.keep_masks:
            self._check_clicks("keep_masks")
        async with AsyncExitStack() as held:
            with self._place_in_queue():
                image = await self._decoder.image(call.image, deadline)
                check_boxes(call.boxes, image.size_hw)  # of an uploaded image the ingress does not know the size
                clock.lap("decode")
                adapter = await held.enter_async_context(self._store.hold(call.adapter, deadline - time.monotonic()))
                clock.lap("adapter")
            recorded = expect(PostProcessing, call.adapter, adapter.settings)
            post = _post_processing(recorded, call.post_processing, self._limits.max_detections)
            with_masks = call.masks or call.keep_masks
            asked = PromptedImage(image, call.prompts, call.boxes, adapter.slot, post, with_masks)
            try:
                outcome = await self._batcher.submit(asked, rows=asked.num_rows, timeout_s=deadline - time.monotonic())
            except NotFiniteError:
                raise _not_finite(call.adapter) from None
        clock.set("queue", outcome.waited_s)
        clock.set("forward", outcome.ran_s)
        assert isinstance(outcome.result, list)
        results = await self._encoder.encode(outcome.result, deadline)
        _check_size(results, self._limits.max_answer_bytes)
        mask_ids = None
        if call.keep_masks:
            mask_ids = await asyncio.to_thread(keep_detections, self._engine, outcome.result, image)
        clock.lap("masks")
        self._metrics.stages(clock.timing_ms)
        return SegmentReply(image.size_hw, results, clock.timing_ms, mask_ids)

    async def _label(self, call: DenseCall) -> DenseReply:
        deadline = time.monotonic() + call.timeout_s
        clock = StageClock()
        async with AsyncExitStack() as held:
            with self._place_in_queue():
                image = await self._decoder.image(call.image, deadline)
                clock.lap("decode")
                adapter = await held.enter_async_context(self._store.hold(call.adapter, deadline - time.monotonic()))
                clock.lap("adapter")
            wanted = wanted_labels(call, expect(DenseSettings, call.adapter, adapter.settings))
            assert adapter.slot is not None
            asked = LabelledImage(image, adapter.slot)
            try:
                outcome = await self._batcher.submit(asked, rows=1, timeout_s=deadline - time.monotonic())
            except NotFiniteError:
                raise _not_finite(call.adapter) from None
        clock.set("queue", outcome.waited_s)
        clock.set("forward", outcome.ran_s)
        logits_Nhw = outcome.result
        assert isinstance(logits_Nhw, np.ndarray)
        found = await self._encoder.run(
            partial(make_labels, logits_Nhw, image.size_hw, wanted, self._limits.max_answer_bytes),
            logits_Nhw.nbytes,
            deadline,
            late="the labels were not made in time: ask for fewer classes, or send a smaller image",
            is_large=image.size_hw[0] * image.size_hw[1] > LARGE_PIXELS,
        )
        clock.lap("masks")
        self._metrics.stages(clock.timing_ms)
        return DenseReply(image.size_hw, found.classes, found.label_png, clock.timing_ms)

    async def _refine(self, call: RefineCall) -> RefineReply:
        deadline = time.monotonic() + call.timeout_s
        clock = StageClock()
        self._check_clicks()
        async with AsyncExitStack() as held:
            with self._place_in_queue():
                image = await self._decoder.image(call.image, deadline)
                check_places(call.objects, image.size_hw)
                clock.lap("decode")
                adapters = await held.enter_async_context(
                    self._store.hold_both(call.adapter, call.click_adapter, deadline - time.monotonic())
                )
                clock.lap("adapter")
                to_asked = partial(to_clicked, self._engine, call, image, *click_slots(self._engine, call, *adapters))
                if any(isinstance(one.mask, dict) for one in call.objects):
                    late = "the masks were not read in time: send fewer objects"
                    is_large = image.size_hw[0] * image.size_hw[1] > LARGE_PIXELS
                    asked = await self._encoder.run(to_asked, 0, deadline, late=late, is_large=is_large)
                else:
                    asked = to_asked(threading.Event())
            rows = len(call.objects)
            try:
                outcome = await self._batcher.submit(asked, rows=rows, timeout_s=deadline - time.monotonic())
            except NotFiniteError:
                raise _not_finite(call.click_adapter or call.adapter) from None
        clock.set("queue", outcome.waited_s)
        clock.set("forward", outcome.ran_s)
        answers = outcome.result
        assert isinstance(answers, tuple)
        objects = await self._encoder.run(
            partial(refined_masks, self._engine, call, answers, image, self._limits.max_answer_bytes),
            sum(answer.logits_Mmm.nbytes for answer in answers),
            deadline,
            late="the masks were not encoded in time: ask for fewer objects",
        )
        clock.lap("masks")
        self._metrics.stages(clock.timing_ms)
        return RefineReply(image.size_hw, objects, clock.timing_ms)

    def _check_clicks(self, field: str | None = None) -> None:
        if not self._answers_clicks:
            raise no_click_head(field)

    async def _keep(self, file: ImageFile, timeout_s: float) -> ImageReply:
        if known := self._engine.cached_image(file.key):
            return ImageReply(file.key, known.size_hw, cached=True)
        deadline = time.monotonic() + timeout_s
        with self._place_in_queue():
            image = await self._decoder.image(file, deadline)
        await self._batcher.submit(image, rows=1, timeout_s=deadline - time.monotonic())
        return ImageReply(file.key, image.size_hw, cached=False)

    @contextmanager
    def _place_in_queue(self) -> Iterator[None]:
        """Count a call as waiting while it is prepared, so that a surplus is refused before any work is done on it.

        Answers whose masks are being encoded count as well.
        """
        if self._closing:
            raise ServeError("not_ready", "this replica is shutting down: send the request again", 1.0)
        self._batcher.check_room(coming=self._preparing + self._encoder.num_waiting)
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1


def _post_processing(recorded: PostProcessing, requested: Mapping[str, Any], most_detections: int) -> PostProcessing:
    """The adapter's settings, changed by those of the request, within the limit of the service.

    A value without effect is refused, unless it is the adapter's own: what the service shows may be sent back.
    """
    post = recorded.changed(**requested)
    if post.merge_iou != recorded.merge_iou and not post.merge:
        message = "merge_iou has an effect with merge true only: set merge, or leave it out"
        raise ServeError("invalid_request", message, field="merge_iou")
    if post.nms_iou != recorded.nms_iou and post.nms == "none":
        message = 'nms_iou has no effect with nms "none": leave it out, or set nms'
        raise ServeError("invalid_request", message, field="nms_iou")
    return post.changed(max_detections=min(post.max_detections, most_detections))


def _check_size(results: Sequence[Detections], most_bytes: int) -> None:
    num_bytes = sum(len(rle["counts"]) for found in results for rle in found.rles or ())
    if num_bytes > most_bytes:
        raise answer_too_large(num_bytes, most_bytes)


def _not_finite(adapter: str | None) -> ServeError:
    if adapter is None:
        return ServeError("internal", "the model's outputs for this image are NaN or infinite: send another image")
    message = (
        f"the outputs of adapter {adapter!r} for this image are NaN or infinite: train it again, or ask another one"
    )
    return ServeError("invalid_adapter", message)


def _log(error: Exception) -> None:
    """Log the traceback without the message, which may hold what a client sent.

    Messages of torch name shapes and devices and are kept.
    """
    message = f": {error}" if isinstance(error, RuntimeError) else ""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a request failed with %s%s\n%s", type(error).__name__, message, frames)
