"""Each adapter of a pool finds what it finds alone, and the base is as it is without adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from pycocotools import mask as coco_mask

from sam3lora.engine.adapter_pool import AdapterPool
from sam3lora.engine.detections import BoxPrompt, Detections
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import load_adapter, save_adapter
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.loading import load_base

from ..model.conftest import make_sam3, randomise_adapter, save_base, write_adapter
from .engine_cases import EVERY

PROMPTS = ["crack", "hole"]
TARGETS = ("q_proj", "v_proj", "fc1")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 90), (120, 40))]


@pytest.fixture(scope="module")
def make_adapter(spread_base: Path, tmp_path_factory):
    def make(seed: int, components: tuple[str, ...], **metadata) -> Path:
        folder = tmp_path_factory.mktemp("adapter") / "best"
        options = {"components": components, "targets": TARGETS, "resolution": 112} | metadata
        return write_adapter(spread_base, folder, seed=seed, **options)

    return make


@pytest.fixture(scope="module")
def adapters(make_adapter) -> dict[str, Path]:
    return {
        "vision/1.0": make_adapter(1, ("vision_encoder", "detr_decoder")),
        "text": make_adapter(2, ("text_encoder",)),
        "detector": make_adapter(3, ("detr_encoder", "geometry_encoder")),
        "no cls": make_adapter(4, ("detr_decoder",), geometry_cls=False),
    }


@pytest.fixture(scope="module")
def shared(adapters) -> AdapterPool:
    return AdapterPool(adapters=adapters, device="cpu")


def ask(pool: AdapterPool, images, adapter=None, prompts=PROMPTS, post=EVERY, **options) -> list[list[Detections]]:
    return pool.detect(images, prompts, adapter=adapter, post=post, **options)


def assert_same(first: list[list[Detections]], second: list[list[Detections]], atol: float = 1e-5) -> None:
    for one, other in zip([d for row in first for d in row], [d for row in second for d in row], strict=True):
        assert (one.prompt, one.size_hw, len(one)) == (other.prompt, other.size_hw, len(other))
        np.testing.assert_allclose(one.presence, other.presence, atol=atol)
        np.testing.assert_allclose(one.scores, other.scores, atol=atol)
        np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=200 * atol)
        # logits near 0 may fall on either side: all but a few pixels agree
        assert (coco_mask.decode(one.rles) != coco_mask.decode(other.rles)).mean() < max(1e-3, 2 * atol)


def differ(first: list[list[Detections]], second: list[list[Detections]]) -> bool:
    return not np.allclose(first[0][0].scores, second[0][0].scores, atol=1e-4)


def test_no_images_and_no_prompts(shared, images):
    assert ask(shared, []) == []
    assert ask(shared, images, prompts=[]) == [[], []]
    assert ask(shared, [], "text", boxes=[]) == []


def test_the_base_is_untouched_by_its_adapters(shared, images, spread_base):
    plain = AdapterPool(str(spread_base), device="cpu")
    expected = ask(plain, images)
    ask(shared, images, "vision/1.0")
    assert_same(ask(shared, images), expected, atol=1e-7)


@pytest.mark.parametrize("label", ["vision/1.0", "text", "detector", "no cls"])
def test_each_adapter_is_as_if_alone(shared, images, adapters, label):
    # all of them are asked together
    together = shared.detect_each(images, [PROMPTS] * 2, dict.fromkeys([*adapters, None], EVERY))
    alone = ask(AdapterPool(adapters={"it": adapters[label]}, device="cpu"), images, "it")
    assert_same(together[label], alone)
    assert_same(ask(shared, images, label), alone)
    for name, found in together.items():
        assert name == label or differ(found, alone)


def test_images_with_prompts_of_their_own(shared, images):
    each = shared.detect_each(images, [["crack"], ["hole", "crack"]], {"text": EVERY})["text"]
    assert_same(each[:1], ask(shared, images[:1], "text", ["crack"]))
    assert_same(each[1:], ask(shared, images[1:], "text", ["hole", "crack"]))


def test_an_adapter_that_the_bank_cannot_hold_is_merged(spread_base, tmp_path, images, caplog):
    base = load_base(str(spread_base))
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["presence_head"], exclude_modules=r"text_encoder\..*"
    )
    model = get_peft_model(base.model, config)
    randomise_adapter(model, 3)
    metadata = AdapterMetadata(base_model=str(spread_base), base_fingerprint=base.fingerprint, geometry_cls=False)
    folder = save_adapter(model, tmp_path / "best", metadata)
    pool = AdapterPool(adapters={"it": folder}, device="cpu")
    assert "modules_to_save" in caplog.text
    assert pool.geometry_cls("it") is False
    # PEFT's own layers are the reference
    peft = load_base(str(spread_base))
    loaded, _ = load_adapter(peft.model, folder)
    reference = Engine(replace(peft, model=loaded.get_base_model()), geometry_cls=False, in_training=True)
    asked = [
        PromptedImage(reference.prepare_image(i, str(n)), tuple(PROMPTS), post=EVERY) for n, i in enumerate(images)
    ]
    both = pool.detect_each(images, [PROMPTS] * 2, {None: EVERY, "it": EVERY})
    assert_same(both["it"], reference.detect(asked), atol=1e-4)
    assert_same(both[None], ask(AdapterPool(str(spread_base), device="cpu"), images), atol=1e-6)
    assert differ(both["it"], both[None])


def test_a_click_adapter_does_not_go_with_the_trunk_of_a_merged_adapter(clickable_base, clickable_root, tmp_path):
    base = load_base(str(clickable_base))
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["presence_head"]))
    folder = save_adapter(model, tmp_path / "best", AdapterMetadata(base_model=str(clickable_base)))
    pool = AdapterPool(adapters={"it": folder}, click_adapter=clickable_root / "edges", device="cpu")
    with pytest.raises(UserError, match="'it' is merged into a copy"):
        pool.place_clicks("it")
    assert pool.place_clicks("it", "base") == pool.place_clicks(None) == (pool.engine, None, 1)


def test_the_cls_token_follows_each_adapter(shared, adapters, images):
    assert [shared.geometry_cls(label) for label in (None, "detector", "no cls")] == [True, True, False]
    # one setting for all overrules what they were trained with
    for wanted in (True, False):
        told = AdapterPool(adapters=adapters, geometry_cls=wanted, device="cpu")
        assert [told.geometry_cls(label) for label in (None, "detector", "no cls")] == [wanted] * 3
        for label in (None, "detector", "no cls"):
            same = shared.geometry_cls(label) == wanted
            assert differ(ask(told, images, label), ask(shared, images, label)) != same


@pytest.mark.parametrize("adapter", [None, "no cls"])
def test_images_with_different_numbers_of_boxes(shared, images, adapter):
    three = [images[0], images[1], images[0]]
    boxes = [[BoxPrompt((9, 6, 45, 30)), BoxPrompt((50, 20, 80, 60), label=0)], [BoxPrompt((0, 0, 40, 120))], []]
    together = ask(shared, three, adapter, boxes=boxes)
    for image, of_image in enumerate(together):
        assert_same([of_image], ask(shared, [three[image]], adapter, boxes=[boxes[image]]))


def test_unknown_precision(spread_base):
    with pytest.raises(UserError, match="float32 or bfloat16, got 'float8'"):
        AdapterPool(str(spread_base), precision="float8")


def test_adapters_bring_their_base(adapters, make_adapter, spread_base):
    pool = AdapterPool(adapters={"it": adapters["text"]}, device="cpu")
    assert (pool.base.name, pool.base.resolution) == (str(spread_base), 112)
    assert set(pool.adapters) == {"it"}
    assert pool.adapters["it"].base_model == str(spread_base)
    # those of two bases or two resolutions do not go together, unless it is said what to do
    other = make_adapter(5, ("detr_decoder",), base_model="some/other")
    with pytest.raises(UserError, match=r"differ in base_model \(first: .*, second: some/other\)"):
        AdapterPool(adapters={"first": adapters["text"], "second": other})
    large = make_adapter(6, ("detr_decoder",), resolution=168)
    with pytest.raises(UserError, match=r"differ in resolution \(small: 112, large: 168\)"):
        AdapterPool(adapters={"small": adapters["text"], "large": large})
    both = AdapterPool(adapters={"small": adapters["text"], "large": large}, resolution=168, device="cpu")
    assert both.base.resolution == 168


def test_an_adapter_of_another_base(shared, spread_base, adapters, images, tmp_path):
    other = save_base(tmp_path / "other", make_sam3(seed=7))
    with pytest.raises(UserError, match="base"):
        AdapterPool(str(other), adapters={"it": adapters["text"]})


def test_an_adapter_that_is_not_there(shared, images):
    with pytest.raises(UserError, match=r"no adapter 'crack'.*text"):
        ask(shared, images, "crack")
    with pytest.raises(UserError, match="no adapter 'crack'"):
        shared.geometry_cls("crack")
