"""What clients see when processes of the service die or it is restarted, with the client library and without."""

from __future__ import annotations

import json
import signal
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlencode

import psutil

import serve_app
from jobs.bench.servers import Server, free_port, our_server
from jobs.bench.serving_report import Rows, ServingReport
from sam3lora.client import Client, SegmentationError

FOLDER = Path(serve_app.__file__).parent
IMAGE = (FOLDER / "static" / "sample.jpg").read_bytes()
PROMPTS = ("gear", "arrow")
ADAPTERS = ("parts", "parts-light", None)
KILLED = {
    "kill -9 of the model's process": "Segmenter",
    "kill -9 of the HTTP process": "Ingress",
}
STOPPED = {"kill -9 of `sam3lora serve`, and a new start": signal.SIGKILL, "stop, and a new start": signal.SIGTERM}
QUIET_S = 6.0
"""Of load before the fault, and after the service answers again."""
LONGEST_S = 180.0


@dataclass
class Answers:
    """When each request began and ended, and what came of it: "ok", or words for a failure."""

    samples: list[tuple[float, float, str]] = field(default_factory=list)

    def kinds(self) -> Counter[str]:
        return Counter(kind for _, _, kind in self.samples)

    def ok_after(self, moment: float) -> bool:
        """Whether a request that began after this moment was answered."""
        return any(began > moment and kind == "ok" for began, _, kind in self.samples)

    def longest_s(self) -> float:
        return max((ended - began for began, ended, kind in self.samples if kind == "ok"), default=float("nan"))


def measure_faults(*, clients: int = 4) -> ServingReport:
    """Each fault under the load of so many clients of either kind."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="sam3lora-bench-") as scratch:
        log, port = Path(scratch) / "log", free_port()
        start = partial(our_server, "tiny", FOLDER / "samples", log, port=port)
        for name, victim in KILLED.items():
            with start() as server:
                rows.append(_measure(name, server.url, clients, partial(_kill, server, victim)))
        for name, number in STOPPED.items():
            with ExitStack() as stack:
                server = stack.enter_context(start())
                rows.append(_measure(name, server.url, clients, partial(_restart, server, number, stack, start)))
    return ServingReport(
        "What clients see when processes of the service die, one at a time",
        [Rows("faults", rows, "failed: requests of which the caller gets an error")],
        {"load": f"{clients} clients of either kind, the sample image, two prompts, three adapters in turns"},
    )


def _measure(name: str, url: str, clients: int, fault: Callable[[], None]) -> dict[str, object]:
    with _asking(_with_library, url, clients) as library, _asking(_plain, url, clients) as plain:
        time.sleep(QUIET_S)
        began = time.monotonic()
        fault()
        while not (plain.ok_after(began + 0.2) and _is_ready(url)):
            if time.monotonic() > began + LONGEST_S:
                break
            time.sleep(0.05)
        back_s = time.monotonic() - began
        time.sleep(QUIET_S)
    failed = library.kinds()
    num_ok = failed.pop("ok", 0)
    others = plain.kinds()
    return {
        "fault": name,
        "back after, s": back_s,
        "client library: answered": num_ok,
        "longest, s": library.longest_s(),
        "failed": _words(failed),
        "plain HTTP: answered": others.pop("ok", 0),
        "others": _words(others),
    }


@contextmanager
def _asking(ask: Callable[[str, int], Iterator[str]], url: str, clients: int) -> Iterator[Answers]:
    answers, over = Answers(), threading.Event()

    def run(number: int) -> None:
        asking = ask(url, number)
        while not over.is_set():
            began = time.monotonic()
            kind = next(asking)
            answers.samples.append((began, time.monotonic(), kind))
            if kind != "ok":
                time.sleep(0.1)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _with_library(url: str, number: int) -> Iterator[str]:
    with Client(url) as client:
        while True:
            try:
                client.segment(IMAGE, PROMPTS, adapter=ADAPTERS[number % len(ADAPTERS)])
                yield "ok"
            except SegmentationError as error:
                yield f"{type(error).__name__} {error.type}"


def _plain(url: str, number: int) -> Iterator[str]:
    """One attempt, as curl makes it."""
    query = [("prompts", prompt) for prompt in PROMPTS]
    if adapter := ADAPTERS[number % len(ADAPTERS)]:
        query.append(("adapter", adapter))
    request = urllib.request.Request(f"{url}/v1/segment?{urlencode(query)}", IMAGE, {"Content-Type": "image/jpeg"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                response.read()
            yield "ok"
        except urllib.error.HTTPError as error:
            yield _kind_of(error)
        except (urllib.error.URLError, OSError):
            yield "no connection"
        except HTTPException:
            yield "half an answer"


def _kind_of(error: urllib.error.HTTPError) -> str:
    try:
        return f"{error.code} {json.load(error)['error']['type']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code} not ours"


def _words(kinds: Counter[str]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())) or "0"


def _kill(server: Server, victim: str) -> None:
    for process in psutil.Process(server.pid).children(recursive=True):
        if victim in " ".join(process.cmdline()):
            process.kill()
            return
    raise LookupError(victim)


def _restart(
    server: Server, number: signal.Signals, stack: ExitStack, start: Callable[[], AbstractContextManager[Server]]
) -> None:
    psutil.Process(server.pid).send_signal(number)
    while _is_listening(server.url):
        time.sleep(0.05)
    stack.enter_context(start())


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _is_listening(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0
