"""Each adapter of a pool finds what it finds alone, and the base is as it is without adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pycocotools import mask as coco_mask

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.adapter_pool import AdapterPool
from sam3lora.engine.detections import BoxPrompt, Detections
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.features import to_pixel_values
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import load_adapter, save_adapter
from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.loading import load_base
from sam3lora.model.tokenization import tokenize

from ..model.conftest import make_sam3, randomise_adapter, save_base

PROMPTS = ["crack", "hole"]
SIZES = [(60, 90), (120, 40)]
TARGETS = ("q_proj", "v_proj", "fc1")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def base_path(tmp_path_factory) -> Path:
    """Weights large enough that every input can be told from the output."""
    model = make_sam3()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    return save_base(tmp_path_factory.mktemp("base") / "sam3", model)


@pytest.fixture(scope="module")
def make_adapter(base_path: Path, tmp_path_factory):
    def make(seed: int, components: tuple[str, ...], **metadata) -> Path:
        base = load_base(str(base_path))
        model = apply_lora(base.model, LoraSettings(rank=2, components=components, target_modules=TARGETS))
        randomise_adapter(model, seed)
        told = {"base_model": str(base_path), "base_fingerprint": base.fingerprint, "resolution": base.resolution}
        folder = tmp_path_factory.mktemp("adapter") / "best"
        return save_adapter(model, folder, AdapterMetadata(**(told | metadata)))

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


EVERY = PostProcessing(threshold=0.0, nms="none")


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


def test_the_base_is_untouched_by_its_adapters(shared, images, base_path):
    plain = AdapterPool(str(base_path), device="cpu")
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


def test_adapters_that_leave_the_towers_alone_share_them(shared, adapters, images):
    before = shared.engine.counters
    shared.detect_each(images, [PROMPTS] * 2, dict.fromkeys(["text", "detector", "no cls", None], EVERY))
    after = shared.engine.counters
    assert after["images_encoded"] - before["images_encoded"] == 2
    shared.detect_each(images, [PROMPTS] * 2, dict.fromkeys([*adapters, None], EVERY))
    # two images by the base's tower and two by that of the one adapter which changes it
    assert shared.engine.counters["images_encoded"] - after["images_encoded"] == 4


def test_images_with_prompts_of_their_own(shared, images):
    each = shared.detect_each(images, [["crack"], ["hole", "crack"]], {"text": EVERY})["text"]
    assert_same(each[:1], ask(shared, images[:1], "text", ["crack"]))
    assert_same(each[1:], ask(shared, images[1:], "text", ["hole", "crack"]))


def test_recorded_post_processing(shared, make_adapter, images):
    assert shared.recorded(None) == shared.recorded("text") == PostProcessing()
    post = PostProcessing(threshold=0.1, nms="box", prompt_thresholds={"hole": 0.02})
    pool = AdapterPool(adapters={"it": make_adapter(8, ("detr_decoder",), post_processing=post)}, device="cpu")
    assert (pool.recorded("it"), pool.recorded(None)) == (post, PostProcessing())
    assert_same(ask(pool, images, "it", post=None), ask(pool, images, "it", post=post), atol=1e-7)


def test_an_adapter_that_the_bank_cannot_hold_is_merged(base_path, tmp_path, images, caplog):
    base = load_base(str(base_path))
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["presence_head"], exclude_modules=r"text_encoder\..*"
    )
    model = get_peft_model(base.model, config)
    randomise_adapter(model, 3)
    metadata = AdapterMetadata(base_model=str(base_path), base_fingerprint=base.fingerprint, geometry_cls=False)
    folder = save_adapter(model, tmp_path / "best", metadata)
    pool = AdapterPool(adapters={"it": folder}, device="cpu")
    assert "modules_to_save" in caplog.text
    assert pool.geometry_cls("it") is False
    # PEFT's own layers are the reference
    peft = load_base(str(base_path))
    loaded, _ = load_adapter(peft.model, folder)
    reference = Engine(replace(peft, model=loaded.get_base_model()), geometry_cls=False, in_training=True)
    asked = [
        PromptedImage(reference.prepare_image(i, str(n)), tuple(PROMPTS), post=EVERY) for n, i in enumerate(images)
    ]
    both = pool.detect_each(images, [PROMPTS] * 2, {None: EVERY, "it": EVERY})
    assert_same(both["it"], reference.detect(asked), atol=1e-4)
    assert_same(both[None], ask(AdapterPool(str(base_path), device="cpu"), images), atol=1e-6)
    assert differ(both["it"], both[None])


def test_the_cls_token_follows_each_adapter(shared, adapters, images):
    assert [shared.geometry_cls(label) for label in (None, "detector", "no cls")] == [True, True, False]
    # one setting for all overrules what they were trained with
    for wanted in (True, False):
        told = AdapterPool(adapters=adapters, geometry_cls=wanted, device="cpu")
        assert [told.geometry_cls(label) for label in (None, "detector", "no cls")] == [wanted] * 3
        for label in (None, "detector", "no cls"):
            same = shared.geometry_cls(label) == wanted
            assert differ(ask(told, images, label), ask(shared, images, label)) != same


def test_boxes_are_those_of_the_stock_model(shared, images, base_path):
    boxes = [BoxPrompt((9, 6, 45, 30)), BoxPrompt((50, 20, 80, 60), label=0)]
    found = ask(shared, images[:1], prompts=["crack"], boxes=[boxes])
    base = load_base(str(base_path))
    input_ids, attention_mask = tokenize(base.tokenizer, ["crack"])
    with torch.no_grad():
        stock = base.model(
            pixel_values=to_pixel_values(images[:1], base.resolution),
            input_ids=input_ids,
            attention_mask=attention_mask,
            # x / 90, y / 60 of 60 x 90 pixels
            input_boxes=torch.tensor([[[0.3, 0.3, 0.4, 0.4], [65 / 90, 40 / 60, 30 / 90, 40 / 60]]]),
            input_boxes_labels=torch.tensor([[1, 0]]),
        )
    scores = (stock.pred_logits[0].sigmoid() * stock.presence_logits[0].sigmoid()).sort(descending=True).values
    np.testing.assert_allclose(found[0][0].scores, scores, atol=1e-5)
    # and neither they nor their labels are ignored
    assert differ(found, ask(shared, images[:1], prompts=["crack"]))
    assert differ(found, ask(shared, images[:1], prompts=["crack"], boxes=[[boxes[0], BoxPrompt(boxes[1].xyxy)]]))


@pytest.mark.parametrize("adapter", [None, "no cls"])
def test_images_with_different_numbers_of_boxes(shared, images, adapter):
    three = [images[0], images[1], images[0]]
    boxes = [[BoxPrompt((9, 6, 45, 30)), BoxPrompt((50, 20, 80, 60), label=0)], [BoxPrompt((0, 0, 40, 120))], []]
    together = ask(shared, three, adapter, boxes=boxes)
    for image, of_image in enumerate(together):
        assert_same([of_image], ask(shared, [three[image]], adapter, boxes=[boxes[image]]))


@pytest.mark.parametrize(
    ("box", "words"),
    [
        (BoxPrompt((0, 0, 91, 10)), "x1 <= 90"),
        (BoxPrompt((0, 0, 10, 61)), "y1 <= 60"),
        (BoxPrompt((-1, 0, 10, 10)), "pixels"),
        (BoxPrompt((10, 0, 10, 10)), "x0 < x1"),
        (BoxPrompt((0, 10, 10, 5)), "y0 < y1"),
        (BoxPrompt((float("nan"), 0, 10, 10)), "pixels"),
        (BoxPrompt((0, 0, 10, 10), label=2), "label 1 .* or 0"),
    ],
)
def test_impossible_boxes(shared, images, box, words):
    with pytest.raises(UserError, match=words):
        ask(shared, images[:1], boxes=[[box]])


@pytest.mark.parametrize("adapter", [None, "vision/1.0"])
def test_bfloat16_is_close(shared, adapters, images, adapter):
    half = AdapterPool(adapters=adapters, device="cpu", precision="bfloat16")
    exemplars = [[BoxPrompt((9, 6, 45, 30))], []]
    for boxes in (None, exemplars):
        exact, rough = (ask(pool, images, adapter, boxes=boxes) for pool in (shared, half))
        for one, other in zip([d for row in exact for d in row], [d for row in rough for d in row], strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=0.02)
            assert not np.array_equal(one.scores, other.scores)
            assert other.scores.dtype == np.float32
    # masks and suppression work on it as well
    post = PostProcessing(threshold=0.0, nms="mask", merge=True)
    assert ask(half, images, adapter, post=post)[0][0].rles


def test_unknown_precision(base_path):
    with pytest.raises(UserError, match="float32 or bfloat16, got 'float8'"):
        AdapterPool(str(base_path), precision="float8")


def test_adapters_bring_their_base(adapters, make_adapter, base_path):
    pool = AdapterPool(adapters={"it": adapters["text"]}, device="cpu")
    assert (pool.base.name, pool.base.resolution) == (str(base_path), 112)
    assert set(pool.adapters) == {"it"}
    assert pool.adapters["it"].base_model == str(base_path)
    # those of two bases or two resolutions do not go together, unless it is said what to do
    other = make_adapter(5, ("detr_decoder",), base_model="some/other")
    with pytest.raises(UserError, match=r"differ in base_model \(first: .*, second: some/other\)"):
        AdapterPool(adapters={"first": adapters["text"], "second": other})
    large = make_adapter(6, ("detr_decoder",), resolution=168)
    with pytest.raises(UserError, match=r"differ in resolution \(small: 112, large: 168\)"):
        AdapterPool(adapters={"small": adapters["text"], "large": large})
    both = AdapterPool(adapters={"small": adapters["text"], "large": large}, resolution=168, device="cpu")
    assert both.base.resolution == 168


def test_an_adapter_of_another_base(shared, base_path, adapters, images, tmp_path):
    other = save_base(tmp_path / "other", make_sam3(seed=7))
    with pytest.raises(UserError, match="base"):
        AdapterPool(str(other), adapters={"it": adapters["text"]})


def test_an_adapter_that_is_not_there(shared, images):
    with pytest.raises(UserError, match=r"no adapter 'crack'.*text"):
        ask(shared, images, "crack")
    with pytest.raises(UserError, match="no adapter 'crack'"):
        shared.geometry_cls("crack")
