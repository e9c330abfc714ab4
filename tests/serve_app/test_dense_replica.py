"""Dense adapters in a replica with a real small model, without Ray: answers, mixed batches, the listing and errors."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file

from sam3lora.engine.engine import Engine
from sam3lora.inference.dense.predictor import DensePredictor
from sam3lora.inference.dense.result import DenseResult
from serve_app.http.errors import ServeError
from serve_app.http.schemas import AdapterResponse
from serve_app.messages import AdapterQuery, DenseCall, DenseReply, SegmentReply
from serve_app.metrics import STAGES
from serve_app.replica import labels
from serve_app.replica.replica import ModelReplica
from serve_app.settings import AdapterSettings, Batching, Limits

from ..engine.engine_cases import write_adapter
from ..model.dense.dense_cases import write_dense
from .test_replica import LONG_S, Gate, assert_same, call, image, metric, until_queued

pytestmark = pytest.mark.anyio
CLASSES = {"gears": ("background", "gear", "red bolt"), "dirt": ("gear", "dirt"), "crack": ("crack",)}
MODES = {"gears": "multiclass", "dirt": "multilabel", "crack": "binary"}


@pytest.fixture(scope="module")
def root(spread_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dense adapters, of which one is a head alone and one has bottlenecks, and two prompted ones."""
    root = tmp_path_factory.mktemp("adapters")
    for name, mode in MODES.items():
        bottlenecks = {"bottleneck_width": 8} if name == "crack" else {}
        write_dense(spread_base, root / name, mode, lora=name == "gears", **bottlenecks)
    write_adapter(root / "towers", spread_base, "vision", 1)
    write_adapter(root / "heads", spread_base, "no cls", 2)
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> Callable[[str, int], DenseResult]:
    """What a `DensePredictor` of the folder says of an image."""
    predictors = {name: DensePredictor(root / name, device="cpu") for name in MODES}

    def result(name: str, seed: int = 0) -> DenseResult:
        pixels = np.asarray(Image.open(io.BytesIO(image(seed).data or b"")).convert("RGB"))
        return predictors[name].predict([pixels])[0]

    return result


def dense_call(adapter: str = "gears", seed: int = 0, **options: Any) -> DenseCall:
    return DenseCall(image(seed), adapter, **({"timeout_s": LONG_S} | options))


async def labelled(service: ModelReplica, one: DenseCall) -> DenseReply:
    reply = await service.label(one)
    assert isinstance(reply, DenseReply), reply
    return reply


def pixels_of(content: bytes | None) -> np.ndarray:
    assert content is not None
    return np.asarray(Image.open(io.BytesIO(content)))


async def test_label_maps_masks_and_probabilities(play: Callable, expected: Callable):
    async with play() as service:
        reply = await labelled(service, dense_call())
        result = expected("gears")
        assert (reply.size_hw, set(reply.timing_ms)) == ((60, 90), set(STAGES))
        labels_HW = pixels_of(reply.label_png)
        assert (labels_HW != result.label_HW).mean() < 0.001
        assert len(np.unique(labels_HW)) == 3
        for value, (found, name) in enumerate(zip(reply.classes, CLASSES["gears"], strict=True)):
            assert (found.name, found.value, found.mask) == (name, value, None)
            assert found.area_px == (labels_HW == value).sum() > 0
            assert found.share == round(found.area_px / 5400, 6)
        masks = await labelled(service, dense_call(output="rle"))
        assert masks.label_png is None
        for value, found in enumerate(masks.classes):
            assert np.array_equal(coco_mask.decode(found.mask), labels_HW == value)
        certain = await labelled(service, dense_call(output="probability_png", classes=("gear",)))
        (gear,) = certain.classes
        np.testing.assert_allclose(pixels_of(gear.mask), result.probability("gear") * 255, atol=1.01)
        areas = await labelled(service, dense_call(output="none"))
        assert [(one.area_px, one.mask) for one in areas.classes] == [(one.area_px, None) for one in reply.classes]


async def test_chosen_classes_keep_their_values(play: Callable):
    async with play() as service:
        whole = pixels_of((await labelled(service, dense_call())).label_png)
        reply = await labelled(service, dense_call(classes=("red bolt",)))
        assert [(one.name, one.value) for one in reply.classes] == [("red bolt", 2)]
        assert np.array_equal(pixels_of(reply.label_png), np.where(whole == 2, 2, 0))


async def test_thresholds_count_where_classes_are_found_by_themselves(
    play: Callable,
    expected: Callable,
):
    async with play(max_resident_adapters=3) as service:
        for name in ("crack", "dirt"):
            (own, low, high) = [
                await labelled(service, dense_call(name, output="rle", threshold=threshold))
                for threshold in (None, 0.1, 0.9)
            ]
            result = expected(name)
            for number, of_class in enumerate(CLASSES[name]):
                probability = result.probability(of_class)
                for reply, threshold in ((own, 0.5), (low, 0.1), (high, 0.9)):
                    assert abs(reply.classes[number].area_px - (probability >= threshold).sum()) <= 5
                assert low.classes[number].area_px > high.classes[number].area_px
        # where classes may overlap there is no label map, and masks are the default
        default = await labelled(service, dense_call("dirt"))
        assert (default.label_png, default.classes[0].mask) == (None, own.classes[0].mask)
        assert set(np.unique(pixels_of((await labelled(service, dense_call("crack"))).label_png))) <= {0, 1}


async def test_one_image_asked_of_dense_and_prompted_adapters_at_once(
    play: Callable,
    spread_base: Path,
    root: Path,
):
    """Each is answered as if it were alone, after one pass of the image under each of the trunk's adapters."""
    engine = Gate.load(str(spread_base), device="cpu", num_slots=5)
    prompted = [call(0, ("crack", "hole"), adapter=name) for name in (None, "towers", "heads")]
    dense = [dense_call(name, output="rle") for name in ("gears", "dirt", "crack")]
    async with play(max_resident_adapters=5) as service:
        alone = [await service.segment(one) for one in prompted]
        alone_dense = [await labelled(service, one) for one in dense]
    async with play(engine=engine, max_resident_adapters=5) as service:
        await service.reconfigure({"root": str(root), "preload": ["towers", "heads", *MODES]})
        first = await engine.occupy(service, seed=7)
        waiting = [asyncio.create_task(service.segment(one)) for one in prompted]
        waiting += [asyncio.create_task(service.label(one)) for one in dense]
        await until_queued(service, 6)
        encoded = engine.counters["images_encoded"]
        engine.open.set()
        found = await asyncio.gather(*waiting)
        await first
        # the occupying image; then one row for the base, the heads and the head alone, and one for each of the others
        assert engine.counters["images_encoded"] == encoded + 1 + 4
        assert await metric(service, "images_labelled_total") == 3
    for reply, before in zip(found[:3], alone, strict=True):
        assert isinstance(reply, SegmentReply)
        assert isinstance(before, SegmentReply)
        assert_same(reply.results, list(before.results))
    for reply, before in zip(found[3:], alone_dense, strict=True):
        assert isinstance(reply, DenseReply)
        for ours, theirs in zip(reply.classes, before.classes, strict=True):
            assert (ours.name, abs(ours.area_px - theirs.area_px) <= 2) == (theirs.name, True)


WRONG = {
    "a prompted adapter": (lambda: dense_call("towers"), "wrong_task", "adapter", "/v1/segment"),
    "an unknown adapter": (lambda: dense_call("unknown"), "adapter_not_found", "adapter", "GET /v1/adapters"),
    "an unknown class": (lambda: dense_call(classes=("gear", "moon")), "invalid_request", "classes[1]", "no class"),
    "a threshold without effect": (lambda: dense_call(threshold=0.4), "invalid_request", "threshold", "no effect"),
    "labels that overlap": (lambda: dense_call("dirt", output="label_png"), "invalid_request", "output", "overlap"),
    "no time left": (lambda: dense_call(timeout_s=-1), "timeout", None, "time"),
}


async def test_errors_are_typed_values_and_others_are_answered(play: Callable):
    async with play(max_resident_adapters=4) as service:
        replies = await asyncio.gather(
            service.label(dense_call()), *(service.label(make()) for make, *_ in WRONG.values())
        )
        assert isinstance(replies[0], DenseReply)
        for error, (name, (_, type, field, words)) in zip(replies[1:], WRONG.items(), strict=True):
            assert isinstance(error, ServeError), name
            assert (error.type, error.field) == (type, field), name
            assert words in error.message, error.message
            assert "moon" not in error.message
        wrong = await service.segment(call(adapter="gears"))
        assert isinstance(wrong, ServeError)
        assert (wrong.type, "/v1/dense" in wrong.message) == ("wrong_task", True)


@pytest.fixture
def broken(root: Path, tmp_path: Path) -> Path:
    """One good adapter, and one of each fault."""

    def dense(name: str, original: str = "gears") -> Path:
        return shutil.copytree(root / original, tmp_path / name)

    def edit(folder: Path, **values: Any) -> None:
        file = folder / "sam3lora.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    dense("good")
    edit(dense("resolution"), resolution=336)
    edit(dense("base"), base_fingerprint="0" * 64)
    (dense("headless") / "dense_head.safetensors").unlink()
    (dense("bare", "dirt") / "dense_head.safetensors").unlink()
    file = dense("diverged") / "dense_head.safetensors"
    weight = "head.outputs.0.weight"
    head = load_file(file)
    save_file(head | {weight: head[weight].sign() * 3e38}, file)
    return tmp_path


FAULTS = {
    "resolution": "trained at 336 pixels",
    "base": "was trained on the base",
    "headless": "lacks dense_head.safetensors",
    "bare": "lacks dense_head.safetensors",
}


async def test_the_listing_and_use_say_what_is_wrong_with_a_folder(play: Callable, broken: Path):
    async with play(adapters=AdapterSettings(root=broken)) as service:
        rows = [AdapterResponse.model_validate_json(row.json) for row in (await service.list_adapters()).rows]
        listed = {row.id: row for row in rows}
        assert set(listed) == {"good", "diverged", *FAULTS}
        for name, words in FAULTS.items():
            error = await service.label(dense_call(name))
            assert isinstance(error, ServeError)
            assert error.type == "invalid_adapter"
            for message in (error.message, str(listed[name].error)):
                assert words in message
                assert str(broken) not in message
        diverged = await service.label(dense_call("diverged"))
        assert isinstance(diverged, ServeError)
        assert (diverged.type, "NaN" in diverged.message) == ("invalid_adapter", True)
        assert isinstance(await service.label(dense_call("good")), DenseReply)


async def test_the_listing_has_task_and_classes(play: Callable, root: Path):
    async with play() as service:
        await labelled(service, dense_call())
        page = await service.list_adapters()
        rows = {row.id: AdapterResponse.model_validate_json(row.json) for row in page.rows}
        assert {name: row.task for name, row in rows.items()} == dict.fromkeys(MODES, "dense") | dict.fromkeys(
            ("heads", "towers"), "detection"
        )
        gears, dirt = rows["gears"], rows["dirt"]
        assert (gears.classes, gears.rank, gears.adapts) == (list(CLASSES["gears"]), 2, ["vision_encoder"])
        assert (gears.resident, gears.post_processing, gears.error) == (True, None, None)
        assert (rows["crack"].rank, rows["crack"].adapts) == (None, ["vision_encoder"])
        assert (dirt.classes, dirt.rank, dirt.adapts) == (list(CLASSES["dirt"]), None, [])
        assert dirt.size_bytes == (root / "dirt" / "dense_head.safetensors").stat().st_size
        dense = await service.list_adapters(AdapterQuery(task="dense"))
        assert ([row.id for row in dense.rows], dense.total) == (["crack", "dirt", "gears"], 3)
        bolts = await service.list_adapters(AdapterQuery(search="BOLT"))
        assert [row.id for row in bolts.rows] == ["gears"]


async def test_a_new_version_of_a_folder_is_served(play: Callable, spread_base: Path, tmp_path: Path):
    write_dense(spread_base, tmp_path / "gears")
    async with play(adapters=AdapterSettings(root=tmp_path)) as service:
        before = await labelled(service, dense_call(output="rle"))
        write_dense(spread_base, tmp_path / "gears", "binary")
        after = await labelled(service, dense_call(output="rle"))
        assert [one.name for one in before.classes] == list(CLASSES["gears"])
        assert [one.name for one in after.classes] == ["crack"]
        write_adapter(tmp_path / "gears", spread_base, "vision", 1)
        wrong = await service.label(dense_call())
        assert isinstance(wrong, ServeError)
        assert wrong.type == "wrong_task"
        assert isinstance(await service.segment(call(adapter="gears")), SegmentReply)


async def test_limits_of_the_answer_and_of_memory(
    play: Callable,
    monkeypatch: pytest.MonkeyPatch,
):
    async with play(limits=Limits(max_answer_bytes=60)) as service:
        error = await service.label(dense_call(output="rle"))
        assert isinstance(error, ServeError)
        assert error.type == "answer_too_large"
    monkeypatch.setattr(Engine, "label_small", _no_memory)
    async with play() as service:
        error = await service.label(dense_call())
        assert isinstance(error, ServeError)
        assert error.type == "out_of_memory"


def _no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


async def test_labels_of_large_images_are_made_one_at_a_time(
    play: Callable,
    monkeypatch: pytest.MonkeyPatch,
):
    running, most = 0, 0
    make = labels.DenseResult.mask

    def counted(self: DenseResult, name: str) -> np.ndarray:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return make(self, name)
        finally:
            running -= 1

    monkeypatch.setattr(DenseResult, "mask", counted)
    monkeypatch.setattr("serve_app.replica.replica.LARGE_PIXELS", 1)
    async with play() as service:
        replies = await asyncio.gather(*(service.label(dense_call(seed=seed)) for seed in range(4)))
    assert all(isinstance(reply, DenseReply) for reply in replies)
    assert most == 1


@pytest.mark.parametrize("encode_ahead", [False, True])
async def test_images_encoded_ahead_leave_dense_requests_to_their_batch(
    play: Callable,
    encode_ahead: bool,
):
    async with play(batching=Batching(encode_ahead=encode_ahead), max_resident_adapters=3) as service:
        asked = [dense_call(seed=seed) for seed in (0, 1)]
        replies = await asyncio.gather(
            *(service.label(one) for one in asked), *(service.segment(call(seed)) for seed in (0, 1))
        )
        assert [type(reply) for reply in replies] == [DenseReply, DenseReply, SegmentReply, SegmentReply]
