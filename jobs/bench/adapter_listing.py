"""How long `GET /v1/adapters` takes, and how many bytes it sends, with many adapter folders.

    python jobs/bench/adapter_listing.py --folders 2000
    python jobs/bench/adapter_listing.py --write /tmp/many --folders 2000      # for a service on Ray:
    sam3lora serve --adapters /tmp/many --port 8010
    python jobs/bench/adapter_listing.py --url http://127.0.0.1:8010

Without `--url` the HTTP routes and one replica with the tiny model run in this process, behind a real socket.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import uvicorn

import serve_app
from serve_app.http.ingress import create_api
from serve_app.replica.replica import ModelReplica
from serve_app.settings import AdapterSettings, ServeSettings

SAMPLE = Path(serve_app.__file__).parent / "samples" / "parts-light"
PATHS = (
    "v1/adapters",
    "v1/adapters?limit=50",
    "v1/adapters?search=LINE-000&limit=50",
    "v1/adapters?search=bolt&limit=50",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", type=int, default=2000)
    parser.add_argument("--write", type=Path, help="write the folders here and end")
    parser.add_argument("--url", help="measure a running service instead")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if args.write:
        write_folders(args.write, args.folders)
    elif args.url:
        measure(args.url, args.repeats)
    else:
        with tempfile.TemporaryDirectory() as root:
            write_folders(Path(root), args.folders)
            with local_service(Path(root)) as url:
                measure(url, args.repeats)


def write_folders(root: Path, count: int) -> None:
    """Copies of a sample adapter, with prompts of their own."""
    metadata = json.loads((SAMPLE / "sam3lora.json").read_text())
    for number in range(count):
        folder = root / f"line-{number:05d}"
        shutil.copytree(SAMPLE, folder)
        metadata["prompts"] = [f"bolt {number}", f"gear {number}"]
        (folder / "sam3lora.json").write_text(json.dumps(metadata))


class LocalBackend:
    """A `Backend` of one replica in this process."""

    def __init__(self, replica: ModelReplica) -> None:
        self.segment, self.label, self.refine = replica.segment, replica.label, replica.refine
        self.keep_image = replica.keep_image
        self.list_adapters, self.ready = replica.list_adapters, replica.ready
        self._named_metrics = replica.named_metrics

    async def metrics(self) -> dict[str, str]:
        return dict([await self._named_metrics()])


@contextmanager
def local_service(root: Path) -> Iterator[str]:
    """The address of a service over one replica in this process."""
    settings = ServeSettings(model="tiny", adapters=AdapterSettings(root=root))
    started: list[tuple[uvicorn.Server, int]] = []
    ready = threading.Event()

    async def serve() -> None:
        replica = ModelReplica(settings)
        api = create_api(settings, LocalBackend(replica))
        server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error"))
        running = asyncio.create_task(server.serve())
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        started.append((server, server.servers[0].sockets[0].getsockname()[1]))
        ready.set()
        await running
        await replica.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(120)
    (server, port) = started[0]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def measure(url: str, repeats: int) -> None:
    print("| request | first ms | median ms | slowest ms | bytes |\n|---|---|---|---|---|")
    with httpx.Client(base_url=url, timeout=120) as client:
        for path in PATHS:
            times = []
            for _ in range(1 + repeats):
                started = time.perf_counter()
                reply = client.get(path)
                times.append(1e3 * (time.perf_counter() - started))
            first, *later = times
            size = len(reply.content) if reply.status_code == 200 else f"status {reply.status_code}"
            print(f"| `{path}` | {first:.0f} | {statistics.median(later):.1f} | {max(later):.1f} | {size} |")


if __name__ == "__main__":
    main()
