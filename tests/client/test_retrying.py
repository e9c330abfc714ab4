"""Faults: which are told how, which calls are repeated, and when a client gives up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate

import httpx2 as httpx
import pytest

from sam3lora.client import (
    Client,
    ConnectionFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    SegmentationError,
    ServerError,
    Timeout,
    Unauthorized,
)
from sam3lora.client.exchange import retry_after_s

from .scripted import Script, fault, segmented


def test_retries_wait_as_long_as_retry_after_and_get_the_remaining_time(kind):
    date = {"Retry-After": formatdate(1_000_003, usegmt=True), "Date": formatdate(1_000_000, usegmt=True)}
    script = Script(
        fault(503, "overloaded", **{"Retry-After": "3"}), fault(429, "too_many_requests", **date), segmented
    )
    script.client(kind, timeout_s=20).segment(b"x", ["a"])
    assert len(script.requests) == 3
    assert len({request.headers["x-request-id"] for request in script.requests}) == 1
    assert len({request.headers["content-length"] for request in script.requests}) == 1
    assert len(script.waits) == 2
    assert all(3.0 <= wait <= 3.3 for wait in script.waits)
    timeouts_s = [request.extensions["timeout"]["read"] for request in script.requests]
    assert timeouts_s == pytest.approx([20, 16.85, 13.7], abs=0.31)


@pytest.mark.parametrize("status", [503, 429, 502])
def test_retries_are_limited(kind, status):
    script = Script(fault(status, "overloaded", **{"Retry-After": "1"}))
    with pytest.raises(Overloaded) as caught:
        script.client(kind, max_retries=2).segment(b"x", ["a"])
    assert len(script.requests) == 3
    assert caught.value.retry_after_s == 1.0


def test_a_service_that_is_not_there(kind):
    script = Script(httpx.ConnectError("refused"))
    with pytest.raises(ConnectionFailed, match="refused") as caught:
        script.client(kind, max_retries=1).segment(b"x", ["a"])
    assert len(script.requests) == 2
    assert (caught.value.status, caught.value.type) == (None, "connection_failed")
    assert caught.value.request_id == script.requests[0].headers["x-request-id"]


def test_broken_connections_are_retried_with_growing_waits(kind):
    script = Script(
        httpx.ConnectError("refused"), httpx.ReadError("reset"), httpx.RemoteProtocolError("gone"), segmented
    )
    script.client(kind).segment(b"x", ["a"])
    assert len(script.requests) == 4
    assert all(0.5 * full <= wait <= full for wait, full in zip(script.waits, (0.25, 0.5, 1.0), strict=True))


def test_a_client_is_patient_with_a_service_that_it_knows(kind):
    # A restart takes longer than a few retries.
    script = Script(segmented, *[httpx.ConnectError("refused")] * 12, segmented)
    client = script.client(kind, timeout_s=60)
    client.segment(b"x", ["a"])
    client.segment(b"x", ["a"])
    assert len(script.requests) == 14
    assert max(script.waits) <= 4

    # A program that waits until the service is ready knows it.
    script = Script(httpx.Response(200, json={"status": "ready"}), *[httpx.ConnectError("refused")] * 12, segmented)
    client = script.client(kind, timeout_s=60)
    assert client.ready()
    client.segment(b"x", ["a"])
    assert len(script.requests) == 14

    # The URL may be wrong: nothing ever responded there.
    script = Script(httpx.ConnectError("refused"))
    with pytest.raises(ConnectionFailed):
        script.client(kind, timeout_s=60).segment(b"x", ["a"])
    assert len(script.requests) == 4


def test_a_service_that_says_at_once_is_not_flooded(kind):
    script = Script(fault(503, "overloaded", **{"Retry-After": "0"}))
    with pytest.raises(Overloaded):
        script.client(kind, timeout_s=60).segment(b"x", ["a"])
    assert 10 < len(script.requests) < 60


@pytest.mark.parametrize("type", ["replica_failed", "out_of_memory"])
def test_a_request_that_may_be_the_cause_is_not_repeated_for_ever(kind, type):
    script = Script(fault(503, type, **{"Retry-After": "1"}))
    with pytest.raises(Overloaded):
        script.client(kind, timeout_s=60).segment(b"x", ["a"])
    assert len(script.requests) == 4


def test_no_wait_goes_beyond_the_timeout(kind):
    # Sleeping for 30 s and failing then would help nobody: the answer is given at once.
    script = Script(fault(503, "overloaded", **{"Retry-After": "30"}))
    with pytest.raises(Overloaded):
        script.client(kind, timeout_s=20).segment(b"x", ["a"])
    assert (len(script.requests), script.waits) == (1, [])

    # The time of all attempts together counts.
    script = Script(fault(503, "overloaded", **{"Retry-After": "9"}))
    with pytest.raises(Overloaded):
        script.client(kind, timeout_s=20, max_retries=99).segment(b"x", ["a"])
    assert len(script.requests) == 3


def test_a_slow_answer_is_given_up(kind):
    script = Script(httpx.ReadTimeout("slow"))
    with pytest.raises(Timeout, match="within 60 s") as caught:
        script.client(kind).segment(b"x", ["a"])
    assert (len(script.requests), caught.value.type) == (1, "timeout")


def test_an_answer_that_trickles_is_given_up(kind):
    class Trickle(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for _ in range(100):
                script.now += 1.0
                yield b" "

        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece in self:
                yield piece

    script = Script(lambda request: httpx.Response(200, stream=Trickle()))
    with pytest.raises(Timeout):
        script.client(kind, timeout_s=10).adapters()
    assert script.now == 111.0


@pytest.mark.parametrize(
    ("status", "error_class"),
    [
        (400, InvalidRequest),
        (401, Unauthorized),
        (403, Unauthorized),
        (404, NotFound),
        (413, InvalidRequest),
        (415, InvalidRequest),
        (422, InvalidRequest),
        (500, ServerError),
        (504, Timeout),
    ],
)
def test_errors_have_their_class_and_are_not_retried(kind, status, error_class):
    script = Script(fault(status, "the_type"))
    with pytest.raises(SegmentationError) as caught:
        script.client(kind).segment(b"x", ["a"])
    error = caught.value
    assert type(error) is error_class
    assert (error.type, error.message, error.status, error.request_id) == ("the_type", "a message", status, "r7")
    assert str(error) == f"a message (the_type, HTTP {status}, request r7)"
    assert len(script.requests) == 1


def test_responses_of_other_servers_are_recognised():
    # A proxy's page, a redirect, a page instead of JSON, and JSON of something else.
    for response, error_class, kind_of_fault in [
        (httpx.Response(500, html="<h1>It failed</h1>"), ServerError, "http_500"),
        (httpx.Response(302, headers={"location": "http://elsewhere.test/"}), ServerError, "http_302"),
        (httpx.Response(200, html="<h1>It works</h1>"), ServerError, "unexpected_answer"),
        (httpx.Response(200, json={"hello": 1}), ServerError, "unexpected_answer"),
        (httpx.Response(200, json=[1]), ServerError, "unexpected_answer"),
    ]:
        script = Script(response)
        with pytest.raises(error_class) as caught:
            script.client(Client).adapters()
        assert caught.value.type == kind_of_fault
        assert len(script.requests) == 1


def test_retry_after():
    date = formatdate(1_000_000, usegmt=True)
    later = formatdate(1_000_007, usegmt=True)
    assert retry_after_s({"retry-after": "12"}) == 12
    assert retry_after_s({"retry-after": later, "date": date}) == 7
    assert retry_after_s({"retry-after": date, "date": later}) == 0
    assert retry_after_s({"retry-after": later}) == 0  # long ago by this machine's clock
    for unusable in ({}, {"retry-after": "soon"}, {"retry-after": "-3"}, {"retry-after": later, "date": "?"}):
        assert retry_after_s(unusable) is None
