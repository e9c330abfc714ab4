"""Clicks by the clients, against the service's own HTTP side."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2 as httpx
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3lora.client import ClickSession, Client, InvalidRequest, NotFound, RefinedObject
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.mask_cleaning import MaskCleaning
from serve_app.http.errors import ServeError
from serve_app.messages import RefineCall

from ..serve_app.http_cases import PNG, SIZE_HW, FakeBackend, make_client, rectangle
from .test_contract import ask

RLE = rectangle(1, 1, 5, 5)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def client(backend: FakeBackend) -> Iterator[Client]:
    service = make_client(backend)

    def handle(request: httpx.Request) -> httpx.Response:
        answer = service.request(
            request.method, request.url.path, content=request.content, headers=dict(request.headers)
        )
        return httpx.Response(answer.status_code, content=answer.content, headers={"content-type": "application/json"})

    with Client("http://service.test", transport=httpx.MockTransport(handle), max_retries=0) as client:
        yield client


def test_every_part_of_a_call(client: Client, backend: FakeBackend):
    objects = [
        {"clicks": [(20, 10.5), np.array([3, 4, 0])], "mask": "msk_" + 32 * "a"},
        {"box": np.array([4, 2, 12, 10]), "mask": RLE},
    ]
    results = client.refine(
        PNG,
        objects,
        adapter="cracks",
        click_adapter="edges",
        clicks_vision="base",
        multimask="always",
        max_hole_area=8,
        max_sprinkle_area=4,
    )
    (call,) = backend.refined
    first, second = call.objects
    assert first.clicks == (Click(20, 10.5, 1), Click(3, 4, 0))
    assert (first.mask, second.box_xyxy, second.mask["size"]) == ("msk_" + 32 * "a", (4, 2, 12, 10), list(SIZE_HW))
    assert (call.adapter, call.clicks_vision, call.multimask) == ("cracks", "base", True)
    assert call.click_adapter == results.click_adapter == "edges"
    assert call.cleaning == MaskCleaning(8, 4)

    assert (len(results), results.size_hw, results.adapter) == (2, SIZE_HW, "cracks")
    found = results[1]
    assert isinstance(found, RefinedObject)
    assert (found.score, found.object_score, found.box_xyxy, found.area_px) == (0.9, 0.75, (4, 2, 12, 10), 64)
    assert (found.mask.sum(), found.mask[2:10, 4:12].all(), found.rle["size"]) == (64, True, list(SIZE_HW))
    assert [one.score for one in found.alternatives] == [0.8, 0.7]
    assert found.alternatives[0].mask.sum() == 49


def test_forms_of_masks_and_one_object_alone(client: Client):
    png = client.refine(PNG, {"box": (4, 2, 12, 10)}, masks="png")[0]
    assert png.mask.sum() == 64
    assert client.refine(PNG, {"box": (4, 2, 12, 10)}, masks="polygon")[0].polygons == [[4, 2, 4, 10, 12, 10, 12, 2]]
    with pytest.raises(ValueError, match="masks='rle'"):
        _ = client.refine(PNG, {"box": (4, 2, 12, 10)}, masks="none")[0].mask


def test_masks_of_pycocotools(client: Client, backend: FakeBackend):
    code = coco_mask.encode(np.asfortranarray(np.eye(*SIZE_HW, dtype=np.uint8)))
    assert isinstance(code["counts"], bytes)
    client.refine(PNG, {"clicks": [(1, 1)], "mask": code})
    assert backend.refined[0].objects[0].mask == code


def test_in_an_event_loop():
    async def refine(client):
        return await client.refine(PNG, {"clicks": [(20, 10)]})

    assert ask(FakeBackend(), refine)[0].area_px == 144


def test_mistakes(client: Client):
    with pytest.raises(ValueError, match="clicks as"):
        client.refine(PNG, {"clicks": [(1,)]})
    for mask in ({"size": [2, 2]}, 5, np.ones((2, 2), bool)):
        with pytest.raises(ValueError, match="mask_id or a COCO RLE"):
            client.refine(PNG, {"clicks": [(1, 2)], "mask": mask})
    with pytest.raises(TypeError, match="points"):
        client.refine(PNG, {"points": [(1, 2)]})
    with pytest.raises(TypeError, match="multi_mask"):
        client.refine(PNG, {"clicks": [(1, 2)]}, multi_mask="always")
    with pytest.raises(InvalidRequest) as refused:
        client.refine(PNG, {"clicks": [(64, 2)]})
    assert (refused.value.type, refused.value.field) == ("invalid_click", "objects[0].clicks[0]")
    with pytest.raises(InvalidRequest) as refused:
        client.refine(PNG, {"clicks": [(1, 2)]}, max_hole_area=-1)
    assert (refused.value.type, refused.value.field) == ("invalid_request", "max_hole_area")


def asked(backend: FakeBackend) -> tuple[int, object]:
    """Number of clicks of the last call, and what it started from."""
    shown = backend.refined[-1].objects[0]
    return len(shown.clicks), shown.mask


def test_a_session_sends_all_clicks_and_the_mask_before(client: Client, backend: FakeBackend):
    session = client.interact(PNG)
    assert isinstance(session, ClickSession)
    first = session.click(20, 10)
    assert asked(backend) == (1, None)
    second = session.click(30, 10, 0)
    assert asked(backend) == (2, first.mask_id)
    assert session.undo() is first
    chosen = session.choose(1)
    assert (session.answer, chosen.score) == (chosen, 0.7)
    session.box((4, 2, 12, 10))
    assert asked(backend) == (1, chosen.mask_id)
    assert backend.refined[-1].objects[0].box_xyxy == (4, 2, 12, 10)
    assert [session.undo(), session.undo(), session.undo()] == [chosen, first, None]
    assert second is not first
    with pytest.raises(ValueError, match="nothing to undo"):
        session.undo()
    with pytest.raises(IndexError, match="0 alternatives"):
        session.choose(0)
    assert len(backend.kept) == 1  # the image went up once


def test_a_session_corrects_a_detection(client: Client, backend: FakeBackend):
    session = client.interact(PNG)
    (found,) = client.segment(session.image, ["crack"], keep_masks=True)
    session.start(found, 1)
    session.click(20, 10)
    shown = backend.refined[-1].objects[0]
    assert (shown.mask, shown.box_xyxy) == (found.mask_ids[1], tuple(found.boxes_xyxy[1]))
    session.click(21, 10)
    assert asked(backend) == (2, session.undo() and session.answer.mask_id)
    session.undo()
    session.start()
    session.click(20, 10)
    assert asked(backend) == (1, None)
    with pytest.raises(IndexError):
        session.start(found, 2)
    with pytest.raises(ValueError, match="keep_masks"):
        session.start(client.segment(session.image, ["crack"], masks="none")[0])


def test_a_mask_that_is_no_longer_kept_is_sent(client: Client, backend: FakeBackend):
    session = client.interact(PNG)
    first = session.click(20, 10)

    def forgotten(call: RefineCall):
        if isinstance(call.objects[0].mask, str):
            return ServeError("mask_not_found", "no such mask")
        backend.refine_answer = None
        return ServeError("internal", "seen")

    backend.refine_answer = forgotten
    with pytest.raises(Exception, match="seen"):
        session.click(30, 10)
    assert asked(backend)[0] == 2
    assert asked(backend)[1]["counts"].decode() == first.rle["counts"]
    assert session.answer is first  # a call that fails leaves the session as it was
    # Without a code there is nothing to send in its place.
    other = client.interact(PNG, masks="none")
    other.click(20, 10)
    backend.refine_answer = forgotten
    with pytest.raises(NotFound, match="no such mask"):
        other.click(30, 10)


def test_an_image_that_is_no_longer_kept_goes_up_again(client: Client, backend: FakeBackend):
    session = client.interact(PNG)
    session.click(20, 10)
    backend.kept.clear()
    session.click(30, 10)
    assert len(backend.kept) == 1
    with pytest.raises(NotFound):
        client.refine(type(session.image)("img_" + 64 * "0"), {"clicks": [(1, 2)]})
