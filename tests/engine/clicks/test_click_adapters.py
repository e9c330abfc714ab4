"""Click adapters in slots of the engine: together or alone, beside adapters of the trunk, replaced, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.decoder import ClickedObject
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.selection import NotFiniteError
from sam3lora.errors import UserError
from sam3lora.model.adapter.metadata import CLICKS
from sam3lora.model.clicks.adapter import load_click_adapter

from ...model.clicks.click_adapters import write_click_adapter
from ..engine_cases import make_images
from .test_decoder import same

TRUNK, FIRST, SECOND, OVER_TRUNK = range(4)
MASK = torch.linspace(-9, 9, 32 * 32).view(32, 32)


@pytest.fixture(scope="module")
def folders(clickable_root: Path) -> dict[int, Path]:
    """An adapter of the trunk, two click adapters over the base's trunk, and one over that trunk."""
    names = {TRUNK: "towers", FIRST: "edges", SECOND: "holes", OVER_TRUNK: "over-towers"}
    return {slot: clickable_root / name for slot, name in names.items()}


def engine_with(base: Path, folders: dict[int, Path]) -> Engine:
    engine = Engine.load(str(base), device="cpu", num_slots=4)
    for slot, folder in folders.items():
        engine.place_adapter(slot, engine.read_any_adapter(folder))
    engine.enable_clicks()
    return engine


@pytest.fixture(scope="module")
def shared(clickable_base: Path, folders: dict[int, Path]) -> Engine:
    return engine_with(clickable_base, folders)


def ask(engine: Engine, click_slot: int | None, *clicks: tuple, image: int = 0, mask=None, **options) -> ClickedObject:
    prepared = engine.prepare_image(make_images(2)[image], f"image {image}")
    given = [Click(*click) for click in clicks or [(20, 20)]]
    prompt = ClickPrompt.of(given, None, mask, size_hw=prepared.size_hw, side=engine.resolution)
    return ClickedObject(prepared, prompt, click_slot=click_slot, **options)


def answer(engine: Engine, asked: ClickedObject) -> ClickAnswer:
    (found,) = engine.click([asked])
    if isinstance(found, Exception):
        raise found
    return found


def test_an_adapter_in_a_slot_is_the_head_that_it_is_merged_into(shared: Engine, folders: dict[int, Path]):
    found = {slot: answer(shared, ask(shared, slot)) for slot in (None, FIRST, SECOND)}
    features = shared._features.images.features("image 0", None).clicks
    for slot in (FIRST, SECOND):
        prompt = ask(shared, None).prompt
        head = load_click_adapter(folders[slot], shared.base, head=shared._clicks.load_head())
        with torch.inference_mode():
            output = head.decode(
                features,
                points_NK2=torch.from_numpy(prompt.points_k2)[None],
                labels_NK=torch.from_numpy(prompt.labels_k)[None],
                multimask=True,
            )
        torch.testing.assert_close(found[slot].logits_Mmm, output.logits_NMmm[0], atol=1e-4, rtol=1e-4)
        assert found[slot].scores == pytest.approx(output.iou_NM[0].tolist(), abs=1e-5)
        assert not same(found[slot], found[None], 1e-2)
    assert not same(found[FIRST], found[SECOND], 1e-2)


def test_many_adapters_share_one_vision_pass_and_one_decode(clickable_base: Path, folders: dict[int, Path]):
    """And each object is answered as if it were alone: to 1e-6 of its largest logit."""
    engine = engine_with(clickable_base, folders)
    asked = [
        ask(engine, None),
        ask(engine, FIRST),
        ask(engine, SECOND),
        ask(engine, OVER_TRUNK, slot=TRUNK),
        ask(engine, FIRST, slot=TRUNK, vision="base"),
        ask(engine, FIRST, image=1),
        ask(engine, FIRST, (20, 20), (9, 9, 0), mask=MASK),
        ask(engine, SECOND, (20, 20), (9, 9, 0), mask=MASK),
    ]
    together = engine.click(asked, beside=[PromptedImage(asked[0].image, ("crack",))])
    assert engine.counters["images_encoded"] == 2 + 1  # two images, and one of them for the adapter of the trunk
    assert engine.counters["click_decodes"] == 2  # single clicks, and clicks with a mask
    engine.detect([PromptedImage(asked[0].image, ("crack",))])
    assert engine.counters["images_encoded"] == 3
    for one, found in zip(asked, together, strict=True):
        assert isinstance(found, ClickAnswer), found
        assert same(found, answer(engine, one), 1e-6)
    assert same(together[1], together[4], 1e-6)
    assert not same(together[6], together[7], 1e-2)
    assert engine.counters["images_encoded"] == 3


def test_a_click_adapter_leaves_prompts_alone(shared: Engine, clickable_base: Path):
    image = ask(shared, None).image
    plain = Engine.load(str(clickable_base), device="cpu")
    (ours,), (theirs,) = (one.detect([PromptedImage(image, ("crack",))]) for one in (shared, plain))
    assert ours[0].scores == pytest.approx(theirs[0].scores, abs=1e-6)
    (refused,) = shared.detect_small([PromptedImage(image, ("crack",), slot=FIRST)])
    assert isinstance(refused, UserError)
    assert "answers clicks" in str(refused)


def test_another_adapter_takes_the_place(clickable_base: Path, folders: dict[int, Path]):
    engine = engine_with(clickable_base, {0: folders[FIRST]})
    first = answer(engine, ask(engine, 0))
    engine.place_adapter(0, engine.read_any_adapter(folders[SECOND]))
    second = answer(engine, ask(engine, 0))
    assert not same(first, second, 1e-2)
    engine.place_adapter(0, engine.read_any_adapter(folders[TRUNK]))
    (found,) = engine.click([ask(engine, 0)])
    assert isinstance(found, LookupError)
    engine.place_adapter(0, engine.read_any_adapter(folders[FIRST]))
    assert same(answer(engine, ask(engine, 0)), first, 1e-6)
    engine.clear_adapter(0)
    (found,) = engine.click([ask(engine, 0)])
    assert isinstance(found, LookupError)
    assert engine.counters["images_encoded"] == 1


def test_adapters_that_do_not_go_together_are_told(shared: Engine):
    good = ask(shared, FIRST)
    found = shared.click(
        [
            good,
            ask(shared, FIRST, slot=TRUNK),
            ask(shared, OVER_TRUNK),
            ask(shared, OVER_TRUNK, slot=TRUNK, vision="base"),
            ask(shared, TRUNK),  # finds objects
            ask(shared, None, slot=FIRST),  # answers clicks
            ask(shared, 77),
        ]
    )
    kinds = [ClickAnswer, UserError, UserError, UserError, LookupError, LookupError, LookupError]
    assert [type(one) for one in found] == kinds
    assert "trained on the vision trunk of the base, here clicks see that of an adapter" in str(found[1])
    assert "trained on the vision trunk of an adapter" in str(found[2])
    assert same(found[0], answer(shared, good), 1e-6)
    shared.check_clicks(None, FIRST)
    shared.check_clicks(TRUNK, OVER_TRUNK)
    with pytest.raises(UserError, match="vision trunk"):
        shared.check_clicks(TRUNK, FIRST)


def test_an_adapter_of_weights_that_are_too_large_is_refused(clickable_base: Path, tmp_path: Path):
    engine = engine_with(clickable_base, {})
    for name, std in (("large", 1e37), ("good", 0.2)):
        folder = write_click_adapter(tmp_path / name, clickable_base, std=std, targets=("output_hypernetworks_mlps",))
        engine.place_adapter(0, engine.read_any_adapter(folder))
        if name == "good":
            engine.check_adapter(0)
            continue
        with pytest.raises(NotFiniteError, match="diverged"):
            engine.check_adapter(0)
    assert engine.counters["click_decodes"] == engine.counters["images_encoded"] == 0


def test_bases_that_an_adapter_does_not_fit(folders: dict[int, Path], spread_base: Path):
    plain = Engine.load(str(spread_base), device="cpu")
    for read in (plain.read_any_adapter, plain.summarise_adapter):
        with pytest.raises(UserError, match="has no tracker"):
            read(folders[FIRST])
    with pytest.raises(UserError, match="of task clicks"):
        plain.read_adapter(folders[FIRST])


def test_what_is_known_without_the_weights(shared: Engine, folders: dict[int, Path]):
    known = shared.summarise_adapter(folders[FIRST])
    assert (known.metadata.task, known.rank, known.components) == (CLICKS, 2, frozenset())
    assert known.size_bytes == (folders[FIRST] / "adapter_model.safetensors").stat().st_size


def test_bfloat16_gives_nearly_the_same(clickable_base: Path, shared: Engine, folders: dict[int, Path]):
    half = Engine.load(str(clickable_base), device="cpu", precision="bfloat16", num_slots=4)
    half.place_adapter(FIRST, half.read_any_adapter(folders[FIRST]))
    ours, theirs = (answer(one, ask(one, FIRST)) for one in (half, shared))
    assert 0 < (ours.logits_Mmm - theirs.logits_Mmm).abs().max() < 0.1 * theirs.logits_Mmm.abs().max()
