"""The classes that Serve starts. Only the segmenter's process imports torch: the ingress stays small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray import serve

from serve_app.calls import AdapterInfo, ImageFile, ImageReply, SegmentCall, SegmentReply
from serve_app.http.errors import ServeError
from serve_app.settings import ServeSettings

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


@serve.ingress()
class Ingress:
    """The HTTP side; see `serve_app.http.ingress`."""

    def __init__(self, settings: ServeSettings, segmenter: DeploymentHandle) -> None:
        self._settings = settings
        self._segmenter = segmenter

    def __serve_build_asgi_app__(self) -> Any:
        from serve_app.http.backend import ServeBackend
        from serve_app.http.ingress import create_api

        backend = ServeBackend(self._segmenter, self._settings)
        return create_api(self._settings, backend, sends_request_id=False)


class Segmenter:
    """The model side; see `serve_app.replica.replica.Segmenter`, which this stands for."""

    def __init__(self, settings: ServeSettings) -> None:
        from serve_app.replica import replica

        self._segmenter = replica.Segmenter(settings)

    async def segment(self, call: SegmentCall) -> SegmentReply | ServeError:
        return await self._segmenter.segment(call)

    async def keep_image(self, image: ImageFile, timeout_s: float) -> ImageReply | ServeError:
        return await self._segmenter.keep_image(image, timeout_s)

    async def list_adapters(self) -> list[AdapterInfo]:
        return await self._segmenter.list_adapters()

    async def named_metrics(self) -> tuple[str, str]:
        return await self._segmenter.named_metrics()

    async def ready(self) -> bool:
        return await self._segmenter.ready()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await self._segmenter.reconfigure(user_config)

    def check_health(self) -> None:
        self._segmenter.check_health()
