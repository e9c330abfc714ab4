"""One base under many adapters answers as each of them would alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sam3lora.engine.detect import detect_prompts
from sam3lora.engine.detections import BoxPrompt, Instances, PostProcessing
from sam3lora.engine.segmenter import Segmenter
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import save_adapter
from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.loading import load_base
from sam3lora.model.staged.forward import StagedSam3
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
def shared(adapters) -> Segmenter:
    return Segmenter(adapters=adapters, device="cpu")


def ask(segmenter: Segmenter, images, adapter=None, prompts=PROMPTS, **options) -> list[list[Instances]]:
    return segmenter.detect(segmenter.encode(images), prompts, adapter=adapter, **options)


def assert_same(first: list[list[Instances]], second: list[list[Instances]], atol: float = 1e-5) -> None:
    for one, other in zip((i for row in first for i in row), (i for row in second for i in row), strict=True):
        assert (one.prompt, one.size_hw, len(one)) == (other.prompt, other.size_hw, len(other))
        np.testing.assert_allclose(one.presence, other.presence, atol=atol)
        np.testing.assert_allclose(one.scores, other.scores, atol=atol)
        np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=200 * atol)
        # logits near 0 may fall on either side: all but a few pixels agree
        assert (coco_mask.decode(one.masks) != coco_mask.decode(other.masks)).mean() < max(1e-3, 2 * atol)


def differ(first: list[list[Instances]], second: list[list[Instances]]) -> bool:
    return not np.allclose(first[0][0].scores, second[0][0].scores, atol=1e-4)


def test_no_images_and_no_prompts(shared, images):
    assert ask(shared, []) == []
    assert ask(shared, images, prompts=[]) == [[], []]
    assert ask(shared, [], "text", boxes=[]) == []


def test_the_base_is_untouched_by_its_adapters(shared, images, base_path):
    plain = Segmenter(str(base_path), device="cpu")
    expected = ask(plain, images)
    ask(shared, images, "vision/1.0")
    assert_same(ask(shared, images), expected, atol=1e-7)
    # and is what the stages give without any Segmenter
    base = load_base(str(base_path))
    pixel_values = plain.encode(images).pixel_values_ICHW
    alone = detect_prompts(StagedSam3(base.model), base.tokenizer, pixel_values, PROMPTS, sizes_hw=SIZES)
    assert_same(expected, alone, atol=1e-7)


@pytest.mark.parametrize("label", ["vision/1.0", "text", "detector", "no cls"])
def test_each_adapter_is_as_if_alone(shared, images, adapters, label):
    encoded = shared.encode(images)
    # all of them are asked of the same images, one after the other, in this order and back
    answers = {name: shared.detect(encoded, PROMPTS, adapter=name) for name in [*adapters, None]}
    alone = ask(Segmenter(adapters={"it": adapters[label]}, device="cpu"), images, "it")
    assert_same(answers[label], alone)
    assert_same(shared.detect(encoded, PROMPTS, adapter=label), alone)
    for name, answer in answers.items():
        assert name == label or differ(answer, alone)


def test_vision_and_text_run_once_for_all_who_share_them(adapters, images, monkeypatch):
    seen = {"images": [], "text": []}
    encode_images, encode_text = StagedSam3.encode_images, StagedSam3.encode_text

    def count_images(self, pixels):
        seen["images"].append(len(pixels))
        return encode_images(self, pixels)

    def count_text(self, ids, mask):
        seen["text"].append(len(ids))
        return encode_text(self, ids, mask)

    monkeypatch.setattr(StagedSam3, "encode_images", count_images)
    monkeypatch.setattr(StagedSam3, "encode_text", count_text)
    segmenter = Segmenter(adapters=adapters, device="cpu")
    assert [label for label in adapters if segmenter.shares_vision(label)] == ["text", "detector", "no cls"]
    encoded = segmenter.encode(images)
    for label in ("detector", None, "text", "no cls", "detector"):
        segmenter.detect(encoded, PROMPTS, adapter=label)
    # one vision pass of both images; the text adapter has words of its own
    assert seen == {"images": [2], "text": [2, 2]}
    for _ in range(2):
        segmenter.detect(encoded, [*PROMPTS, "leaf"], adapter="vision/1.0")
    assert seen == {"images": [2, 2], "text": [2, 2, 1]}
    segmenter.detect(segmenter.encode(images[:1]), PROMPTS)
    assert seen == {"images": [2, 2, 1], "text": [2, 2, 1]}


def test_the_cls_token_follows_each_adapter(shared, adapters, images):
    assert [shared.geometry_cls(label) for label in (None, "detector", "no cls")] == [True, True, False]
    # one setting for all overrules what they were trained with
    for wanted in (True, False):
        told = Segmenter(adapters=adapters, geometry_cls=wanted, device="cpu")
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
            pixel_values=shared.encode(images[:1]).pixel_values_ICHW,
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


def test_boxes_for_each_image(shared, images):
    with pytest.raises(ValueError, match="each of 2 images, got 1"):
        ask(shared, images, boxes=[[BoxPrompt((0, 0, 10, 10))]])


@pytest.mark.parametrize("adapter", [None, "vision/1.0"])
def test_bfloat16_is_close(shared, adapters, images, adapter):
    half = Segmenter(adapters=adapters, device="cpu", precision="bfloat16")
    exemplars = [[BoxPrompt((9, 6, 45, 30))], []]
    for boxes in (None, exemplars):
        exact, rough = (ask(segmenter, images, adapter, boxes=boxes) for segmenter in (shared, half))
        for one, other in zip((i for row in exact for i in row), (i for row in rough for i in row), strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=0.02)
            assert not np.array_equal(one.scores, other.scores)
            assert other.scores.dtype == np.float32
    # masks and suppression work on it as well
    post = PostProcessing(threshold=0.0, nms="mask", merge=True)
    assert ask(half, images, adapter, post=post)[0][0].masks


def test_unknown_precision(base_path):
    with pytest.raises(UserError, match="float32 or bfloat16, got 'float8'"):
        Segmenter(str(base_path), precision="float8")


def test_adapters_bring_their_base(adapters, make_adapter, base_path):
    segmenter = Segmenter(adapters={"it": adapters["text"]}, device="cpu")
    assert (segmenter.base.name, segmenter.base.resolution) == (str(base_path), 112)
    assert set(segmenter.adapters) == {"it"}
    assert segmenter.adapters["it"].base_model == str(base_path)
    # those of two bases or two resolutions do not go together, unless it is said what to do
    other = make_adapter(5, ("detr_decoder",), base_model="some/other")
    with pytest.raises(UserError, match=r"differ in base_model \(first: .*, second: some/other\)"):
        Segmenter(adapters={"first": adapters["text"], "second": other})
    large = make_adapter(6, ("detr_decoder",), resolution=168)
    with pytest.raises(UserError, match=r"differ in resolution \(small: 112, large: 168\)"):
        Segmenter(adapters={"small": adapters["text"], "large": large})
    both = Segmenter(adapters={"small": adapters["text"], "large": large}, resolution=168, device="cpu")
    assert both.base.resolution == 168


def test_an_adapter_of_another_base(shared, base_path, adapters, images, tmp_path):
    other = save_base(tmp_path / "other", make_sam3(seed=7))
    with pytest.raises(UserError, match="base"):
        Segmenter(str(other), adapters={"it": adapters["text"]})
    # the segmenter goes on without it
    segmenter = Segmenter(str(other), device="cpu")
    before = ask(segmenter, images)
    with pytest.raises(UserError, match="base"):
        segmenter.add_adapter("it", adapters["text"])
    assert segmenter.adapters == {}
    assert_same(ask(segmenter, images), before, atol=1e-7)


def test_two_adapters_of_one_name(base_path, adapters):
    segmenter = Segmenter(str(base_path), adapters={"it": adapters["text"]}, device="cpu")
    with pytest.raises(UserError, match="two adapters are called 'it'"):
        segmenter.add_adapter("it", adapters["detector"])


def test_an_adapter_that_is_not_there(shared, images):
    with pytest.raises(UserError, match=r"no adapter 'crack'.*text"):
        ask(shared, images, "crack")
    with pytest.raises(UserError, match="no adapter 'crack'"):
        shared.shares_vision("crack")
    with pytest.raises(UserError, match="no adapter 'crack'"):
        shared.geometry_cls("crack")
