"""Dense adapters in an engine: the answers of the dense engine, alone and beside others, from one vision pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.dense import DenseEngine
from sam3lora.engine.dense_slots import LabelledImage
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.selection import NotFiniteError
from sam3lora.errors import UserError

from ..model.dense.dense_cases import write_dense
from .engine_cases import make_images, write_adapter

EVERY = PostProcessing(threshold=0.0, nms="none")
DENSE = {
    "gears": ("multiclass", True, 0),
    "alone": ("multilabel", False, 1),
    "first": ("binary", True, 2),
    "bottlenecks": ("multiclass", False, 5),
}
SETTINGS = {"first": {"layers": (0, 1)}, "bottlenecks": {"bottleneck_width": 8}}
PROMPTED = {"vision": 3, "detector": 4}


@pytest.fixture(scope="module")
def folders(spread_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four dense folders, one a head alone, one on the first layer and one with bottlenecks, and two prompted ones."""
    root = tmp_path_factory.mktemp("adapters")
    found = {}
    for name, (mode, lora, _) in DENSE.items():
        found[name] = write_dense(spread_base, root / name, mode, lora=lora, **SETTINGS.get(name, {}))
    return found | {name: write_adapter(root / name, spread_base, name, seed) for name, seed in PROMPTED.items()}


@pytest.fixture
def engine(spread_base: Path, folders: dict[str, Path]) -> Engine:
    engine = Engine.load(str(spread_base), device="cpu", num_slots=6)
    for name, folder in folders.items():
        slot = DENSE[name][2] if name in DENSE else PROMPTED[name]
        engine.place_adapter(slot, engine.read_any_adapter(folder))
        engine.check_adapter(slot)
    return engine


def prepared(engine: Engine, number: int) -> object:
    return engine.prepare_image(make_images(3)[number], f"image {number}")


@pytest.mark.parametrize("name", DENSE)
def test_a_slot_gives_what_the_dense_engine_gives(engine: Engine, folders: dict[str, Path], name: str):
    alone = DenseEngine.load(folders[name], device="cpu")
    asked = [LabelledImage(prepared(engine, number), DENSE[name][2]) for number in range(3)]
    for found, expected in zip(engine.label_small(asked), alone.logits(make_images(3)), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        assert expected.std() > 0.1


def test_a_batch_with_prompted_adapters_gives_what_each_gives_alone(
    engine: Engine, spread_base: Path, folders: dict[str, Path]
):
    """One image asked of four dense and two prompted adapters and the base, after one pass of five rows."""
    image = prepared(engine, 0)
    dense = [LabelledImage(image, slot) for slot in (0, 1, 2, 5)]
    slots = (None, *PROMPTED.values())
    prompted = [PromptedImage(image, ("crack", "hole"), (), slot, EVERY) for slot in slots]
    labelled = engine.label_small(dense, beside=prompted)
    # the base, the detector's and the head alone share a row; gears, first, bottlenecks and vision have one each
    assert engine.counters["images_encoded"] == 5
    detected = engine.detect_small(prompted)
    assert engine.counters["images_encoded"] == 5
    for asked, found in zip(prompted, detected, strict=True):
        other = Engine.load(str(spread_base), device="cpu", num_slots=6)
        for name, slot in PROMPTED.items():
            if slot == asked.slot:
                other.place_adapter(slot, other.read_adapter(folders[name]))
        (expected,) = other.detect_small([asked])
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours.scores_N, theirs.scores_N, atol=1e-5)
            np.testing.assert_allclose(ours.mask_logits_NHW, theirs.mask_logits_NHW, atol=1e-3)
    assert not np.allclose(detected[0][0].scores_N, detected[1][0].scores_N, atol=1e-3)
    for asked, logits in zip(dense, labelled, strict=True):
        other = Engine.load(str(spread_base), device="cpu", num_slots=6)
        name = next(name for name, (_, _, slot) in DENSE.items() if slot == asked.slot)
        other.place_adapter(asked.slot, other.read_any_adapter(folders[name]))
        (expected,) = other.label_small([asked])
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_the_same_image_is_answered_from_the_cache_until_the_adapter_changes(
    engine: Engine, spread_base: Path, folders: dict[str, Path], tmp_path: Path
):
    asked = [LabelledImage(prepared(engine, 0), 1)]
    (first,) = engine.label_small(asked)
    before = engine.counters
    assert np.array_equal(engine.label_small(asked)[0], first)
    after = engine.counters
    assert (after["images_encoded"], after["images_labelled"]) == (before["images_encoded"], 1)
    assert after["image_cache_hits"] == before["image_cache_hits"] + 1
    # the same settings, another head
    folder = write_dense(spread_base, tmp_path / "again", "multilabel", lora=False)
    head = load_file(folder / "dense_head.safetensors")
    save_file(head | {"head.outputs.0.bias": head["head.outputs.0.bias"] + 1.0}, folder / "dense_head.safetensors")
    engine.place_adapter(1, engine.read_any_adapter(folder))
    np.testing.assert_allclose(engine.label_small(asked)[0], first + 1.0, atol=1e-5)


def test_a_slot_that_gets_a_prompted_adapter_labels_no_more(engine: Engine, folders: dict[str, Path]):
    asked = LabelledImage(prepared(engine, 0), 0)
    question = PromptedImage(asked.image, ("crack",), (), 0, EVERY)
    assert isinstance(engine.detect_small([question])[0], UserError)
    engine.place_adapter(0, engine.read_any_adapter(folders["detector"]))
    assert isinstance(engine.label_small([asked])[0], LookupError)
    assert isinstance(engine.detect_small([question])[0], list)
    engine.clear_adapter(1)
    assert isinstance(engine.label_small([replace(asked, slot=1)])[0], LookupError)


def test_a_fault_in_one_leaves_the_others_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    images = [LabelledImage(prepared(engine, number), slot) for number, slot in ((0, 0), (1, 1), (2, 2))]
    expected = engine.label_small(images)
    engine.drop_features()
    heads = engine._dense._heads
    monkeypatch.setitem(heads, 1, lambda tokens: 1 / 0)
    monkeypatch.setitem(heads, 2, lambda tokens: [tokens[0].new_full((len(tokens[0]), 1, 4, 4), torch.nan)])
    good, failed, diverged = engine.label_small(images, beside=[PromptedImage(images[0].image, ("crack",))])
    np.testing.assert_allclose(good, expected[0], atol=1e-4 * np.abs(expected[0]).max())
    assert isinstance(failed, ZeroDivisionError)
    assert isinstance(diverged, NotFiniteError)

    def no_memory(tokens: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(heads, 1, no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine.label_small(images)


def test_an_adapter_that_diverged_is_found(engine: Engine, spread_base: Path, tmp_path: Path):
    folder = write_dense(spread_base, tmp_path / "diverged")
    head = load_file(folder / "dense_head.safetensors")
    weight = "head.outputs.0.weight"
    save_file(head | {weight: head[weight] * 1e38}, folder / "dense_head.safetensors")
    engine.place_adapter(0, engine.read_any_adapter(folder))
    with pytest.raises(NotFiniteError):
        engine.check_adapter(0)


def test_bfloat16_gives_nearly_the_same(engine: Engine, spread_base: Path, folders: dict[str, Path]):
    half = Engine.load(str(spread_base), device="cpu", num_slots=1, precision="bfloat16")
    half.place_adapter(0, half.read_any_adapter(folders["gears"]))
    half.check_adapter(0)
    asked = [LabelledImage(prepared(engine, 0), 0)]
    (ours,), (theirs,) = half.label_small(asked), engine.label_small(asked)
    assert ours.dtype == np.float32
    assert 0 < np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()
