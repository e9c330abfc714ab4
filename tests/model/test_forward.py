"""The staged forward against ``Sam3Model.forward``, and what it adds to it.

Shapes: ``I`` images, ``P`` prompts, ``B`` find queries, ``Q`` object queries, ``K`` queries with masks.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Sam3Model

from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.checkpointing import enable_checkpointing, worth_checkpointing
from sam3lora.model.components import COMPONENTS
from sam3lora.model.staged.forward import StagedSam3, TextFeatures, VisionFeatures

from .conftest import RESOLUTION, byte_tokenizer, noisy

NUM_QUERIES = 8
PROMPTS = ("crack", "a much longer prompt", "hole")
Outputs = dict[str, Tensor]


@pytest.fixture
def sam3(random_sam3) -> Sam3Model:
    return noisy(random_sam3)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(1))


def tokens(prompts) -> dict[str, Tensor]:
    return dict(byte_tokenizer()(list(prompts), padding="max_length", max_length=32, return_tensors="pt"))


def encode(staged: StagedSam3, num_images: int = 2, prompts=PROMPTS) -> tuple[VisionFeatures, TextFeatures]:
    encoded = tokens(prompts)
    return (
        staged.encode_images(images(num_images)),
        staged.encode_text(encoded["input_ids"], encoded["attention_mask"]),
    )


def all_masks(staged: StagedSam3, found) -> tuple[Tensor, Tensor]:
    """Masks of all object queries of all find queries (B, Q, h, w) and semantic logits (B, 1, h, w)."""
    rows = torch.arange(len(found.image_index_B))
    head = staged.mask_head(found, rows)
    b_index, q_index = rows.repeat_interleave(NUM_QUERIES), torch.arange(NUM_QUERIES).repeat(len(rows))
    masks = head.instance_logits(b_index, q_index).unflatten(0, (len(rows), NUM_QUERIES))
    return masks, head.semantic_logits(rows)[:, None]


def staged_outputs(staged: StagedSam3, image_index, text_index, num_images=2, **prompts) -> Outputs:
    """The outputs of the stock forward, by the stages, for queries (image, prompt)."""
    vision, text = encode(staged, num_images)
    found = staged.detect(vision, text, torch.tensor(image_index), torch.tensor(text_index), **prompts)
    masks, semantic = all_masks(staged, found)
    center, half = found.boxes_cxcywh_LBQ4[-1][..., :2], found.boxes_cxcywh_LBQ4[-1][..., 2:] / 2
    return {
        "pred_logits": found.logits_LBQ[-1],
        "pred_boxes": torch.cat([center - half, center + half], -1),
        "presence_logits": found.presence_logits_LB[-1][:, None],
        "pred_masks": masks,
        "semantic_seg": semantic,
    }


def stock_outputs(model: Sam3Model, image_index, text_index, num_images=2, **boxes) -> Outputs:
    encoded = tokens([PROMPTS[index] for index in text_index])
    out = model(pixel_values=images(num_images)[list(image_index)], **encoded, **boxes)
    return {
        name: getattr(out, name)
        for name in ("pred_logits", "pred_boxes", "presence_logits", "pred_masks", "semantic_seg")
    }


def padding_box(batch: int) -> dict[str, Tensor]:
    """What makes the stock forward add the geometry CLS token to a text prompt."""
    return {
        "input_boxes": torch.full((batch, 1, 4), -10.0),
        "input_boxes_labels": torch.full((batch, 1), -10),
    }


def assert_close(actual: Outputs, expected: Outputs, tolerance: float = 1e-5) -> None:
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        error, scale = (actual[name] - value).abs().max().item(), max(1.0, value.abs().max().item())
        assert error <= tolerance * scale, f"{name} is off by {error:.3g}"


QUERIES = {
    "one prompt an image": ((0, 1), (0, 2), 2),
    "several prompts on one image": ((0, 0, 0), (0, 1, 2), 1),
    "several images, prompts in any order": ((1, 0, 2, 1), (2, 0, 2, 1), 3),
}


@pytest.mark.parametrize("queries", QUERIES.values(), ids=QUERIES)
@torch.no_grad()
def test_text_prompts_equal_stock(sam3, queries):
    # For any mix of images and prompts, without the CLS token as the stock forward, and with it as stock transformers
    # beside one padding box; and the token matters.
    without = stock_outputs(sam3, *queries)
    assert_close(staged_outputs(StagedSam3(sam3, geometry_cls=False), *queries), without)
    with_cls = staged_outputs(StagedSam3(sam3, geometry_cls=True), *queries)
    assert_close(with_cls, stock_outputs(sam3, *queries, **padding_box(len(queries[0]))))
    assert (with_cls["pred_logits"] - without["pred_logits"]).abs().max() > 1e-3


@pytest.mark.parametrize("geometry_cls", [True, False])
@torch.no_grad()
def test_boxes_equal_stock(sam3, geometry_cls):
    # Positive, negative and padding boxes give the stock numbers; boxes bring the CLS token whatever the setting.
    boxes = torch.tensor(
        [[[0.5, 0.5, 0.3, 0.4], [0.2, 0.3, 0.1, 0.2]], [[0.6, 0.4, 0.5, 0.5], [-10.0] * 4], [[-10.0] * 4] * 2]
    )
    labels = torch.tensor([[1, 0], [1, -10], [-10, -10]])
    queries = ((0, 1, 0), (0, 1, 2))
    actual = staged_outputs(
        StagedSam3(sam3, geometry_cls=geometry_cls), *queries, boxes_cxcywh_BN4=boxes, box_labels_BN=labels
    )
    assert_close(actual, stock_outputs(sam3, *queries, input_boxes=boxes, input_boxes_labels=labels))
    # The label reaches the model: the same box as a negative gives another answer.
    swapped = staged_outputs(StagedSam3(sam3), *queries, boxes_cxcywh_BN4=boxes, box_labels_BN=labels.clamp(max=0))
    assert (swapped["pred_logits"] - actual["pred_logits"]).abs().max() > 1e-3
    # Without labels boxes are positive, as in the stock forward.
    unlabelled = staged_outputs(StagedSam3(sam3), (0,), (1,), 1, boxes_cxcywh_BN4=boxes[:1, :1])
    assert_close(unlabelled, stock_outputs(sam3, (0,), (1,), 1, input_boxes=boxes[:1, :1]))


@torch.no_grad()
def test_presence_is_clamped_as_in_stock(sam3):
    # A presence logit far outside +-10 comes out as the stock model's 10.
    sam3.detr_decoder.presence_head.layer3.bias.fill_(50.0)
    queries = ((0, 1), (0, 2))
    actual = staged_outputs(StagedSam3(sam3, geometry_cls=False), *queries)
    assert_close(actual, stock_outputs(sam3, *queries))
    assert (actual["presence_logits"] == 10).all()


def test_presence_beyond_its_limits_keeps_its_gradient(sam3):
    # A word that the model firmly rejects has the limit in every answer, but its loss can still teach that it is there.
    sam3.detr_decoder.presence_head.layer3.bias.data.fill_(-50.0)
    staged, index = StagedSam3(sam3), torch.tensor([0])
    found = staged.detect(*encode(staged), index, index)
    assert (found.presence_logits_LB == -10).all()
    assert (found.raw_presence_logits_LB < -40).all()
    weight = sam3.detr_decoder.presence_head.layer3.weight.requires_grad_()
    learned, raw = found.presence_to_learn_LB(), found.raw_presence_logits_LB
    torch.testing.assert_close(learned, -10 + 0.1 * (raw + 10))
    loss = torch.nn.functional.softplus(-learned).sum()  # of "the word is there"
    [gradient] = torch.autograd.grad(loss, weight)
    assert gradient.any()
    # within the limits all three are the same
    sam3.detr_decoder.presence_head.layer3.bias.data.fill_(0.0)
    found = staged.detect(*encode(staged), index, index)
    assert torch.equal(found.presence_to_learn_LB(), found.raw_presence_logits_LB)
    assert torch.equal(found.presence_logits_LB, found.raw_presence_logits_LB)


@torch.no_grad()
def test_every_decoder_layer_is_returned(sam3):
    # Layer k's outputs are the final ones of a model cut off after layer k.
    staged = StagedSam3(sam3)
    vision, text = encode(staged)
    index = torch.tensor([0, 1])
    found = staged.detect(vision, text, index, index)
    last = sam3.detr_decoder.layers.pop(1)
    cut = staged.detect(vision, text, index, index)
    sam3.detr_decoder.layers.append(last)
    assert (len(found.logits_LBQ), len(cut.logits_LBQ)) == (2, 1)
    for name in ("logits_LBQ", "boxes_cxcywh_LBQ4", "presence_logits_LB"):
        torch.testing.assert_close(getattr(found, name)[:1], getattr(cut, name), atol=1e-6, rtol=0)
        assert (getattr(found, name)[0] - getattr(found, name)[1]).abs().max() > 1e-4, name


@torch.no_grad()
def test_one_to_many_branch_leaves_one_to_one_unchanged(sam3):
    # Training with the one-to-many branch trains the same one-to-one predictions that inference uses.
    staged = StagedSam3(sam3)
    vision, text = encode(staged)
    index = (torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]))
    alone, both = (staged.detect(vision, text, *index, one_to_many=flag) for flag in (False, True))
    for name in ("logits_LBQ", "boxes_cxcywh_LBQ4", "presence_logits_LB"):
        torch.testing.assert_close(getattr(both, name), getattr(alone, name), atol=1e-5, rtol=0)
    for mine, expected in zip(all_masks(staged, both), all_masks(staged, alone), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)
    assert alone.logits_o2m_LBQ is alone.boxes_o2m_LBQ4 is None
    # The one definition of a score, of the last layer.
    scores = alone.logits_LBQ[-1].sigmoid() * alone.presence_logits_LB[-1].sigmoid()[:, None]
    torch.testing.assert_close(alone.scores_BQ(), scores)
    assert both.logits_o2m_LBQ.shape == both.logits_LBQ.shape
    # The other half takes no part in self-attention, so it is no copy of the first.
    assert (both.logits_o2m_LBQ - both.logits_LBQ).abs().max() > 1e-3


@torch.no_grad()
def test_one_to_many_queries_differ_by_self_attention_only_and_have_masks_of_their_own(sam3):
    staged = StagedSam3(sam3)
    vision, text = encode(staged)
    index = torch.tensor([0, 1])
    found = staged.detect(vision, text, index, index, one_to_many=True)
    # A mask of the branch "o2m" comes from the hidden state of the one-to-many query, on the same pixels.
    head = staged.mask_head(found, index)
    wanted = (torch.tensor([1, 0]), torch.tensor([3, 5]))
    masks = head.instance_logits(*wanted, branch="o2m")
    found.hidden_BQC["o2o"] = found.hidden_BQC["o2m"]
    torch.testing.assert_close(masks, head.instance_logits(*wanted))
    assert (masks - head.instance_logits(wanted[0].flip(0), wanted[1])).abs().max() > 1e-3
    # Where self-attention adds nothing, both halves are the same: same embeddings, references and cross-attention.
    for layer in sam3.detr_decoder.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.self_attn.o_proj.bias.zero_()
    found = staged.detect(vision, text, index, index, one_to_many=True)
    torch.testing.assert_close(found.logits_o2m_LBQ, found.logits_LBQ, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.boxes_o2m_LBQ4, found.boxes_cxcywh_LBQ4, atol=1e-5, rtol=0)


@torch.no_grad()
def test_masks_of_wanted_queries_only(sam3):
    # Any pairs in any order, repeated, of a subset of the find queries, equal the stock model's full set of masks.
    queries = ((0, 1, 0, 1), (0, 1, 2, 2))
    stock = stock_outputs(sam3, *queries, **padding_box(4))
    staged = StagedSam3(sam3)
    vision, text = encode(staged)
    found = staged.detect(vision, text, *(torch.tensor(index) for index in queries))
    head = staged.mask_head(found, torch.tensor([3, 1]))
    b_index, q_index = torch.tensor([1, 3, 1, 3, 1, 1]), torch.tensor([7, 0, 2, 0, 7, 3])
    actual = {"pred_masks": head.instance_logits(b_index, q_index), "semantic_seg": head.semantic_logits(b_index)}
    expected = {
        "pred_masks": stock["pred_masks"][b_index, q_index],
        "semantic_seg": stock["semantic_seg"][b_index, 0],
    }
    assert_close(actual, expected)
    # No pair at all is an empty answer of the right size.
    empty = torch.zeros(0, dtype=torch.long)
    assert head.instance_logits(empty, empty).shape == (0, *stock["pred_masks"].shape[2:])


def gradients(model: Sam3Model, outputs: Outputs) -> dict[str, Tensor]:
    """Of a fixed scalar of the outputs, by parameter; zeros where there is none."""
    generator = torch.Generator().manual_seed(5)
    scalar = sum((value * torch.randn(value.shape, generator=generator)).mean() for value in outputs.values())
    model.zero_grad(set_to_none=True)
    scalar.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error, bound = (actual[name] - gradient).abs().max().item(), gradient.abs().max().item()
        assert error <= tolerance * max(bound, 1e-3 * largest), f"{name} is off by {error:.3g} of {bound:.3g}"


@pytest.mark.parametrize("geometry_cls", [True, False])
def test_gradients_equal_stock(sam3, geometry_cls):
    # Every parameter gets the gradient of the stock model's autograd: where gradient stops between decoder layers
    # (a box is refined from the one before, undetached, while the next layer's queries see it detached) is the same.
    queries = ((0, 1, 0), (0, 1, 2))
    boxes = padding_box(3) if geometry_cls else {}
    expected = gradients(sam3, stock_outputs(sam3, *queries, **boxes))
    actual = gradients(sam3, staged_outputs(StagedSam3(sam3, geometry_cls=geometry_cls), *queries))
    reached = [name for name, gradient in expected.items() if gradient.any()]
    assert any(name.startswith("vision_encoder.backbone") for name in reached)
    assert any(name.startswith("detr_decoder.box_head") for name in reached)
    assert any(name.startswith("geometry_encoder") for name in reached) == geometry_cls
    assert_gradients_close(actual, expected, 1e-4)


@pytest.fixture
def counted_calls(sam3) -> Counter:
    """Calls of one module that each component runs, by component."""
    calls: Counter = Counter()
    watched = {
        "vision_encoder": sam3.vision_encoder.backbone.layers[1].mlp,
        "text_encoder": sam3.text_encoder.text_model.encoder.layers[0].mlp,
        "geometry_encoder": sam3.geometry_encoder.layers[0],
        "detr_encoder": sam3.detr_encoder.layers[0].mlp,
        "detr_decoder": sam3.detr_decoder.layers[0].mlp,
        "mask_decoder": sam3.mask_decoder.pixel_decoder.conv_layers[0],
        "scoring": sam3.dot_product_scoring.text_mlp,
    }
    for component, module in watched.items():
        module.register_forward_pre_hook(lambda *_, component=component: calls.update([component]))
    return calls


@pytest.mark.parametrize("component", COMPONENTS)
def test_checkpointing_recomputes_and_keeps_gradients(sam3, counted_calls, component):
    # Each component's name makes its layers run again in the backward pass, and no other's; gradients stay.
    sam3.train()
    queries = ((0, 1, 0), (0, 1, 2))
    expected = gradients(sam3, staged_outputs(StagedSam3(sam3), *queries))
    assert set(counted_calls.values()) == {1}
    counted_calls.clear()
    enable_checkpointing(sam3, [component])
    actual = gradients(sam3, staged_outputs(StagedSam3(sam3, checkpointing=[component]), *queries))
    assert counted_calls == Counter(dict.fromkeys(COMPONENTS, 1)) + Counter([component])
    assert_gradients_close(actual, expected, 1e-4)


def test_what_no_prompt_changes_is_done_once_an_image(sam3, counted_calls):
    # Five queries on two images in two chunks: the encoder's first self-attention and the CLS token see two rows once,
    # and outputs and gradients are those of chunks that do it themselves.
    rows, cls_rows = [], []
    sam3.geometry_encoder.layers[0].register_forward_pre_hook(
        lambda _, arguments, keywords: cls_rows.append(len(keywords["prompt_feats"])), with_kwargs=True
    )
    sam3.detr_encoder.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, arguments: rows.append(len(arguments[0]))
    )
    staged = StagedSam3(sam3)
    vision, text = encode(staged)
    chunks = [((0, 0, 1), (0, 1, 0)), ((1, 1), (1, 2))]

    def outputs(features: VisionFeatures) -> list[Tensor]:
        found = [staged.detect(features, text, torch.tensor(image), torch.tensor(word)) for image, word in chunks]
        return [one for each in found for one in (each.logits_LBQ, each.boxes_cxcywh_LBQ4, *all_masks(staged, each))]

    expected = outputs(vision)
    assert rows == [2, 2]
    rows.clear()
    cls_rows.clear()
    actual = outputs(staged.prepare(vision))
    assert rows == cls_rows == [2]
    assert counted_calls["vision_encoder"] == counted_calls["text_encoder"] == 1
    torch.testing.assert_close(actual, expected)
    watched = [sam3.detr_encoder.layers[0].self_attn.q_proj.weight, sam3.geometry_encoder.cls_embed.weight]
    gradients = [
        torch.autograd.grad(sum(one.square().sum() for one in ways), watched, retain_graph=True)
        for ways in (actual, expected)
    ]
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_stages_read_no_values(sam3):
    # What asks a tensor for its values makes the host wait for a GPU.
    class NoValues(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            assert "_local_scalar_dense" not in str(function), "a value was read"
            return function(*arguments, **(keywords or {}))

    staged = StagedSam3(sam3)
    vision, text = encode(staged)
    index = torch.tensor([0, 1, 1])
    with NoValues():
        found = staged.detect(staged.prepare(vision), text, index, index, one_to_many=True)
        head = staged.mask_head(found, torch.tensor([0, 2]))
        head.instance_logits(torch.tensor([0, 2]), torch.tensor([1, 4]), "o2m")
        head.semantic_logits(torch.tensor([2]))


@torch.no_grad()
def test_bfloat16_autocast_keeps_boxes_in_float32(sam3):
    # Boxes are as fine as float32 and near those of full precision; masks asked for after the block stay in bfloat16.
    staged = StagedSam3(sam3)
    index = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2])
    exact = staged.detect(*encode(staged), *index, one_to_many=True)
    offset_types = set()
    sam3.detr_decoder.box_head.register_forward_hook(lambda *arguments: offset_types.add(arguments[-1].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = staged.detect(*encode(staged), *index, one_to_many=True)
        head = staged.mask_head(found, torch.arange(3))
    for boxes in (found.boxes_cxcywh_LBQ4, found.boxes_o2m_LBQ4):
        assert boxes.dtype == torch.float32
    assert offset_types == {torch.float32}
    torch.testing.assert_close(found.boxes_cxcywh_LBQ4, exact.boxes_cxcywh_LBQ4, atol=0.03, rtol=0)
    torch.testing.assert_close(found.scores_BQ(), exact.scores_BQ(), atol=0.05, rtol=0)
    masks = head.instance_logits(torch.tensor([0, 2]), torch.tensor([1, 4]))
    expected = staged.mask_head(exact, torch.arange(3)).instance_logits(torch.tensor([0, 2]), torch.tensor([1, 4]))
    assert masks.dtype == torch.bfloat16
    assert masks.isfinite().all()
    assert (masks.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_bfloat16_gradients_are_finite(sam3):
    # The backward pass through autocast and checkpointing reaches every component.
    staged = StagedSam3(sam3, checkpointing=COMPONENTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = staged_outputs(staged, (0, 1), (0, 1))
    for name, gradient in gradients(sam3, outputs).items():
        assert gradient.isfinite().all(), name


def test_a_tower_begins_with_the_first_layer_that_learns(random_sam3):
    layers = random_sam3.vision_encoder.backbone.layers
    last = apply_lora(random_sam3, LoraSettings(rank=2, components=("vision_encoder",), vision_last_layers=2))
    assert enable_checkpointing(last, COMPONENTS) == 2
    assert [layer.gradient_checkpointing for layer in layers] == [False, True, True]
    assert enable_checkpointing(last, ["text_encoder"]) == 0
    assert [layer.gradient_checkpointing for layer in layers] == [False, False, False]
    # All of them where the patch embedding learns.
    last.unload()
    random_sam3.requires_grad_(False)
    random_sam3.vision_encoder.backbone.embeddings.position_embeddings.requires_grad_(True)
    assert enable_checkpointing(random_sam3, COMPONENTS) == len(layers)


def test_components_before_the_first_that_learns_are_left_out(random_sam3):
    random_sam3.requires_grad_(False)
    assert worth_checkpointing(random_sam3, COMPONENTS) == ()
    random_sam3.detr_decoder.requires_grad_(True)
    assert worth_checkpointing(random_sam3, COMPONENTS) == ("detr_decoder", "mask_decoder", "scoring")
    assert worth_checkpointing(random_sam3, ["detr_encoder"]) == ()
    random_sam3.vision_encoder.neck.requires_grad_(True)
    behind = ("vision_encoder", "geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder", "scoring")
    assert worth_checkpointing(random_sam3, COMPONENTS) == behind
