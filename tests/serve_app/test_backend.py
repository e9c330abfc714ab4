"""Calls through Serve: affinity, deadlines, cancellation, and replicas that die at work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve_app.http.backend import ServeBackend
from serve_app.http.errors import ServeError
from serve_app.http.schemas import AdapterResponse
from serve_app.messages import DenseCall, ImageFile, RefineCall, SegmentCall, SegmentReply
from serve_app.settings import MESSAGE_LENGTH_VARIABLE, Limits, ServeSettings

from .http_cases import page_of

pytestmark = pytest.mark.anyio
REPLY = SegmentReply((4, 4), [], {})
CALL = SegmentCall(ImageFile("key", b"image"), ("crack",), timeout_s=5.0)


class FakeResponse:
    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome
        self.is_cancelled = False

    def __await__(self) -> Any:
        return self._result().__await__()

    async def _result(self) -> Any:
        if self._outcome == "hang":
            await asyncio.sleep(600)
        if isinstance(self._outcome, BaseException) and not isinstance(self._outcome, ServeError):
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeHandle:
    """Gives the outcomes one after the other; remembers keys, calls and responses."""

    def __init__(self, *outcomes: Any) -> None:
        self._outcomes = list(outcomes)
        self.keys: list[str] = []
        self.sent: list[tuple[Any, ...]] = []
        self.responses: list[FakeResponse] = []
        self.segment = self.label = self.refine = self.keep_image = self

    def options(self, *, session_id: str) -> FakeHandle:
        self.keys.append(session_id)
        return self

    def remote(self, *sent: Any) -> FakeResponse:
        self.sent.append(sent)
        self.responses.append(FakeResponse(self._outcomes.pop(0)))
        return self.responses[-1]

    def broadcast(self, method: str, *sent: Any) -> Any:
        outcome = self._outcomes.pop(0)

        class Answers:
            async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
                if isinstance(outcome, BaseException):
                    raise outcome
                return outcome

        return Answers()


def ask(handle: FakeHandle, call: SegmentCall = CALL, **limits: Any) -> Any:
    return asyncio.run(ServeBackend(handle, ServeSettings(limits=Limits(**limits))).segment(call))


def died() -> Exception:
    return ActorDiedError()


def unavailable() -> Exception:
    return ActorUnavailableError("gone", b"0" * 16)


def transport() -> Exception:
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, empty, empty, "reset")


def no_answer() -> Exception:
    return RuntimeError("Unexpected error (StatusCode.UNAVAILABLE): Socket closed.")


FAILURES = [died, unavailable, transport, no_answer, asyncio.CancelledError]


def test_replies_are_passed_on_and_equal_images_and_adapters_go_to_the_same_replica():
    refusal = ServeError("invalid_prompt", "too long")
    handle = FakeHandle(REPLY, refusal, REPLY)
    assert ask(handle) is REPLY
    assert ask(handle, SegmentCall(ImageFile("key", b"image"), ("crack",), adapter="cracks")) is refusal
    ask(handle, SegmentCall(ImageFile("key"), ("crack",), adapter="cracks"))
    assert handle.keys == ["key", "adapter cracks", "key"]


def test_calls_about_kept_masks_go_where_the_image_is():
    image = ImageFile("key", b"image")
    handle = FakeHandle(REPLY, REPLY)
    ask(handle, SegmentCall(image, ("crack",), adapter="cracks", keep_masks=True))
    backend = ServeBackend(handle, ServeSettings())
    assert asyncio.run(backend.refine(RefineCall(image, (), adapter="cracks", timeout_s=5.0))) is REPLY
    assert handle.keys == ["key", "key"]
    assert handle.sent[1][0].timeout_s == 5.0


def test_calls_for_labels_go_where_their_adapter_or_their_image_is():
    refusal = ServeError("wrong_task", "ask another route")
    handle = FakeHandle(died(), refusal, refusal)
    backend = ServeBackend(handle, ServeSettings())
    for image in (ImageFile("key", b"image"), ImageFile("key")):
        assert asyncio.run(backend.label(DenseCall(image, "gears"))) is refusal
    assert handle.keys == ["adapter gears", "adapter gears again", "key"]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_replica_is_retried_elsewhere(failure: Callable[[], BaseException]):
    handle = FakeHandle(failure(), REPLY)
    assert ask(handle) is REPLY
    assert handle.keys[0] != handle.keys[1]
    first, second = (sent[0].timeout_s for sent in handle.sent)
    assert second < first == 5.0


@pytest.mark.parametrize("failure", FAILURES)
def test_two_failures_are_an_error(failure: Callable[[], BaseException]):
    answer = ask(FakeHandle(failure(), failure(), REPLY))
    assert (answer.type, answer.retry_after_s) == ("replica_failed", 2.0)


@pytest.mark.parametrize(
    "failure",
    [
        grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata(), "too large"),
        RuntimeError("Unexpected error (StatusCode.RESOURCE_EXHAUSTED): Received message larger than max."),
    ],
    ids=["raised", "reworded by Serve"],
)
def test_a_message_that_is_refused_for_its_size_is_no_dead_replica(failure: Exception):
    # The same message would be refused by every replica: it is not sent again, and clients are not told to.
    handle = FakeHandle(failure, REPLY)
    answer = ask(handle)
    assert (answer.type, answer.retry_after_s, len(handle.sent)) == ("internal", None, 1)
    assert MESSAGE_LENGTH_VARIABLE in answer.message


def test_a_bug_is_raised():
    with pytest.raises(KeyError):
        ask(FakeHandle(KeyError("x"), REPLY))


def test_a_late_answer_is_cancelled():
    late = SegmentCall(CALL.image, ("crack",), timeout_s=0.05)
    handle = FakeHandle("hang")
    assert ask(handle, late).type == "timeout"
    assert handle.responses[0].is_cancelled
    assert ask(FakeHandle(died(), "hang"), late).type == "replica_failed"  # it had failed before its time was over


@pytest.mark.parametrize(("status", "type"), [(503, "overloaded"), (429, "too_many_requests")])
def test_full_queues(status: int, type: str):
    answer = ask(FakeHandle(BackPressureError(2, 1)), overload_status=status)
    assert (answer.type, answer.retry_after_s) == (type, 2.0)


async def test_broadcasts_join_all_replicas():
    backend = ServeBackend(
        FakeHandle(
            [
                page_of(AdapterResponse(id="a"), AdapterResponse(id="b")),
                died(),
                page_of(AdapterResponse(id="b", resident=True)),
            ],
            [("one", "text"), died()],
            [died(), True],
            [],
            [],
            TimeoutError(),
        ),
        ServeSettings(),
    )
    assert await backend.list_adapters() == page_of(AdapterResponse(id="a"), AdapterResponse(id="b", resident=True))
    assert await backend.metrics() == {"one": "text"}
    assert await backend.ready()
    assert not await backend.ready()
    none = await backend.list_adapters()
    assert isinstance(none, ServeError)
    assert none.type == "not_ready"
    assert not await backend.ready()


async def test_a_broadcast_waits_for_a_replica():
    """Serve has none in its list while the only one takes over a new user_config."""
    gone = DeploymentUnavailableError(DeploymentID("Segmenter"))
    page = page_of(AdapterResponse(id="a"))
    backend = ServeBackend(FakeHandle(gone, gone, [page], gone, [("one", "text")]), ServeSettings())
    assert await backend.list_adapters() == page
    assert await backend.metrics() == {"one": "text"}
