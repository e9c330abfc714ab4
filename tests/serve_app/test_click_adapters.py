"""Click adapters in a replica with a real small model, without Ray: mixed batches, new versions, refusals."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sam3lora.engine.clicks.decoder import ClickedObject
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.engine.engine import Engine
from sam3lora.errors import UserError
from sam3lora.model.clicks import loading
from serve_app.http.errors import ServeError
from serve_app.http.schemas import AdapterResponse
from serve_app.messages import AdapterQuery, RefineCall, RefinedObject, RefineReply
from serve_app.replica.adapter_folders import Described
from serve_app.replica.replica import ModelReplica
from serve_app.replica.vision_trunks import VisionTrunks

from ..model.clicks.click_adapters import write_click_adapter
from .replica_cases import LONG_S, Gate, call, image, metric, until_queued
from .test_dense_replica import dense_call
from .test_refine_replica import ONE, TWO, refine_call, refined, refused, same

pytestmark = pytest.mark.anyio
SLOTS = ("towers", "heads", "edges", "holes", "over-towers")


@pytest.fixture(scope="module")
def root(clickable_tasks: Path) -> Path:
    return clickable_tasks


@pytest.fixture(scope="module")
def alone(clickable_base: Path, root: Path) -> Engine:
    """What one object alone is answered; adapters in the order of `SLOTS`."""
    engine = Engine.load(str(clickable_base), device="cpu", num_slots=len(SLOTS))
    for slot, name in enumerate(SLOTS):
        engine.place_adapter(slot, engine.read_any_adapter(root / name))
    return engine


@pytest.fixture
def serve(play: Callable, clickable_base: Path, root: Path) -> Callable:
    return lambda **options: play(**({"model": str(clickable_base), "adapters": {"root": root}} | options))


def expected(alone: Engine, asked: RefinedObject, one: RefineCall, start: Any = None) -> ClickAnswer:
    prepared = alone.prepare_image(one.image.data or b"", one.image.key)
    prompt = ClickPrompt.of(asked.clicks, asked.box_xyxy, start, size_hw=prepared.size_hw, side=alone.resolution)
    slot, click_slot = (None if name is None else SLOTS.index(name) for name in (one.adapter, one.click_adapter))
    (answer,) = alone.click([ClickedObject(prepared, prompt, slot, one.clicks_vision, click_slot)])
    assert isinstance(answer, ClickAnswer), answer
    return answer


CALLS = [
    refine_call(ONE),
    refine_call(ONE, TWO, click_adapter="edges"),
    refine_call(ONE, click_adapter="holes"),
    refine_call(ONE, adapter="heads", click_adapter="edges"),
    refine_call(ONE, adapter="towers", click_adapter="over-towers"),
    refine_call(ONE, adapter="towers", click_adapter="edges", clicks_vision="base"),
    refine_call(ONE, click_adapter="edges", seed=1),
]


async def test_one_batch_of_many_click_adapters(serve: Callable, clickable_base: Path, alone: Engine):
    """Each is answered as if it were alone; the base and all click adapters share a vision pass and a decode."""
    gate = Gate.load(str(clickable_base), device="cpu", num_slots=5)
    async with serve(engine=gate, max_resident_adapters=5, batching={"encode_ahead": False}) as service:
        for name in SLOTS:  # loaded
            async with service._store.hold(name):
                pass
        first = await gate.occupy(service, seed=7)
        waiting = [asyncio.create_task(service.refine(one)) for one in CALLS]
        await until_queued(service, len(CALLS))
        gate.open.set()
        found = await asyncio.gather(*waiting)
        await first
        # The occupying image, image 0 for the base and for towers, image 1; single clicks together, and a pair.
        assert await metric(service, "images_encoded_total") == 1 + 2 + 1
        assert await metric(service, "click_decodes_total") == 2
    for one, reply in zip(CALLS, found, strict=True):
        assert isinstance(reply, RefineReply), reply
        for number, asked in enumerate(one.objects):
            same(reply, number, expected(alone, asked, one))
    assert len({round(reply.objects[0].masks[0].score, 5) for reply in found[:3]}) == 3


async def test_a_mask_of_one_adapter_is_refined_under_another(serve: Callable, alone: Engine):
    async with serve() as service:
        first = refine_call(ONE, click_adapter="edges")
        mask = (await refined(service, first)).objects[0].masks[0]
        before = expected(alone, ONE, first).mask_mm.clamp(-32, 32).half().float()
        asked = RefinedObject(TWO.clicks, None, mask.mask_id)
        for name in ("holes", None, "edges"):
            one = refine_call(asked, click_adapter=name)
            same(await refined(service, one), 0, expected(alone, TWO, one, before), 1e-4)


async def test_a_new_version_under_load_is_never_mixed_with_the_old_one(
    play: Callable, clickable_base: Path, root: Path, tmp_path: Path
):
    versions = [root / name for name in ("edges", "holes")]
    engine = Engine.load(str(clickable_base), device="cpu", num_slots=2)
    scores = []
    for slot, folder in enumerate(versions):
        engine.place_adapter(slot, engine.read_any_adapter(folder))
        prepared = engine.prepare_image(image(0).data or b"", image(0).key)
        prompts = [ClickPrompt.of(one.clicks, size_hw=prepared.size_hw, side=engine.resolution) for one in (ONE, TWO)]
        answers = engine.click([ClickedObject(prepared, prompt, click_slot=slot) for prompt in prompts])
        scores.append([max(answer.scores) for answer in answers])
    served = tmp_path / "adapters"
    shutil.copytree(versions[0], served / "edges")
    settings = {"model": str(clickable_base), "adapters": {"root": served}, "max_resident_adapters": 3}
    seen = []

    async with play(**settings) as service:

        async def ask_on(stop: asyncio.Event) -> None:
            while not stop.is_set():
                reply = await refined(service, refine_call(ONE, TWO, click_adapter="edges"))
                found = [one.masks[0].score for one in reply.objects]
                (version,) = [number for number, of in enumerate(scores) if found == pytest.approx(of, abs=1e-5)]
                seen.append(version)

        await refined(service, refine_call(ONE, click_adapter="edges"))
        stop = asyncio.Event()
        asking = [asyncio.create_task(ask_on(stop)) for _ in range(3)]
        for version in (1, 0, 1):
            shutil.copytree(versions[version], served / ".next")
            (served / "edges").rename(served / ".old")
            (served / ".next").rename(served / "edges")
            shutil.rmtree(served / ".old")
            later = len(seen) + 1
            while version not in seen[later:]:
                await asyncio.sleep(0.001)
        stop.set()
        await asyncio.gather(*asking)
        assert await metric(service, "images_encoded_total") == 1
        # Unloaded, it is gone for everyone.
        shutil.rmtree(served / "edges")
        gone = await refused(service, refine_call(ONE, click_adapter="edges"))
        assert (gone.type, gone.field) == ("adapter_not_found", "click_adapter")


async def test_pairs_of_adapters_do_not_wait_for_each_other_for_ever(serve: Callable):
    """With as many slots as one request needs."""
    async with serve(max_resident_adapters=2) as service:
        calls = [
            refine_call(ONE, adapter="heads", click_adapter="edges"),
            refine_call(ONE, adapter="towers", click_adapter="over-towers"),
            refine_call(ONE, adapter="heads", click_adapter="holes"),
        ]
        async with asyncio.timeout(LONG_S / 2):
            replies = await asyncio.gather(*(service.refine(one) for one in 2 * calls))
        assert all(isinstance(reply, RefineReply) for reply in replies)
    async with serve(max_resident_adapters=1) as service:
        await refined(service, refine_call(ONE, click_adapter="edges"))
        error = await refused(service, calls[0])
        assert (error.type, error.field, "one adapter at a time" in error.message) == (
            "invalid_request",
            "click_adapter",
            True,
        )


WRONG: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "a prompted adapter": ({"click_adapter": "heads"}, "wrong_task", "click_adapter", "finds objects"),
    "a dense adapter": ({"click_adapter": "gears"}, "wrong_task", "click_adapter", "labels each pixel"),
    "a click adapter for the trunk": ({"adapter": "edges"}, "wrong_task", "adapter", "as click_adapter"),
    "both the wrong way round": (
        {"adapter": "edges", "click_adapter": "towers"},
        "wrong_task",
        "adapter",
        "answers clicks",
    ),
    "an unknown one": ({"click_adapter": "unknown"}, "adapter_not_found", "click_adapter", "no adapter 'unknown'"),
    "another trunk": (
        {"adapter": "towers", "click_adapter": "edges"},
        "invalid_adapter",
        "click_adapter",
        "trained on the vision trunk of the base",
    ),
    "no adapter of its trunk": (
        {"click_adapter": "over-towers"},
        "invalid_adapter",
        "click_adapter",
        "trained on the vision trunk of an adapter",
    ),
    "another base": ({"click_adapter": "foreign"}, "invalid_adapter", "click_adapter", "trained on the base"),
    "another click head": ({"click_adapter": "stranger"}, "invalid_adapter", "click_adapter", "another click head"),
    "a broken one": ({"click_adapter": "torn"}, "invalid_adapter", "click_adapter", "adapter_model.safetensors"),
    "one that diverged": ({"click_adapter": "diverged"}, "invalid_adapter", "click_adapter", "NaN or infinite"),
}


async def test_what_is_refused_and_listed(serve: Callable, clickable_base: Path, root: Path, tmp_path: Path):
    shutil.copytree(root, tmp_path / "root")
    for name, changes in (
        ("foreign", {"base_fingerprint": "0" * 64}),
        ("stranger", {"clicks": {"tracker_fingerprint": "0" * 64}}),
        ("torn", {}),
    ):
        folder = shutil.copytree(root / "edges", tmp_path / "root" / name)
        values = json.loads((folder / "sam3lora.json").read_text())
        (folder / "sam3lora.json").write_text(json.dumps(values | changes))
    (tmp_path / "root" / "torn" / "adapter_model.safetensors").write_bytes(b"junk")
    large = {"std": 1e37, "targets": ("output_hypernetworks_mlps",)}
    write_click_adapter(tmp_path / "root" / "diverged", clickable_base, **large)
    async with serve(adapters={"root": tmp_path / "root"}) as service:
        for options, type, field, words in WRONG.values():
            error = await refused(service, refine_call(**options))
            assert (error.type, error.field) == (type, field), error
            assert words in error.message
            assert str(tmp_path) not in error.message
        for asked in (service.segment(call(0, adapter="edges")), service.label(dense_call("edges"))):
            reply = await asked
            assert isinstance(reply, ServeError)
            assert (reply.type, reply.field) == ("wrong_task", "adapter")
            assert "click_adapter" in reply.message
        await refined(service, refine_call(click_adapter="edges"))
        page = await service.list_adapters(AdapterQuery(task="clicks"))
        rows = {row.id: AdapterResponse.model_validate_json(row.json) for row in page.rows}
        assert not any(rows[name].error for name in ("edges", "holes", "over-towers"))
        assert all(rows[name].error for name in ("foreign", "stranger", "torn"))
        edges = rows["edges"]
        assert (edges.task, edges.rank, edges.adapts, edges.resident) == ("clicks", 2, ["click_head"], True)
        assert edges.post_processing is None
        assert "gears" not in rows
        assert "towers" not in rows


async def test_the_listing_says_which_adapter_a_click_adapter_goes_with(serve: Callable, root: Path, tmp_path: Path):
    async def pairs(service: ModelReplica) -> dict[str, tuple[str | None, list[str]]]:
        page = await service.list_adapters(AdapterQuery(task="clicks"))
        rows = [AdapterResponse.model_validate_json(row.json) for row in page.rows]
        return {row.id: (row.clicks_vision, row.vision_adapters) for row in rows}

    served = shutil.copytree(root, tmp_path / "root")
    of_the_base = {"edges": ("base", []), "holes": ("base", [])}
    async with serve(adapters={"root": served}) as service:
        assert await pairs(service) == of_the_base | {"over-towers": ("adapter", ["towers"])}
        # What is named is answered, and what is not is refused.
        await refined(service, refine_call(ONE, adapter="towers", click_adapter="over-towers"))
        await refined(service, refine_call(ONE, adapter="towers", click_adapter="edges", clicks_vision="base"))
        assert (await refused(service, refine_call(ONE, click_adapter="over-towers"))).type == "invalid_adapter"
        # The same trunk under another name, and in the place of another adapter; then under none.
        shutil.copytree(served / "towers", served / "again")
        shutil.rmtree(served / "heads")
        shutil.copytree(served / "towers", served / "heads")
        assert (await pairs(service))["over-towers"] == ("adapter", ["again", "heads", "towers"])
        for name in ("again", "heads", "towers"):
            shutil.rmtree(served / name)
        assert await pairs(service) == of_the_base | {"over-towers": ("adapter", [])}


async def test_a_service_without_clicks_refuses_click_adapters_and_loads_no_click_head(
    serve: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loading, "load_click_head", lambda base: pytest.fail("the click head was loaded"))
    async with serve(clicks=False) as service:
        page = await service.list_adapters()
        rows = {row.id: AdapterResponse.model_validate_json(row.json) for row in page.rows}
        assert {name: rows[name].task for name in SLOTS} == {
            "towers": "detection",
            "heads": "detection",
            "edges": "clicks",
            "holes": "clicks",
            "over-towers": "clicks",
        }
        assert [name for name in SLOTS if rows[name].error] == ["edges", "holes", "over-towers"]
        assert "the setting `clicks` not false" in (rows["edges"].error or "")
        assert (await service.segment(call(0, adapter="towers"))).size_hw
        for asked in (service.segment(call(0, adapter="edges")), service.refine(refine_call(click_adapter="edges"))):
            reply = await asked
            assert isinstance(reply, ServeError)
            assert (reply.type, reply.message) == ("no_click_head", rows["edges"].error)
        for asked in (service.segment(call(0, adapter="edges")), service.label(dense_call("edges"))):
            reply = await asked
            assert isinstance(reply, ServeError)
            assert (reply.type, reply.field) == ("no_click_head", "adapter")


def test_weights_are_read_once_and_only_where_a_click_adapter_asks_for_a_trunk():
    def row(name: str, vision_adapter: str | None = None, *, version: int = 1, **fields: Any) -> Described:
        info = AdapterResponse(id=name, **({"task": "detection", "adapts": ["vision_encoder"]} | fields))
        return Described(((version, 0, 0, 0),), info, info.model_dump_json(), (), vision_adapter)

    def read(name: str) -> str | None:
        reads.append(name)
        if name == "torn":
            raise UserError("damaged")
        return {"a": "aa", "b": "bb", "neck": None}[name]

    reads: list[str] = []
    trunks = VisionTrunks(read)
    served = [
        row("a"),
        row("b"),
        row("neck"),
        row("torn"),
        row("words", adapts=["text_encoder"]),
        row("gears", task="dense"),
    ]
    assert trunks.named(served) == served
    assert reads == []
    asking = [*served, row("over-b", "bb", task="clicks"), row("over-c", "cc", task="clicks")]
    for _ in range(2):
        *_, over_b, over_c = trunks.named(asking)
        assert (over_b.info.vision_adapters, over_c.info.vision_adapters) == (["b"], [])
        assert json.loads(over_b.json)["vision_adapters"] == ["b"]
    assert reads == ["a", "b", "neck", "torn"]
    trunks.named([row("b", version=2), *asking[2:]])
    assert reads[4:] == ["b"]


def test_weights_that_could_not_be_read_for_the_moment_are_read_at_the_next_listing():
    def row(name: str, vision_adapter: str | None = None, **fields: Any) -> Described:
        info = AdapterResponse(id=name, **fields)
        return Described(((1, 0, 0, 0),), info, info.model_dump_json(), (), vision_adapter)

    def read(name: str) -> str | None:
        raise failures.pop() if failures else pytest.fail("read again")

    listed = [row("a", task="detection", adapts=["vision_encoder"]), row("over-a", "aa", task="clicks")]
    failures = [ServeError("invalid_adapter", "damaged"), ServeError("invalid_adapter", "written", 1.0), MemoryError()]
    trunks = VisionTrunks(read)
    for num_left in (2, 1, 0, 0):
        assert trunks.named(listed)[1].info.vision_adapters == []
        assert len(failures) == num_left
