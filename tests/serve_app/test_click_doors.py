"""The same clicks through Python, the command line, HTTP and the client: the same masks, or a refusal."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lora.cli import main
from sam3lora.client import Client, InvalidRequest
from sam3lora.client.segment_results import Rle
from sam3lora.errors import UserError
from sam3lora.inference.predictor import Predictor
from serve_app.http.ingress import create_api
from serve_app.replica.replica import ModelReplica
from serve_app.settings import AdapterSettings, Batching, ServeSettings

from .http_cases import picture, raw
from .local_service import LocalBackend, local_service

PNG = picture((60, 90))
PIXELS = np.asarray(Image.open(io.BytesIO(PNG)))
CLICKS = [(30, 20, 1), (70, 40, 0), (12, 50, 1)]
BOX = (10, 5, 60, 50)
POST = {"threshold": 0.0, "max_detections": 3}


@pytest.fixture(scope="module")
def service(clickable_base: Path, clickable_root: Path) -> Iterator[TestClient]:
    batching = Batching(encode_ahead=False)
    settings = ServeSettings(
        model=str(clickable_base), batching=batching, adapters=AdapterSettings(root=clickable_root)
    )
    with TestClient(local_service(settings)) as service:
        yield service


@pytest.fixture(scope="module")
def predictor(clickable_base: Path) -> Predictor:
    return Predictor(str(clickable_base), device="cpu")


@pytest.fixture
def client(service: TestClient) -> Iterator[Client]:
    with client_of(service) as client:
        yield client


def client_of(service: TestClient) -> Client:
    def handle(request: httpx.Request) -> httpx.Response:
        headers = {"content-type": request.headers.get("content-type", "")}
        answer = service.request(request.method, request.url.path, content=request.content, headers=headers)
        return httpx.Response(answer.status_code, content=answer.content, headers={"content-type": "application/json"})

    return Client("http://service.test", transport=httpx.MockTransport(handle), max_retries=0)


def ask(
    service: TestClient,
    image_id: str,
    clicks: list[tuple],
    options: Mapping[str, object] | None = None,
    **shown: object,
) -> dict:
    given = [{"x": x, "y": y, "label": label} for x, y, label in clicks]
    asked = {"image_id": image_id, "objects": [{"clicks": given, **shown}], **(options or {})}
    response = service.post("/v1/refine", json=asked)
    assert response.status_code == 200, response.text
    return response.json()["objects"][0]


@pytest.fixture
def on_command_line(clickable_base: Path, tmp_path: Path) -> Callable[..., dict]:
    """What `sam3lora infer` writes of the clicked object."""
    (tmp_path / "photo.png").write_bytes(PNG)

    def call(*words: object) -> dict:
        given = ["infer", "--model", clickable_base, "--image", tmp_path / "photo.png", "--device", "cpu", *words]
        given += ["--output", tmp_path / "output.png", "--json", tmp_path / "found.json"]
        assert main([str(word) for word in given]) == 0
        (image,) = json.loads((tmp_path / "found.json").read_text())["images"]
        return image["clicked"]

    return call


def words_of(clicks: Iterable[tuple], box: Sequence[float] | None = None) -> list[str]:
    """Options of the command line, joined by "=" because numbers may be negative."""
    given = ["--click=" + ",".join(map(str, one)) for one in clicks]
    return given if box is None else [*given, "--click-box=" + ",".join(map(str, box))]


def same(*rles: Rle) -> None:
    """But for pixels at the edge: logits that are kept are rounded."""
    first, *others = (coco_mask.decode(rle) for rle in rles)
    assert 0 < first.mean() < 1
    for other in others:
        assert (first != other).mean() < 0.002


def test_clicks_one_after_the_other(
    service: TestClient, client: Client, predictor: Predictor, on_command_line: Callable[..., dict]
):
    image_id = service.post("/v1/images", **raw("", PNG)).json()["image_id"]
    by_client = client.interact(PNG)
    in_python = predictor.interact(PIXELS).click(CLICKS[:1])
    by_http = ask(service, image_id, CLICKS[:1])
    first = by_client.click(*CLICKS[0])
    in_words = on_command_line(*words_of(CLICKS[:1]))
    same(by_http["mask"], first.rle, in_python.rle, in_words["mask"])
    assert [by_http["score"], first.score, in_words["score"]] == pytest.approx([in_python.score] * 3, abs=1e-5)
    assert len(by_http["alternatives"]) == len(first.alternatives) == 2
    for number in (1, 2):
        before = by_http["mask_id"]
        by_http = ask(service, image_id, CLICKS[: number + 1], mask={"mask_id": before})
        in_python.add(*CLICKS[number])
        same(by_http["mask"], by_client.click(*CLICKS[number]).rle, in_python.rle)
    in_python.undo()
    same(by_client.undo().rle, in_python.rle)


def test_several_clicks_at_once(
    service: TestClient, client: Client, predictor: Predictor, on_command_line: Callable[..., dict]
):
    """As one step, without a mask in between."""
    in_python = predictor.interact(PIXELS).click(CLICKS, box_xyxy=BOX)
    (by_client,) = client.refine(PNG, {"clicks": CLICKS, "box": BOX})
    image_id = service.post("/v1/images", **raw("", PNG)).json()["image_id"]
    by_http = ask(service, image_id, CLICKS, box=list(BOX))
    in_words = on_command_line(*words_of(CLICKS, BOX))
    same(in_python.rle, by_client.rle, by_http["mask"], in_words["mask"])
    scores = [by_client.score, by_http["score"], in_words["score"]]
    assert scores == pytest.approx([in_python.score] * 3, abs=1e-5)


def test_a_detection_and_a_box(
    service: TestClient, client: Client, predictor: Predictor, on_command_line: Callable[..., dict]
):
    by_client = client.interact(PNG)
    (found,) = client.segment(by_client.image, ["crack"], keep_masks=True, **POST)
    session = predictor.interact(PIXELS)
    in_python = session.detect("crack", **POST)
    assert len(in_python) == found.num_detections > 0
    by_client.start(found, 0)
    corrected = by_client.click(*CLICKS[0])
    session.refine(in_python[0], CLICKS[:1])
    by_http = ask(
        service,
        by_client.image.image_id,
        CLICKS[:1],
        box=[float(side) for side in found.boxes_xyxy[0]],
        mask={"mask_id": found.mask_ids[0]},
    )
    same(by_http["mask"], corrected.rle, in_python[0].rle)
    meant = max(session.detect("crack", **POST), key=lambda one: one.mask[20, 30])  # by the click, or the best
    in_words = on_command_line("--prompt", "crack", "--threshold", 0, "--max-detections", 3, *words_of(CLICKS[:1]))
    same(in_words["mask"], session.refine(meant, CLICKS[:1]).rle)
    by_client.start()
    by_http = ask(service, by_client.image.image_id, [], box=list(BOX))
    in_words = on_command_line(*words_of((), BOX))
    same(by_http["mask"], by_client.box(BOX).rle, session.box(BOX).rle, in_words["mask"])


PAIRS = [
    {"click_adapter": "edges"},
    {"adapter": "towers", "click_adapter": "over-towers"},
]


@pytest.mark.parametrize("named", PAIRS)
def test_a_click_adapter_alone_and_beside_an_adapter(
    named: dict[str, str],
    service: TestClient,
    client: Client,
    clickable_base: Path,
    clickable_root: Path,
    tmp_path: Path,
):
    folders = {role: clickable_root / name for role, name in named.items()}
    image_id = service.post("/v1/images", **raw("", PNG)).json()["image_id"]
    in_python = Predictor(str(clickable_base), device="cpu", **folders).interact(PIXELS).click(CLICKS[:1])
    by_http = ask(service, image_id, CLICKS[:1], named)
    results = client.refine(PNG, {"clicks": CLICKS[:1]}, **named)
    same(by_http["mask"], results[0].rle, in_python.rle)
    assert [by_http["score"], results[0].score] == pytest.approx([in_python.score] * 2, abs=1e-5)
    assert (results.adapter, results.click_adapter) == (named.get("adapter"), named["click_adapter"])
    session = client.interact(PNG, **named)
    session.click(*CLICKS[0])
    by_http = ask(service, image_id, CLICKS[:2], named, mask={"mask_id": by_http["mask_id"]})
    in_python.add(*CLICKS[1])
    same(by_http["mask"], session.click(*CLICKS[1]).rle, in_python.rle)
    (tmp_path / "photo.png").write_bytes(PNG)
    words = ["infer", "--model", clickable_base, "--image", tmp_path / "photo.png", "--weights", *folders.values()]
    words += ["--click", "30,20", "--output", tmp_path / "output.png", "--json", tmp_path / "d.json"]
    assert main([str(word) for word in words]) == 0
    (by_cli,) = json.loads((tmp_path / "d.json").read_text())["images"]
    same(by_cli["clicked"]["mask"], results[0].rle)


@pytest.mark.parametrize(("clicks", "box"), [(CLICKS[:1], None), (CLICKS, BOX)], ids=["specks", "holes"])
def test_cleaned_masks(
    service: TestClient,
    client: Client,
    predictor: Predictor,
    on_command_line: Callable[..., dict],
    clicks: list[tuple],
    box: tuple | None,
):
    cleaning = {"max_hole_area": 64, "max_sprinkle_area": 64}
    plain = predictor.interact(PIXELS).click(clicks, box_xyxy=box)
    in_python = predictor.interact(PIXELS, **cleaning).click(clicks, box_xyxy=box)
    assert (plain.mask != in_python.mask).mean() > 0.004  # more than `same` allows
    image_id = service.post("/v1/images", **raw("", PNG)).json()["image_id"]
    shown = {} if box is None else {"box": list(box)}
    by_http = ask(service, image_id, clicks, cleaning, **shown)
    (by_client,) = client.refine(PNG, {"clicks": clicks, "box": box}, **cleaning)
    in_words = on_command_line(*words_of(clicks, box), "--max-hole-area", 64, "--max-sprinkle-area=64")
    same(in_python.rle, by_http["mask"], by_client.rle, in_words["mask"])
    by_score = sorted(in_python.alternatives, key=lambda one: -one.score)
    for mine, other in zip(by_score[1:], by_http["alternatives"], strict=True):
        assert (coco_mask.decode(mine.rle) != coco_mask.decode(other["mask"])).mean() < 0.002

    # The next click starts from what the head made, whatever is shown.
    uncleaned = ask(service, image_id, clicks, **shown)
    assert by_http["mask_id"] == uncleaned["mask_id"]
    assert by_http["mask"] != uncleaned["mask"]
    off = ask(service, image_id, clicks, dict.fromkeys(cleaning, 0), **shown)
    assert off == uncleaned
    if box is None:
        session = client.interact(PNG, **cleaning)
        session.click(*CLICKS[0])
        same(in_python.add(*CLICKS[1]).rle, session.click(*CLICKS[1]).rle)
        assert in_python._state.mask_mm.equal(plain.add(*CLICKS[1])._state.mask_mm)


def test_a_mask_as_a_picture_is_the_same(client: Client):
    png = client.refine(PNG, {"box": BOX}, masks="png")[0]
    np.testing.assert_array_equal(png.mask, client.refine(PNG, {"box": BOX})[0].mask)


def test_another_replica_goes_on_from_the_outline(clickable_base: Path, predictor: Predictor):
    """As after a replica died: the other one has neither the image nor its masks."""
    settings = ServeSettings(model=str(clickable_base), batching=Batching(encode_ahead=False))
    first, other = ModelReplica(settings), ModelReplica(settings)
    backend = LocalBackend(first)
    with TestClient(create_api(settings, backend)) as service, client_of(service) as client:
        session = client.interact(PNG)
        before = session.click(*CLICKS[0])
        backend.replica = other
        found = session.click(*CLICKS[1])
        (from_outline,) = client.refine(session.image, {"clicks": CLICKS[:2], "mask": before.rle})
        same(found.rle, from_outline.rle)
        backend.replica = first
        session.undo()
        in_python = predictor.interact(PIXELS).click(CLICKS[:1])
        same(session.click(*CLICKS[1]).rle, in_python.add(*CLICKS[1]).rle)
        assert [one._engine.counters["images_encoded"] for one in (first, other)] == [1, 1]


WRONG: dict[str, tuple[list[tuple], tuple | None]] = {
    "a click that is no number": ([(30, 20, 1), (math.nan, 20, 1)], None),
    "a click without end": ([(30, math.inf, 1)], None),
    "a click far away": ([(1e300, 20, 1)], None),
    "a click on the right border": ([(90, 20, 1)], None),
    "a click below": ([(30, 60, 1)], None),
    "a click to the left": ([(-0.5, 20, 1)], None),
    "a label of 2": ([(30, 20, 2)], None),
    "a label of -1": ([(30, 20, -1)], None),
    "half a label": ([(30, 20, 0.5)], None),
    "a click in words": ([("left", 20, 1)], None),
    "half a click": ([(30,)], None),
    "a click of four numbers": ([(30, 20, 1, 1)], None),
    "only what does not belong to it": ([(30, 20, 0), (70, 40, 0)], None),
    "a box without an area": ([(30, 20, 1)], (5, 5, 5, 9)),
    "a box inside out": ([], (60, 5, 10, 50)),
    "a box beyond the image": ([], (0, 0, 90, 60.5)),
    "a box that is no number": ([], (0, 0, math.nan, 60)),
    "a box of three numbers": ([], (0, 0, 90)),
    "a box in words": ([], ("left", 0, 90, 60)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(
    service: TestClient, client: Client, predictor: Predictor, clickable_base: Path, tmp_path: Path, capsys, name: str
):
    clicks, box = WRONG[name]
    session = predictor.interact(PIXELS)
    with pytest.raises(UserError, match=r"click|box"):
        session.click(clicks, box_xyxy=box)
    assert session.objects == []

    (tmp_path / "photo.png").write_bytes(PNG)
    given = ["infer", "--model", str(clickable_base), "--image", str(tmp_path / "photo.png"), *words_of(clicks, box)]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert (said.count("error: "), "Traceback" in said) == (1, False)
    assert "click" in said or "box" in said

    # JSON has no word for NaN; Python writes one.
    given = [dict(zip(("x", "y", "label", "more"), one, strict=False)) for one in clicks]
    request = json.dumps({"objects": [{"clicks": given, "box": box}]})
    response = service.post("/v1/refine", files={"image": PNG}, data={"request": request})
    error = response.json()["error"]
    assert (response.status_code, error["type"] in ("invalid_click", "invalid_box", "invalid_request")) == (422, True)
    assert any(word in error["message"] for word in ("click", "box", "no number in JSON")), error

    for image in (PNG, client.upload(PNG)):
        with pytest.raises((ValueError, InvalidRequest), match=r"click|box"):
            client.refine(image, {"clicks": clicks, "box": box})


AREAS = {
    "negative": -1,
    "more than all": 10_001,
    "huge": 10**30,
    "half a pixel": 0.5,
    "no number": math.nan,
    "without end": math.inf,
    "in words": "four",
    "a number as text": "4",
    "yes": True,
    "nothing": None,
    "a list": [4],
}


@pytest.mark.parametrize("field", ["max_hole_area", "max_sprinkle_area"])
@pytest.mark.parametrize("name", AREAS)
def test_bad_areas_are_refused_at_every_door(
    service: TestClient,
    client: Client,
    predictor: Predictor,
    clickable_base: Path,
    tmp_path: Path,
    capsys,
    name: str,
    field: str,
):
    value = AREAS[name]
    with pytest.raises(UserError, match=f"{field} must be"):
        predictor.interact(PIXELS, **{field: value})

    option = "--" + field.replace("_", "-")
    (tmp_path / "photo.png").write_bytes(PNG)
    if value != "4":  # all words are text there
        words = ["infer", "--model", str(clickable_base), "--image", str(tmp_path / "photo.png"), "--click", "30,20"]
        assert main([*words, f"{option}={value}"]) == 2
        said = capsys.readouterr().err
        assert (said.count("error: ") + said.count("Error"), "Traceback" in said) == (1, False)
        assert option in said or field in said

    request = {"objects": [{"clicks": [{"x": 30, "y": 20}]}], field: value}
    response = service.post("/v1/refine", files={"image": PNG}, data={"request": json.dumps(request)})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (422, "invalid_request")
    assert error["field"] == field or "no number in JSON" in error["message"], error

    for image in (PNG, client.upload(PNG)):
        with pytest.raises((ValueError, InvalidRequest), match=rf"{field}|JSON"):
            client.refine(image, {"clicks": CLICKS}, **{field: value})
