"""What HTTP adds to the model's work for one client, by the processes that a request passes."""

from __future__ import annotations

import http.client
import json
import statistics
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil

import serve_app
from jobs.bench.servers import Server, our_server
from jobs.bench.serving_report import Rows, ServingReport
from jobs.bench.serving_work import Picture, draw_picture
from sam3lora.local_ray import environment

SAMPLES = Path(serve_app.__file__).parent / "samples"
WAYS = {
    "itself": {},
    "Ray Serve": {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"},
    "HAProxy": None,
}
"""Who listens on the port -> the variables with which the service starts; None asks for `--haproxy`."""

_QUESTION = "/v1/segment?prompts=gear&adapter=parts&masks=rle"
_WARM_UP = 20


def measure_hops(*, requests: int = 300) -> ServingReport:
    """The service started in each way, and asked about one known image by one client that keeps its connection."""
    picture = draw_picture(0)
    rows = []
    for name, variables in WAYS.items():
        with (
            tempfile.TemporaryDirectory(prefix="sam3lora-bench-") as scratch,
            environment(variables or {}),
            our_server("tiny", SAMPLES, Path(scratch) / "log", haproxy=variables is None) as server,
        ):
            rows.append({"listens": name, **_measure(server, picture, requests)})
    note = (
        "Medians, ms. Adds: what the client waits beside the model's forward and masks. In front: before and after the "
        "application's HTTP process. Call: of the model's process. Processor: of the HTTP processes, for a request."
    )
    return ServingReport("What HTTP adds for a known image, one client", [Rows("hops", rows, note)], _facts(picture))


def _measure(server: Server, picture: Picture, requests: int) -> dict[str, float]:
    address = urlsplit(server.url)
    client = http.client.HTTPConnection(str(address.hostname), address.port)
    for _ in range(_WARM_UP):
        _ask(client, picture)
    processes = _http_processes(server)
    before = _processor_s(processes)
    found = [_ask(client, picture) for _ in range(requests)]
    processor_ms = (_processor_s(processes) - before) * 1000 / requests

    def median(*stages: str) -> float:
        return statistics.median(sum(stage_ms.get(stage, 0.0) for stage in stages) for stage_ms in found)

    model = ("forward", "masks")
    within = ("decode", "adapter", "queue", *model)
    rest = statistics.median(stage_ms["client"] - sum(map(stage_ms.__getitem__, model)) for stage_ms in found)
    return {
        "client": median("client"),
        "model": median(*model),
        "adds": rest,
        "in front": statistics.median(stage_ms["client"] - stage_ms["total"] for stage_ms in found),
        "body": median("body"),
        "check": median("check"),
        "call": statistics.median(
            stage_ms["segmenter"] - sum(stage_ms.get(stage, 0.0) for stage in within) for stage_ms in found
        ),
        "processor": processor_ms,
    }


def _ask(client: http.client.HTTPConnection, picture: Picture) -> dict[str, float]:
    """The milliseconds of each stage that the service tells, and `client`: from the request to its answer."""
    began = time.perf_counter()
    client.request("POST", _QUESTION, body=picture.jpeg, headers={"Content-Type": "image/jpeg"})
    answer = client.getresponse().read()
    waited_ms = (time.perf_counter() - began) * 1000
    return {**json.loads(answer)["timing_ms"], "client": waited_ms}


def _http_processes(server: Server) -> list[psutil.Process]:
    """Of Ray Serve and HAProxy, without the model's."""
    family = psutil.Process(server.pid).children(recursive=True)
    return [one for one in family if any(name in one.name() for name in ("Ingress", "Proxy", "haproxy"))]


def _processor_s(processes: list[psutil.Process]) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in processes)


def _facts(picture: Picture) -> dict[str, str]:
    return {"request": f"a JPEG of {len(picture.jpeg) / 1000:.0f} KB, one prompt, one adapter, tiny model"}
