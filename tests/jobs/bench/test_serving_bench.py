"""The load generator does what it says, both servers are asked the same, and the report has its rows.

Times decide nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from aiohttp import web
from rich.console import Console

from jobs.bench import servers
from jobs.bench.load import NO_ANSWER, LoadResult, Request, Sample, closed_loop, in_order, open_loop, with_new_bytes
from jobs.bench.plain_server import PlainSegmenter
from jobs.bench.serving_report import Rows, ServingReport
from jobs.bench.serving_work import SIZE_HW, ServingPlan, Work, draw_picture, prepare_work
from sam3lora.engine.detections import PostProcessing
from sam3lora.engine.segmenter import Segmenter
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import list_adapters, read_metadata
from sam3lora.model.tiny import TINY_FOLDER

JOB = Path(__file__).parents[3] / "jobs/bench.py"


# ---- load -----------------------------------------------------------------------------------------------------------


class Target:
    """A server that keeps the bodies it was sent and answers as `answer` says."""

    def __init__(self, answer: Callable[[], web.Response]) -> None:
        self.answer = answer
        self.bodies: list[bytes] = []
        self.at_once = 0
        self.most_at_once = 0

    async def handle(self, request: web.Request) -> web.Response:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.bodies.append(await request.read())
        await asyncio.sleep(0)  # lets others in, if there are any
        try:
            return self.answer()
        finally:
            self.at_once -= 1


@contextlib.asynccontextmanager
async def serving(handler):
    app = web.Application()
    app.router.add_post("/v1/segment", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


REQUESTS = [Request("/v1/segment?prompts=a", bytes([number])) for number in range(3)]


def test_in_order_keeps_order_status_and_replies():
    statuses = iter([200, 503, 200])
    target = Target(lambda: web.Response(status=next(statuses), body=b"said"))

    async def run():
        async with serving(target.handle) as url:
            return await in_order(url, REQUESTS, keep_replies=True)

    found = asyncio.run(run())
    assert target.bodies == [b"\0", b"\1", b"\2"]
    assert target.most_at_once == 1
    assert [sample.status for sample in found.samples] == [200, 503, 200]
    assert {sample.reply for sample in found.samples} == {b"said"}
    assert found.num_errors == 1


def test_closed_loop_has_as_many_requests_under_way_as_clients():
    target = Target(lambda: web.Response(body=b""))

    async def run():
        async with serving(target.handle) as url:
            return await closed_loop(url, REQUESTS, clients=4, seconds=0.3, warm_up_s=0.1)

    found = asyncio.run(run())
    assert 0 < len(found.samples) <= len(target.bodies)
    assert 1 < target.most_at_once <= 4
    # all clients draw from one row of requests, again and again
    counts = [target.bodies.count(request.body) for request in REQUESTS]
    assert max(counts) - min(counts) <= 1
    assert found.per_second == len(found.samples) / 0.3


def test_open_loop_does_not_wait_for_answers():
    """No request is answered before five have arrived: a loop that waited would never end."""
    arrived = []

    async def run():
        enough = asyncio.Event()

        async def handle(request: web.Request) -> web.Response:
            arrived.append(await request.read())
            if len(arrived) >= 5:
                enough.set()
            await enough.wait()
            return web.Response()

        async with serving(handle) as url:
            return await asyncio.wait_for(open_loop(url, REQUESTS, per_second=200, seconds=0.5), timeout=60)

    found = asyncio.run(run())
    assert len(found.samples) == len(arrived) >= 5
    assert found.num_errors == 0


def test_no_connection_is_an_error_without_a_status():
    found = asyncio.run(in_order("http://127.0.0.1:9", REQUESTS[:1]))
    assert [sample.status for sample in found.samples] == [NO_ANSWER]
    assert found.num_errors == 1


def test_latencies_are_those_of_one_status():
    samples = [Sample(0.1, 200), Sample(0.3, 200), Sample(0.001, 503), Sample(5.0, NO_ANSWER)]
    found = LoadResult(samples, seconds=2.0)
    assert found.per_second == 1.0
    assert (found.num_errors, found.num_of(503)) == (2, 1)
    assert found.latency_ms(50) == pytest.approx(200)
    assert found.latency_ms(99, 503) == pytest.approx(1)
    assert found.latency_ms(50, 429) is None


def test_a_new_file_of_the_same_picture():
    jpeg = draw_picture(0).jpeg
    first, second = with_new_bytes(jpeg), with_new_bytes(jpeg)
    assert len({jpeg, first, second}) == 3
    pixels = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in (jpeg, first, second)]
    assert (pixels[0] == pixels[1]).all()
    assert (pixels[0] == pixels[2]).all()


# ---- work -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    return prepare_work(tmp_path_factory.mktemp("work"), "tiny", num_adapters=4, num_pictures=2)


def test_pictures_are_of_the_size_that_is_told():
    for number in range(6):
        picture = draw_picture(number)
        assert 40_000 <= len(picture.jpeg) <= 130_000
        assert cv2.imdecode(np.frombuffer(picture.jpeg, np.uint8), cv2.IMREAD_COLOR).shape == (*SIZE_HW, 3)
        assert picture.prompt


def test_some_adapters_change_the_vision_tower_and_most_do_not(work):
    folders = list_adapters(work.adapters)
    assert list(folders) == list(work.questions) == [f"adapter_{number:02d}" for number in range(4)]
    components = [read_metadata(folder).lora["components"] for folder in folders.values()]
    assert ["vision_encoder" in of_adapter for of_adapter in components] == [False, False, False, True]


def test_every_request_names_an_adapter_and_a_threshold(work):
    assert len(work.requests(4, "pool")) == len(work.requests(4, "different")) == 8
    same = work.requests(2, "same")
    assert len({request.body for request in same}) == 1
    assert {adapter in request.path for request in same for adapter in ("adapter_00", "adapter_01")} == {True, False}
    assert all("threshold=0." in request.path and "nms_iou=1.0" in request.path for request in same)
    assert work.requests(4, "pool") == work.requests(4, "pool")


def test_both_ways_keep_a_tenth_of_the_queries(work):
    """The plain server's answers against those of `Segmenter`, one adapter at a time: the same detections."""
    plain = PlainSegmenter(TINY_FOLDER, work.adapters)
    ours = Segmenter("tiny", adapters=list_adapters(work.adapters))
    for adapter, questions in work.questions.items():
        for question in questions:
            picture = question.picture
            pixels = cv2.imdecode(np.frombuffer(picture.jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
            expected = ours.detect(
                ours.encode([pixels]),
                [picture.prompt],
                adapter=adapter,
                post=PostProcessing(threshold=question.threshold, nms="none"),
            )[0][0]
            result = plain.segment(picture.jpeg, picture.prompt, adapter, question.threshold)["results"][0]
            scores = sorted((detection["score"] for detection in result["detections"]), reverse=True)
            assert result["num_detections"] == len(expected) == 3  # of 32 object queries
            # pictures are made smaller by other libraries
            np.testing.assert_allclose(scores, expected.scores, rtol=0.2)
            assert all(detection["mask"]["size"] == list(SIZE_HW) for detection in result["detections"])


def test_adapters_differ(work):
    plain = PlainSegmenter(TINY_FOLDER, work.adapters)
    picture = draw_picture(0)
    scores = [plain.scores(picture.jpeg, picture.prompt, adapter) for adapter in work.questions]
    again = plain.scores(picture.jpeg, picture.prompt, next(iter(work.questions)))
    assert (scores[0] == again).all()
    assert all((scores[0] != other).any() for other in scores[1:])


@pytest.mark.parametrize(
    ("values", "said"),
    [({"clients": ()}, "clients must be positive"), ({"adapters": (4, 0)}, r"\[4, 0\]"), ({"seconds": 0}, "got 0")],
)
def test_a_plan_that_measures_nothing(values, said):
    with pytest.raises(UserError, match=said):
        ServingPlan(**values)


# ---- servers --------------------------------------------------------------------------------------------------------

READY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_a_server_is_stopped_at_the_end_of_its_block(tmp_path):
    with servers._running([sys.executable, "-c", READY], tmp_path / "log") as server:
        assert servers._answers(f"{server.url}/readyz")
        assert not servers._answers(f"{server.url}/other")
    assert not servers._answers(f"{server.url}/readyz")
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_server_that_ends_says_why(tmp_path):
    script = "print('no such model'); raise SystemExit(3)"
    with (
        pytest.raises(UserError, match=r"(?s)ended with 3.*no such model"),
        servers._running([sys.executable, "-c", script], tmp_path / "log"),
    ):
        pytest.fail("it was never ready")


# ---- report ---------------------------------------------------------------------------------------------------------


def test_tables_are_printed_and_kept():
    rows = [{"clients": 1, "p50 ms": 12.345, "p99 ms": None}, {"clients": 8, "p50 ms": 1234.5, "p99 ms": 0.0}]
    report = ServingReport("Serving", [Rows("Closed loop", rows, "read so")], {"kept": 3})
    console = Console(width=100, file=io.StringIO())
    report.print(console)
    text = console.file.getvalue()
    for words in ("Serving", "Closed loop", "clients", "12.3", "1234", "-", "read so", "kept: 3"):
        assert words in text
    assert json.loads(json.dumps(report.to_dict()))["tables"][0]["rows"] == rows
    assert report.table("Closed").note == "read so"


# ---- the whole ------------------------------------------------------------------------------------------------------


def test_several_numbers_after_an_option():
    words = runpy.run_path(str(JOB))["_one_word_each"]
    assert words(["serve", "--clients", "1", "8", "--json", "x", "--adapters", "4"]) == [
        *["serve", "--clients", "1", "--clients", "8", "--json", "x", "--adapters", "4"]
    ]


@pytest.mark.slow
def test_the_job_asks_both_servers_the_same(tmp_path):
    path = tmp_path / "found.json"
    options = ["--clients", "1", "4", "--adapters", "1", "4", "--seconds", "2", "--no-repeated", "--json", str(path)]
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    result = subprocess.run(
        [sys.executable, str(JOB), "serve", *options], capture_output=True, text=True, env=environment, timeout=900
    )
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(path.read_text())
    tables = {table["title"].partition(",")[0]: table["rows"] for table in found["tables"]}
    closed = tables["Closed loop"]
    assert [(row["clients"], row["adapters"]) for row in closed] == [(1, 1), (1, 4), (4, 1), (4, 4)]
    assert [row["images"] for row in tables["Images"]] == ["same", "pool", "different"]
    for row in closed + tables["Images"]:
        assert row["plain errors"] == row["ours errors"] == 0
    assert [row["image"] for row in tables["HTTP overhead of ours"]] == ["known", "new"]
    assert [row["x capacity"] for row in tables["Open loop: Poisson arrivals"]] == [0.5, 1.0, 2.0]
    assert all(row["other errors"] == 0 for row in tables["Open loop: Poisson arrivals"])
    assert len(tables["Cold and warm"]) == 5
    facts = found["facts"]
    assert facts["detections, plain"] == facts["detections, ours"] == 4 * 3
    assert facts["questions with equally many"] == "4 of 4"
    assert facts["IoU of the best mask, median"] > 0.9
    assert "Closed loop" in result.stdout
    assert "ours / plain" in result.stdout
