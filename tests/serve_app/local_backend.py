"""A backend of the HTTP side that calls one replica in this process, without Ray."""

from __future__ import annotations

from serve_app.replica.replica import ModelReplica


class LocalBackend:
    """A `Backend` of one replica in this process."""

    def __init__(self, replica: ModelReplica) -> None:
        self.segment, self.keep_image = replica.segment, replica.keep_image
        self.list_adapters, self.ready = replica.list_adapters, replica.ready
        self.named_metrics = replica.named_metrics

    async def metrics(self) -> dict[str, str]:
        return dict([await self.named_metrics()])
