"""The clients against the service's own HTTP side."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from sam3lora.client import (
    AsyncClient,
    InvalidRequest,
    NotFound,
    Overloaded,
    SegmentationError,
    Timeout,
    Unauthorized,
)
from sam3lora.client.errors import class_of_status
from serve_app.http.errors import STATUS_OF, ServeError
from serve_app.http.ingress import create_api
from serve_app.settings import ServeSettings

from ..serve_app.http_cases import SIZE_HW, FakeBackend

PIXELS_HW3 = np.zeros((*SIZE_HW, 3), np.uint8)


def ask(backend: FakeBackend, question: Callable[[AsyncClient], Awaitable[Any]], **settings: Any) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(app=create_api(ServeSettings(), backend))
        async with AsyncClient("http://service.test", transport=transport, max_retries=0, **settings) as client:
            return await question(client)

    return asyncio.run(run())


POST = {"threshold": 0.4, "nms": "box", "nms_iou": 0.6, "merge": True, "merge_iou": 0.2, "max_detections": 7}


def test_every_option_and_form_of_masks():
    backend = FakeBackend()
    results = {
        masks: ask(
            backend,
            lambda client, masks=masks: client.segment(
                PIXELS_HW3,
                ["red thing", "crack"],
                boxes=[((1, 2, 6, 7), 0), ((2, 2, 5, 5), 1)],
                adapter="cracks",
                **POST,
                masks=masks,
            ),
        )
        for masks in ("rle", "png", "polygon", "none")
    }
    for answer in results.values():
        assert (answer.size_hw, answer.adapter, len(answer)) == (SIZE_HW, "cracks", 2)
        assert answer[0].num_detections > 0
        assert answer.timing_ms["total"] > 0
    np.testing.assert_array_equal(results["rle"][0].masks, results["png"][0].masks)
    assert results["rle"][0].areas_px.tolist() == results["rle"][0].masks.sum(axis=(1, 2)).tolist()
    assert all(results["polygon"][0].polygons)

    call = backend.calls[0]
    assert call.prompts == ("red thing", "crack")
    assert [(box.xyxy, box.label) for box in call.boxes] == [((1, 2, 6, 7), 0), ((2, 2, 5, 5), 1)]
    assert call.post_processing == POST
    assert [call.masks for call in backend.calls] == [True, True, True, False]


def test_labels_in_every_form():
    backend = FakeBackend()
    outputs = ("label_png", "rle", "probability_png", "none")
    answers = {
        output: ask(
            backend,
            lambda client, output=output: client.dense(
                PIXELS_HW3, "land-cover", output=output, classes=("water", "road"), threshold=0.4
            ),
        )
        for output in outputs
    }
    assert [call.output for call in backend.labelled] == list(outputs)
    call = backend.labelled[0]
    assert (call.adapter, call.classes, call.threshold) == ("land-cover", ("water", "road"), 0.4)
    water_HW = np.zeros(SIZE_HW, bool)
    water_HW[:12] = True
    for answer in answers.values():
        assert (answer.size_hw, answer.adapter) == (SIZE_HW, "land-cover")
        assert answer.area_px == {"background": 36 * 64, "water": 12 * 64}
        assert answer.area_share == {"background": 0.75, "water": 0.25}
        assert answer.timing_ms["total"] > 0
    labelled, masks, certain, areas = answers.values()
    np.testing.assert_array_equal(labelled.label_HW, water_HW)
    assert labelled.label_HW.dtype == np.uint8
    for answer in (labelled, masks):
        np.testing.assert_array_equal(answer.mask("water"), water_HW)
        np.testing.assert_array_equal(answer.mask("background"), ~water_HW)
    np.testing.assert_array_equal(certain.probability("water"), water_HW.astype(np.float32))
    assert (masks.label_HW, areas.label_HW) == (None, None)
    with pytest.raises(ValueError, match="no masks"):
        areas.mask("water")
    with pytest.raises(ValueError, match="no probabilities"):
        masks.probability("water")
    with pytest.raises(KeyError, match="moon"):
        masks.mask("moon")


def test_one_class_and_nothing_given():
    backend = FakeBackend()
    ask(backend, lambda client: client.dense(PIXELS_HW3, "land-cover"))
    ask(backend, lambda client: client.dense(PIXELS_HW3, "land-cover", classes="water"))
    first, second = backend.labelled
    assert (first.output, first.classes, first.threshold) == (None, None, None)
    assert second.classes == ("water",)
    with pytest.raises(TypeError, match="dense\\(\\) takes no argument prompts"):
        ask(backend, lambda client: client.dense(PIXELS_HW3, "land-cover", prompts=["a"]))


def test_an_evicted_upload_is_sent_again_for_labels():
    backend = FakeBackend()

    async def question(client: AsyncClient) -> bool:
        image = await client.upload(PIXELS_HW3)
        backend.kept.clear()
        answer = await client.dense(image, "land-cover")
        return answer.label_HW is not None

    assert ask(backend, question)
    assert len(backend.kept) == 1


def test_an_evicted_upload_is_sent_again():
    backend = FakeBackend()

    async def question(client: AsyncClient) -> list[int]:
        image = await client.upload(PIXELS_HW3)
        before = await client.segment(image, ["a"])
        backend.kept.clear()
        after = await client.segment(image, ["a"])
        return [before[0].num_detections, after[0].num_detections]

    before, after = ask(backend, question)
    assert before == after > 0
    # Forgotten means that the second question was refused first, and the image came a second time.
    assert len(backend.kept) == 1
    assert [call.image.data for call in backend.calls] == [None] * 3


def test_adapters_and_readiness():
    backend = FakeBackend()
    first, second = ask(backend, lambda client: client.adapters())
    assert (first.id, first.prompts, first.rank, first.resident, first.error) == ("cracks", ("crack",), 8, True, None)
    assert (first.task, first.classes, second.task) == ("detection", (), None)
    assert first.post_processing["prompt_thresholds"] == {"crack": 0.2}
    assert (second.post_processing, second.error) == (None, "trained on another base model")
    assert ask(backend, lambda client: client.ready()) is True
    backend.is_ready = False
    assert ask(backend, lambda client: client.ready()) is False


@pytest.mark.parametrize(
    ("question", "error_class", "kind", "field"),
    [
        (lambda client: client.segment(b"no image", ["a"]), InvalidRequest, "unsupported_image", "image"),
        (lambda client: client.segment(PIXELS_HW3, ["a", " "]), InvalidRequest, "invalid_prompt", "prompts[1]"),
        (
            lambda client: client.segment(PIXELS_HW3, ["a"], boxes=[((5, 5, 1, 1), 1)]),
            InvalidRequest,
            "invalid_box",
            "boxes[0]",
        ),
        (lambda client: client.segment(PIXELS_HW3, ["a"], threshold=2), InvalidRequest, "invalid_request", "threshold"),
        (lambda client: client.segment(PIXELS_HW3, ["a"], adapter="nosuch"), NotFound, "adapter_not_found", "adapter"),
    ],
)
def test_refusals_are_typed(question, error_class, kind, field):
    with pytest.raises(error_class) as caught:
        ask(FakeBackend(), question)
    assert (caught.value.type, caught.value.field) == (kind, field)
    assert caught.value.request_id
    assert caught.value.status == STATUS_OF[kind]


def test_an_overloaded_service_sends_retry_after():
    backend = FakeBackend(answer=lambda call: ServeError("overloaded", "full", 1.2))
    with pytest.raises(Overloaded) as caught:
        ask(backend, lambda client: client.segment(PIXELS_HW3, ["a"]))
    assert caught.value.retry_after_s == 2.0  # whole seconds, rounded up


def test_keys(monkeypatch):
    monkeypatch.setenv(ServeSettings().api_keys_variable, "the-key")
    assert len(ask(FakeBackend(), lambda client: client.adapters(), api_key="the-key")) == 2
    for settings in ({}, {"api_key": "another"}):
        with pytest.raises(Unauthorized):
            ask(FakeBackend(), lambda client: client.adapters(), **settings)


@pytest.mark.parametrize("kind", STATUS_OF)
def test_every_type_of_the_service_has_a_class(kind):
    error_class = class_of_status(STATUS_OF[kind])
    assert issubclass(error_class, SegmentationError)
    assert (error_class is Timeout) == (kind in ("timeout", "slow_body"))
    assert (error_class is NotFound) == kind.endswith("not_found")
