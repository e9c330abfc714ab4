"""Clicks on the engine: one by one or together, of several images and adapters, from the vision pass of the prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.bench.pretend_gpu import pretend_gpu
from jobs.bench.recorded_graphs import RecordingCapturer
from sam3lora.engine.clicks.answers import MAX_OBJECTS
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.decoder import ClickedObject
from sam3lora.engine.clicks.features import ClickableFeatures
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.engine.dense_slots import LabelledImage
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.selection import NotFiniteError
from sam3lora.errors import UserError
from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.loading import load_base

from ...model.dense.dense_cases import write_dense
from ..engine_cases import EVERY, make_images, write_adapter_of

TRUNK, NECK, OTHER, DENSE = range(4)
TARGETS = {
    TRUNK: r"vision_encoder\.backbone.*(o_proj|v_proj|fc1|fc2)",
    NECK: r"vision_encoder\.neck\.fpn_layers\.[012]\.proj[12]",
    OTHER: r"detr_decoder.*fc1",
}
MASK = torch.linspace(-9, 9, 32 * 32).view(32, 32)


@pytest.fixture(scope="module")
def folders(clickable_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("adapters")
    found = {slot: write_adapter_of(root / str(slot), clickable_base, pattern) for slot, pattern in TARGETS.items()}
    return found | {DENSE: write_dense(clickable_base, root / "dense")}


def make_engine(base: Path, folders: dict[int, Path], **options) -> Engine:
    engine = Engine.load(str(base), device="cpu", num_slots=4, **options)
    for slot, folder in folders.items():
        engine.place_adapter(slot, engine.read_any_adapter(folder))
    return engine


@pytest.fixture(scope="module")
def shared(clickable_base: Path, folders: dict[int, Path]) -> Engine:
    """With all adapters; its caches are anybody's."""
    return make_engine(clickable_base, folders)


def ask(engine: Engine, image: int, *clicks: tuple[float, ...], slot=None, box=None, mask=None, **options):
    prepared = engine.prepare_image(make_images(3)[image], f"image {image}")
    given = [Click(*click) for click in clicks]
    prompt = ClickPrompt.of(given, box, mask, size_hw=prepared.size_hw, side=engine.resolution)
    return ClickedObject(prepared, prompt, slot, **options)


def answers(engine: Engine, *objects: ClickedObject) -> list[ClickAnswer]:
    found = engine.click(objects)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def same(first: ClickAnswer, second: ClickAnswer, tolerance: float = 1e-5) -> bool:
    return (
        first.logits_Mmm.shape == second.logits_Mmm.shape
        and (first.logits_Mmm - second.logits_Mmm).abs().max() <= tolerance * max(1, second.logits_Mmm.abs().max())
        and np.allclose(first.scores, second.scores, atol=tolerance)
        and abs(first.object_score - second.object_score) <= tolerance
    )


def test_many_objects_together_are_as_one_by_one(shared: Engine):
    """Prompts of five kinds about two images under all adapters, in no order of anything."""
    kinds = [
        {"clicks": [(20, 20)]},
        {"clicks": [(20, 20), (30, 10, 0)]},
        {"clicks": [], "box": (5, 5, 30, 35)},
        {"clicks": [(12, 11, 0)], "box": (5, 5, 30, 35), "mask": MASK},
        {"clicks": [], "mask": -MASK},
    ]
    slots = (None, TRUNK, NECK, OTHER)
    asked = [
        ask(shared, number % 2, *(kind := kinds[number % 5])["clicks"], slot=slots[number % 4], **_without_clicks(kind))
        for number in range(40)
    ]
    asked += [ask(shared, 0, (number, number + 1)) for number in range(MAX_OBJECTS + 1)]
    before = shared.counters
    together = answers(shared, *asked)
    after = shared.counters
    # 8 objects of each kind, and 17 more of the first, of which 16 are decoded at once
    assert after["click_decodes"] - before["click_decodes"] == 4 + 2
    assert after["objects_clicked"] - before["objects_clicked"] == len(asked)
    for one, answer in zip(asked, together, strict=True):
        assert same(answer, answers(shared, one)[0])
        assert len(answer.scores) == (3 if one.prompt.multimask else 1)
    assert not same(together[0], together[40 + 3], 1e-4)


def _without_clicks(kind: dict) -> dict:
    return {name: value for name, value in kind.items() if name != "clicks"}


def test_an_answer_is_that_of_the_click_head_on_the_trunk(clickable_base: Path, shared: Engine):
    base = load_base(str(clickable_base))
    head = load_click_head(base)
    asked = ask(shared, 0, (20, 20))
    with torch.no_grad():
        pixels = shared._features.pixel_values([asked.image])
        features = head.embed(base.model.vision_encoder.backbone(pixels).last_hidden_state)
        prompt = asked.prompt
        expected = head.decode(
            features,
            points_NK2=torch.from_numpy(prompt.points_k2)[None],
            labels_NK=torch.from_numpy(prompt.labels_k)[None],
            multimask=True,
        )
    (found,) = answers(shared, asked)
    assert found.chosen == int(expected.iou_NM.argmax())
    expected = ClickAnswer.of(expected.logits_NMmm[0], expected.iou_NM[0].tolist(), expected.object_N.sigmoid().item())
    assert same(found, expected)


def test_prompts_and_clicks_share_one_vision_pass(clickable_base: Path, folders: dict[int, Path]):
    engine = make_engine(clickable_base, folders)
    engine.enable_clicks()
    image = ask(engine, 0, (20, 20)).image
    slots = (None, TRUNK, NECK, OTHER)
    engine.detect([PromptedImage(image, ("crack",), slot=slot, post=EVERY) for slot in slots])
    engine.label_small([LabelledImage(image, DENSE)])
    # The base and the adapter of the decoder share one; trunk, neck and dense adapter have passes of their own.
    assert engine.counters["images_encoded"] == 4
    size = engine.counters["image_cache_bytes"]
    found = {slot: answers(engine, ask(engine, 0, (20, 20), slot=slot))[0] for slot in slots}
    assert engine.counters["images_encoded"] == 4
    assert engine.counters["image_cache_bytes"] != size
    kept = engine._features.images._kept
    assert kept.size == sum(size for _, size in kept._entries.values())
    of_base = engine._features.images.features(image.key, None)
    assert isinstance(of_base, ClickableFeatures)
    assert kept._entries["features", image.key, None][1] == sum(one.nbytes for one in of_base.tensors())
    # An adapter of the trunk changes what clicks see; the detector's neck is not the click head's.
    assert same(found[OTHER], found[None])
    assert same(found[NECK], found[None])
    assert not same(found[TRUNK], found[None], 1e-4)
    (over_base,) = answers(engine, ask(engine, 0, (20, 20), slot=TRUNK, vision="base"))
    assert same(over_base, found[None])
    assert engine.counters["images_encoded"] == 4


def test_the_necks_of_the_adapter_do_change_detections(shared: Engine):
    image = ask(shared, 0, (20, 20)).image
    base, neck = shared.detect([PromptedImage(image, ("crack",), slot=slot, post=EVERY) for slot in (None, NECK)])
    assert not np.allclose(base[0].scores, neck[0].scores, atol=1e-4)


def test_an_image_from_before_is_encoded_once_more(clickable_base: Path):
    engine = make_engine(clickable_base, {})
    asked = ask(engine, 0, (20, 20))
    engine.detect([PromptedImage(asked.image, ("crack",))])
    assert type(engine._features.images.features(asked.image.key, None)) is not ClickableFeatures
    for _ in range(2):
        answers(engine, asked)
        engine.detect([PromptedImage(asked.image, ("crack",))])
    assert engine.counters["images_encoded"] == 2


def test_an_image_that_brings_its_features_needs_no_cache(clickable_base: Path):
    engine = make_engine(clickable_base, {}, image_cache_bytes=0)
    engine.enable_clicks()
    asked = ask(engine, 0, (20, 20))
    (image,) = engine.encode_ahead([(asked.image, None)])
    asked = replace(asked, image=image)
    first, again = (answers(engine, asked)[0] for _ in range(2))
    engine.detect([PromptedImage(image, ("crack",))])
    assert same(first, again, 0)
    assert engine.counters["images_encoded"] == 1
    assert engine.counters["image_cache_bytes"] == 0


def test_images_labelled_by_a_dense_adapter_beside_prompts_can_be_clicked(
    clickable_base: Path, folders: dict[int, Path]
):
    engine = make_engine(clickable_base, folders)
    engine.enable_clicks()
    asked = ask(engine, 1, (20, 20))
    engine.label_small([LabelledImage(asked.image, DENSE)], beside=[PromptedImage(asked.image, ("crack",))])
    encoded = engine.counters["images_encoded"]
    (found,) = answers(engine, asked)
    assert engine.counters["images_encoded"] == encoded
    assert same(found, answers(make_engine(clickable_base, {}), asked)[0])


def test_captured_stages_keep_the_trunk(clickable_base: Path, folders: dict[int, Path], shared: Engine):
    capturer = RecordingCapturer()
    engine = make_engine(clickable_base, folders, capturer=capturer, image_cache_bytes=0)
    for turn in range(5):  # without clicks: new, captured, repeated; then with clicks
        if turn == 2:
            engine.enable_clicks()
            replays = capturer.num_replays
        for slot in (None, TRUNK):
            image = ask(engine, turn % 3, (20, 20)).image
            engine.detect([PromptedImage(image, ("crack",), slot=slot)])
        if turn >= 2:
            asked = [ask(engine, number, (20, 20), slot=slot) for number in range(2) for slot in (None, TRUNK)]
            expected = answers(shared, *asked)
            for found, other in zip(answers(engine, *asked), expected, strict=True):
                assert same(found, other, 1e-4)
    assert capturer.num_replays > replays


def test_what_a_gpu_does_gives_what_a_cpu_gives(clickable_base: Path, shared: Engine):
    expected = answers(shared, ask(shared, 0, (20, 20)), ask(shared, 1, (3, 30), box=(1, 2, 20, 30), mask=MASK))
    with pretend_gpu():
        engine = Engine.load(str(clickable_base), device="cuda", precision="float32", cuda_graphs=False)
        asked = ask(engine, 0, (20, 20)), ask(engine, 1, (3, 30), box=(1, 2, 20, 30), mask=MASK)
        found = answers(engine, *asked)
        assert all(one.logits_Mmm.device.type == "cpu" for one in found)
        for one, other in zip(found, expected, strict=True):
            assert same(one, other)


def test_a_mistake_in_one_object_leaves_the_others_alone(shared: Engine, monkeypatch: pytest.MonkeyPatch):
    good = ask(shared, 0, (20, 20))
    found = shared.click(
        [
            ask(shared, 0),
            good,
            ask(shared, 0, (1, 1), slot=DENSE),
            ask(shared, 0, (1, 1), slot=77),
            ask(shared, 0, (1, 1), mask=MASK[:16]),
            ask(shared, 1, (1, 1), mask=MASK * torch.nan),
            good,
        ]
    )
    kinds = [UserError, ClickAnswer, LookupError, LookupError, UserError, NotFiniteError, ClickAnswer]
    assert [type(one) for one in found] == kinds
    assert same(found[1], found[6], 0)

    head = shared._clicks.enable()
    decode = type(head).decode

    def fails(self, features, **prompts):
        if prompts["masks_Nmm"] is not None:
            raise ZeroDivisionError
        return decode(self, features, **prompts)

    monkeypatch.setattr(type(head), "decode", fails)
    first, failed, second = shared.click([good, ask(shared, 0, (1, 1), mask=MASK), ask(shared, 1, (1, 1))])
    assert isinstance(failed, ZeroDivisionError)
    assert same(first, found[1])
    assert isinstance(second, ClickAnswer)

    def no_memory(self, features, **prompts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(head), "decode", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        shared.click([good])


def test_a_base_without_a_tracker_is_refused(spread_base: Path):
    engine = make_engine(spread_base, {})
    with pytest.raises(UserError, match="has no tracker"):
        engine.click([ask(engine, 0, (20, 20))])


def test_nothing_is_answered_with_nothing(shared: Engine):
    assert shared.click([]) == []


def test_bfloat16_gives_nearly_the_same(clickable_base: Path, shared: Engine):
    half = make_engine(clickable_base, {}, precision="bfloat16")
    asked = [ask(half, 0, (20, 20)), ask(half, 1, (3, 30), box=(1, 2, 20, 30), mask=MASK)]
    for ours, theirs in zip(answers(half, *asked), answers(shared, *asked), strict=True):
        assert ours.logits_Mmm.dtype is torch.float32
        assert 0 < (ours.logits_Mmm - theirs.logits_Mmm).abs().max() < 0.1 * theirs.logits_Mmm.abs().max()


def test_a_compiled_vision_encoder_keeps_the_trunk(
    clickable_base: Path, shared: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.compile", lambda encoder: lambda pixels: encoder(pixels))
    engine = make_engine(clickable_base, {}, compile_vision=True)
    asked = ask(engine, 0, (20, 20))
    assert same(answers(engine, asked)[0], answers(shared, asked)[0])
