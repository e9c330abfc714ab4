"""Calls through Serve: affinity, deadlines, cancellation, and replicas that die at work."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve_app.http.backend import ServeBackend
from serve_app.http.errors import ServeError
from serve_app.http.schemas import AdapterResponse
from serve_app.messages import ImageFile, SegmentCall, SegmentReply
from serve_app.settings import Limits, ServeSettings

from .http_cases import PNG, picture

PORT = 18410
REPLY = SegmentReply((4, 4), [], {})
CALL = SegmentCall(ImageFile("key", b"image"), ("crack",), timeout_s=5.0)


# --- with a handle that answers as it is told ---


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
        self.segment = self.keep_image = self

    def options(self, *, session_id: str) -> FakeHandle:
        self.keys.append(session_id)
        return self

    def remote(self, *sent: Any) -> FakeResponse:
        self.sent.append(sent)
        self.responses.append(FakeResponse(self._outcomes.pop(0)))
        return self.responses[-1]

    def broadcast(self, method: str) -> Any:
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


def test_an_answer_and_a_refusal_come_back_as_they_are():
    refusal = ServeError("invalid_prompt", "too long")
    assert ask(FakeHandle(REPLY)) is REPLY
    assert ask(FakeHandle(refusal)) is refusal


def test_equal_images_and_equal_adapters_go_to_the_same_replica():
    handle = FakeHandle(REPLY, REPLY, REPLY)
    ask(handle)
    ask(handle, SegmentCall(ImageFile("key", b"image"), ("crack",), adapter="cracks"))
    ask(handle, SegmentCall(ImageFile("key"), ("crack",), adapter="cracks"))
    assert handle.keys == ["key", "adapter cracks", "key"]


@pytest.mark.parametrize("failure", FAILURES)
def test_one_more_try_elsewhere(failure: Callable[[], BaseException]):
    handle = FakeHandle(failure(), REPLY)
    assert ask(handle) is REPLY
    assert handle.keys[0] != handle.keys[1]
    first, second = (sent[0].timeout_s for sent in handle.sent)
    assert second < first == 5.0


@pytest.mark.parametrize("failure", FAILURES)
def test_two_failures_are_told(failure: Callable[[], BaseException]):
    answer = ask(FakeHandle(failure(), failure(), REPLY))
    assert (answer.type, answer.retry_after_s) == ("replica_failed", 2.0)


def test_a_bug_is_raised():
    with pytest.raises(KeyError):
        ask(FakeHandle(KeyError("x"), REPLY))


def test_no_time_left_after_a_failure_is_a_failure():
    late = SegmentCall(CALL.image, ("crack",), timeout_s=0.05)
    assert ask(FakeHandle(died(), "hang"), late).type == "replica_failed"


def test_a_late_answer_is_cancelled():
    handle = FakeHandle("hang")
    assert ask(handle, SegmentCall(CALL.image, ("crack",), timeout_s=0.05)).type == "timeout"
    assert handle.responses[0].is_cancelled


@pytest.mark.parametrize(("status", "type"), [(503, "overloaded"), (429, "too_many_requests")])
def test_full_queues(status: int, type: str):
    answer = ask(FakeHandle(BackPressureError(2, 1)), overload_status=status)
    assert (answer.type, answer.retry_after_s) == (type, 2.0)


def test_replicas_are_asked_all():
    backend = ServeBackend(
        FakeHandle(
            [[AdapterResponse(id="b"), AdapterResponse(id="a")], died(), [AdapterResponse(id="b", resident=True)]],
            [("one", "text"), died()],
            [died(), True],
            [],
            [],
            TimeoutError(),
        ),
        ServeSettings(),
    )

    async def scenario() -> None:
        assert await backend.list_adapters() == [AdapterResponse(id="a"), AdapterResponse(id="b", resident=True)]
        assert await backend.metrics() == {"one": "text"}
        assert await backend.ready()
        assert not await backend.ready()
        none = await backend.list_adapters()
        assert isinstance(none, ServeError)
        assert none.type == "not_ready"
        assert not await backend.ready()

    asyncio.run(scenario())


def test_a_question_to_all_waits_for_a_replica():
    """Serve has none in its list while the only one takes over a new user_config."""
    gone = DeploymentUnavailableError(DeploymentID("Segmenter"))
    adapter = AdapterResponse(id="a")
    backend = ServeBackend(FakeHandle(gone, gone, [[adapter]], gone, [("one", "text")]), ServeSettings())

    async def scenario() -> None:
        assert await backend.list_adapters() == [adapter]
        assert await backend.metrics() == {"one": "text"}

    asyncio.run(scenario())


# --- on a real Ray ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    root = Path(__file__).parents[2]
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fault_server.py")), str(PORT), str(folder)],
            cwd=root,
            env=os.environ | environment | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        assert any(line == "running\n" for line in process.stdout), log.read_text()[-3000:]
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
            yield client
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def segment(client: httpx.Client, prompt: str, image: bytes = PNG, **parameters: Any) -> httpx.Response:
    return client.post(
        "/v1/segment", params={"prompts": prompt} | parameters, content=image, headers={"content-type": "image/png"}
    )


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.slow
class TestOnRay:
    def test_answers_and_affinity(self, service: httpx.Client):
        replicas: dict[int, set[float]] = {}
        for _ in range(3):
            for seed in range(8):
                answer = segment(service, "crack", picture(seed=seed))
                assert answer.status_code == 200, answer.text
                replicas.setdefault(seed, set()).add(answer.json()["timing_ms"]["pid"])
        assert all(len(pids) == 1 for pids in replicas.values())
        assert len(set.union(*replicas.values())) == 2

    def test_ready_adapters_metrics(self, service: httpx.Client):
        assert service.get("/readyz").status_code == 200
        assert [found["id"] for found in service.get("/v1/adapters").json()["adapters"]] == ["cracks"]
        text = service.get("/metrics").text
        assert text.count("n{replica=") == 2
        assert 'sam3lora_requests_total{outcome="ok"' in text

    def test_refusals_keep_their_words(self, service: httpx.Client):
        refused = segment(service, "refuse")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "4")
        assert refused.json()["error"]["message"] == "the queue is full"

    def test_a_bug_in_a_replica_is_a_500(self, service: httpx.Client):
        failed = segment(service, "bug")
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "internal")
        assert "secret" not in failed.text

    def test_time_limit(self, service: httpx.Client, folder: Path):
        late = segment(service, "hang")
        assert (late.status_code, late.json()["error"]["type"]) == (504, "timeout")
        until((folder / "cancelled").exists)

    def test_a_client_that_leaves(self, service: httpx.Client, folder: Path):
        until((folder / "cancelled").exists)
        (folder / "cancelled").unlink()
        with pytest.raises(httpx.ReadTimeout):
            service.post(
                "/v1/segment",
                params={"prompts": "hang"},
                content=PNG,
                headers={"content-type": "image/png"},
                timeout=httpx.Timeout(60, read=1.5),
            )
        until((folder / "cancelled").exists)

    def test_a_replica_that_dies_at_work_is_not_noticed(self, service: httpx.Client, folder: Path):
        answer = segment(service, "die once")
        assert answer.status_code == 200, answer.text
        first, second = (folder / "asked die once").read_text().split()
        assert first != second

    def test_when_all_die_it_is_told(self, service: httpx.Client):
        failed = segment(service, "die")
        assert (failed.status_code, failed.json()["error"]["type"]) == (503, "replica_failed")
        assert int(failed.headers["retry-after"]) >= 1
        until(lambda: segment(service, "crack").status_code == 200)
