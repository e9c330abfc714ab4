"""Answers are JSON whatever the model computes: NaN and infinity are typed errors; other answers stay right."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from serve_app.http.errors import ServeError
from serve_app.messages import ImageFile, SegmentCall, SegmentReply
from serve_app.replica.replica import ModelReplica
from serve_app.settings import AdapterSettings, ServeSettings

from ..engine.engine_cases import ADAPTERS, write_adapter
from .http_cases import PNG, PNG_KEY, SIZE_HW, FakeBackend, as_json, found, make_client

KINDS = sorted(ADAPTERS)


@pytest.fixture(scope="module")
def replica(spread_base: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelReplica:
    """A replica with adapters of finite weights that are far too large, one for each part of the model."""
    root = tmp_path_factory.mktemp("adapters")
    for kind in KINDS:
        file = write_adapter(root / kind.replace(" ", "-"), spread_base, kind, 1) / "adapter_model.safetensors"
        save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return ModelReplica(ServeSettings(model=str(spread_base), adapters=AdapterSettings(root=root)))


def call(adapter: str | None, **post: Any) -> SegmentCall:
    image = ImageFile(PNG_KEY, PNG)
    return SegmentCall(image, ("crack", "hole"), adapter=adapter, post_processing={"max_detections": 2} | post)


def test_weights_that_are_too_large(replica: ModelReplica):
    """With a threshold in the way too: a score of NaN is not below it by being no number."""
    ids = [kind.replace(" ", "-") for kind in KINDS]
    adapters: list[str | None] = [None, *ids, None]

    async def ask(**post: Any) -> list[Any]:
        return await asyncio.gather(*(replica.segment(call(adapter, **post)) for adapter in adapters))

    async def both() -> tuple[list[Any], list[Any]]:
        return await ask(threshold=0.0), await ask(threshold=0.9)

    for first, *wild, last in asyncio.run(both()):
        for adapter, reply in zip(ids, wild, strict=True):
            if isinstance(reply, SegmentReply):  # some parts bound what comes out of them
                assert all(np.isfinite([result.presence, *result.scores]).all() for result in reply.results), adapter
            else:
                assert (reply.type, reply.field) == ("invalid_adapter", "adapter")
                assert "NaN or infinite" in reply.message
        assert any(isinstance(reply, ServeError) for reply in wild)
        for right in (first, last):
            assert isinstance(right, SegmentReply)
        np.testing.assert_allclose(first.results[0].scores, last.results[0].scores, rtol=1e-5)


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["presence", "scores", "boxes_xyxy"])
def test_no_number_leaves_the_service_that_json_cannot_hold(place: str, value: float):
    def answer(_: SegmentCall) -> SegmentReply:
        good = found("crack", 1)
        changed = value if place == "presence" else np.full_like(getattr(good, place), value)
        return SegmentReply(SIZE_HW, [replace(good, **{place: changed})], {})

    response = make_client(FakeBackend(answer=answer)).post("/v1/segment", **as_json())
    parsed = json.loads(response.text, parse_constant=no_constant)
    assert (response.status_code, parsed["error"]["type"]) == (500, "internal")
