"""A service on a Ray of its own whose segmenters die, hang and refuse as their prompts say; `python FILE PORT FOLDER`.

It runs until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from serve_app.environment import prepare_environment

prepare_environment()

import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.config import RequestRouterConfig  # noqa: E402

from serve_app.builder import ROUTER  # noqa: E402
from serve_app.http.backend import ServeBackend  # noqa: E402
from serve_app.http.errors import ServeError  # noqa: E402
from serve_app.http.ingress import create_api  # noqa: E402
from serve_app.http.schemas import AdapterResponse  # noqa: E402
from serve_app.messages import ImageFile, ImageReply, SegmentCall, SegmentReply  # noqa: E402
from serve_app.settings import Limits, ServeSettings  # noqa: E402

SIZE_HW = (48, 64)


class FaultySegmenter:
    """`die once`: the first replica that is asked exits; `die`: every one does; `hang`: no answer until cancelled."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    async def segment(self, call: SegmentCall) -> SegmentReply | ServeError:
        words = call.prompts[0]
        me = str(os.getpid())
        (self._folder / f"asked {words}").open("a").write(me + "\n")
        if words == "die" or (words == "die once" and self._is_first(words)):
            os._exit(1)
        if words == "bug":
            raise RuntimeError(f"secret {words}")
        if words == "hang":
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                (self._folder / "cancelled").touch()
                raise
        if words == "refuse":
            return ServeError("overloaded", "the queue is full", 3.2)
        return SegmentReply(SIZE_HW, [], {"pid": float(me), "left": call.timeout_s})

    async def keep_image(self, image: ImageFile, timeout_s: float) -> ImageReply | ServeError:
        return ImageReply(image.key, SIZE_HW, False)

    async def list_adapters(self) -> list[AdapterResponse]:
        return [AdapterResponse(id="cracks", resident=True)]

    async def named_metrics(self) -> tuple[str, str]:
        return str(os.getpid()), "# HELP n N.\n# TYPE n gauge\nn 1.0\n"

    async def ready(self) -> bool:
        return True

    def _is_first(self, words: str) -> bool:
        try:
            (self._folder / f"first {words}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@serve.ingress()
class Front:
    def __init__(self, settings: ServeSettings, segmenter: Any) -> None:
        self._settings, self._segmenter = settings, segmenter

    def __serve_build_asgi_app__(self) -> Any:
        return create_api(self._settings, ServeBackend(self._segmenter, self._settings))


def main(port: int, folder: str) -> None:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    settings = ServeSettings(limits=Limits(timeout_s=8.0))
    segmenter = serve.deployment(
        FaultySegmenter,
        name="Segmenter",
        num_replicas=2,
        max_ongoing_requests=4,
        max_queued_requests=1,
        ray_actor_options={"num_cpus": 0.5},
        health_check_period_s=1,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )
    front = serve.deployment(Front, name="Front", max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.1})
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(front.bind(settings, segmenter.bind(folder)), route_prefix="/")
    print("running", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
