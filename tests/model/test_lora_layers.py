"""Which modules are adapted, and that the adapter behaves as PEFT promises."""

import pytest
import torch
from torch import nn

from sam3lora.config.lora import LoraSection
from sam3lora.errors import UserError
from sam3lora.model.adapter.lora_layers import LoraSettings, adapted_modules, apply_lora, count_parameters
from sam3lora.model.components import COMPONENTS, component_of
from sam3lora.model.fingerprint import fingerprint

from .conftest import largest_difference, make_inputs, outputs_of, randomise_adapter

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = dict.fromkeys(COMPONENTS, ("q_proj", "fc1")) | {
    "mask_decoder": ("q_proj",),
    "scoring": ("query_proj",),
}


def adapted(model, **settings):
    return adapted_modules(apply_lora(model, LoraSettings(**({"rank": 2} | settings))))


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_flag_changes_the_adapted_modules(random_sam3, component):
    # Every apply_to_* flag acts, and only on its own component.
    names = adapted(random_sam3, components=(component,), target_modules=TARGETS[component])
    assert names
    assert {component_of(name) for name in names} == {component}


def test_text_tower_output_projection_under_every_name(random_sam3):
    # The text tower alone calls it out_proj: o_proj, out_proj and proj all reach it.
    for target in ("o_proj", "out_proj", "proj"):
        model = apply_lora(random_sam3, LoraSettings(components=("text_encoder",), target_modules=(target,)))
        assert adapted_modules(model) == tuple(
            f"text_encoder.text_model.encoder.layers.{index}.self_attn.out_proj" for index in (0, 1)
        )
        random_sam3 = model.unload()


def test_aliases(random_sam3):
    # Names of other SAM 3 code bases give the same modules as the native ones.
    first = apply_lora(random_sam3, LoraSettings(target_modules=("qkv", "proj", "linear1", "c_proj")))
    aliased = adapted_modules(first)
    assert aliased == adapted(first.unload(), target_modules=(*ATTENTION, "fc1", "fc2"))
    assert len(aliased) == 3 * 6


def test_vision_last_layers_keeps_what_comes_after_the_vit_and_other_components(random_sam3):
    # The neck follows the ViT and stays, the patch embedding precedes it and goes.
    names = adapted(
        random_sam3,
        components=("vision_encoder", "detr_encoder"),
        vision_last_layers=1,
        target_modules=("projection", "q_proj", "proj1"),
    )
    assert not any("patch_embeddings" in name for name in names)
    assert any(name.startswith("vision_encoder.neck") for name in names)
    assert {name.split(".")[3] for name in names if "backbone" in name} == {"2"}
    assert any(name.startswith("detr_encoder") for name in names)


@pytest.mark.parametrize(
    ("components", "settings", "expected"),
    [
        # two flags give the union of both, in model order
        (
            ("detr_decoder", "detr_encoder"),
            {"target_modules": ("fc1",)},
            [f"{part}.layers.{index}.mlp.fc1" for part in ("detr_encoder", "detr_decoder") for index in (0, 1)],
        ),
        # only the last k ViT layers
        (
            ("vision_encoder",),
            {"target_modules": ("q_proj",), "vision_last_layers": 2},
            [f"vision_encoder.backbone.layers.{index}.attention.q_proj" for index in (1, 2)],
        ),
        # the name of a container stands for its layers
        (
            ("detr_decoder",),
            {"target_modules": ("box_head",)},
            [f"detr_decoder.box_head.layer{index}" for index in (1, 2, 3)],
        ),
        # the top-level text projection is used, the CLIP tower's own is not; PEFT alone would adapt both
        (("text_encoder",), {"target_modules": ("text_projection",)}, ["text_projection"]),
        # Conv2d works, without its idle instances (discarded FPN level, unused pixel decoder stage)
        (
            ("vision_encoder", "mask_decoder"),
            {"target_modules": ("proj1", "conv_layers")},
            [f"vision_encoder.neck.fpn_layers.{i}.proj1" for i in range(3)]
            + [f"mask_decoder.pixel_decoder.conv_layers.{i}" for i in range(2)],
        ),
    ],
)
def test_adapted_modules(random_sam3, components, settings, expected):
    assert list(adapted(random_sam3, components=components, **settings)) == expected


def test_geometry_encoder_without_cls_is_refused(random_sam3):
    # Without the CLS token text-only training never runs the geometry encoder.
    settings = LoraSettings(components=("geometry_encoder",), target_modules=("q_proj",))
    with pytest.raises(UserError, match="never get a gradient"):
        apply_lora(random_sam3, settings, geometry_cls=False)
    assert apply_lora(random_sam3, settings, geometry_cls=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": ()}, "no component"),
        ({"components": ("decoder",)}, "unknown component 'decoder'"),
        ({"target_modules": ()}, "target_modules"),
        ({"rank": 0}, "rank .*got 0"),
        ({"alpha": 0}, "alpha .*got 0"),
        ({"dropout": 1.0}, "dropout .*got 1.0"),
        ({"target_modules": "q_proj"}, "target_modules .*'q_proj'"),
        ({"vision_last_layers": 0}, "vision_last_layers .*got 0"),
        ({"vision_last_layers": 4}, "vision_last_layers must be between 1 and 3, got 4"),
        ({"vision_last_layers": 1, "components": ("detr_encoder",)}, "vision_last_layers has no effect"),
        # A target that LoRA cannot adapt, and one whose modules are all idle.
        ({"target_modules": ("scale_layers.0",)}, r"fpn_layers\.0\.scale_layers\.0, a ConvTranspose2d"),
        (
            {"components": ("geometry_encoder",), "target_modules": ("q_proj", "boxes_direct_project")},
            "never get a gradient",
        ),
        # A typo shows the available names, a component that matches nothing its modules.
        ({"components": ("detr_encoder",), "target_modules": ("q_porj",)}, "'q_porj' .*detr_encoder: q_proj, k_proj"),
        ({"components": ("vision_encoder", "scoring"), "target_modules": ("q_proj",)}, "apply_to_scoring.*query_proj"),
    ],
)
def test_bad_settings(random_sam3, settings, message):
    # Each is refused before PEFT changes the model.
    with pytest.raises(UserError, match=message):
        adapted(random_sam3, **settings)
    assert not adapted_modules(random_sam3)


def test_settings_from_the_lora_section():
    # Flags become components in a fixed order; whatever is not given keeps the default.
    settings = LoraSection(rank=4, apply_to_scoring=True, apply_to_vision_encoder=True).settings
    assert settings.components == ("vision_encoder", "scoring")
    assert settings == LoraSettings(rank=4, components=("vision_encoder", "scoring"))


VARIANTS = [{}, {"use_rslora": True}, {"use_dora": True}]
EVERYWHERE = {"components": COMPONENTS, "target_modules": (*ATTENTION, "fc1", "query_proj", "box_head", "proj2")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_new_equals_base_merged_equals_unmerged_and_disabled_equals_base(random_sam3, variant):
    # All in one model, Linear and Conv2d, window attention, heads. A new adapter changes nothing: B starts at zero.
    base = outputs_of(random_sam3)
    model = apply_lora(random_sam3, LoraSettings(rank=2, **EVERYWHERE, **variant)).eval()
    assert largest_difference(outputs_of(model, **make_inputs()), base) < 1e-5
    randomise_adapter(model)
    trained = outputs_of(model, **make_inputs())
    assert largest_difference(trained, base) > 1e-3
    with model.disable_adapter():
        assert largest_difference(outputs_of(model, **make_inputs()), base) == 0
    for _ in range(2):  # merging twice must not add the update twice
        model.merge_adapter()
        assert largest_difference(outputs_of(model, **make_inputs()), trained) < 1e-4
    merged = model.merge_and_unload()
    assert not adapted_modules(merged)
    assert largest_difference(outputs_of(merged), trained) < 1e-4


def test_rslora_scales_by_the_root_of_the_rank(random_sam3):
    # alpha / sqrt(r) instead of alpha / r: here 8 / 2 against 8 / 4.
    model = apply_lora(random_sam3, LoraSettings(rank=4, alpha=8, use_rslora=True))
    layer = model.base_model.model.vision_encoder.backbone.layers[0].attention.q_proj
    assert layer.scaling["default"] == pytest.approx(4.0)
    # Wrapping twice would train an adapter on top of an adapter.
    with pytest.raises(ValueError, match="already carries an adapter"):
        apply_lora(model, LoraSettings())


def test_only_the_adapter_is_trainable_and_all_of_it_learns(random_sam3):
    # Zero-initialised B must receive gradient in every adapted module.
    model = apply_lora(random_sam3, LoraSettings(rank=2, dropout=0.0, **EVERYWHERE)).train()
    out = model(**make_inputs())
    names = ("pred_logits", "pred_boxes", "pred_masks", "presence_logits", "semantic_seg")
    sum(getattr(out, name).square().sum() for name in names).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        if ".lora_B." in name:
            assert torch.any(parameter.grad), name


class Plain(nn.Module):
    """A model that is no SAM 3."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        x = self.embed(x)
        return self.block(x + self.attention(x, x, x)[0])


def test_any_torch_model():
    # Without components, matching names are enough; the table counts under "other".
    torch.manual_seed(0)
    plain = Plain()
    total = sum(p.numel() for p in plain.parameters())
    model = apply_lora(plain, LoraSettings(rank=2, components=None, target_modules=("embed", "block.2")))
    assert adapted_modules(model) == ("embed", "block.2")
    table = count_parameters(model)
    assert (table.total, table.trainable) == (total, 2 * (4 + 8) + 2 * (8 + 2))
    assert list(table.components) == ["other"]
    assert model(torch.randn(1, 3, 4)).shape == (1, 3, 2)
    # A component needs a SAM 3; an attention's out_proj is read without being called, so an adapter would do nothing.
    with pytest.raises(UserError, match="Plain has no component 'vision_encoder'"):
        adapted(Plain())
    with pytest.raises(UserError, match="'out_proj' matches no module in the model"):
        adapted(Plain(), components=None, target_modules=("out_proj",))


def test_counts_per_component(random_sam3):
    # Against a count by hand: rank x (in + out) for each adapted Linear.
    total = sum(p.numel() for p in random_sam3.parameters())
    frozen = count_parameters(random_sam3.requires_grad_(False))
    assert (frozen.trainable, frozen.adapter, frozen.modules_adapted) == (0, 0, 0)
    settings = LoraSettings(rank=4, components=("vision_encoder", "scoring"), target_modules=("fc1", "query_proj"))
    model = apply_lora(random_sam3, settings)
    table = count_parameters(model)
    vision, scoring = table.components["vision_encoder"], table.components["scoring"]
    assert (vision.modules_adapted, vision.trainable) == (3, 3 * 4 * (32 + 48))
    assert (scoring.modules_adapted, scoring.trainable) == (1, 4 * (32 + 32))
    assert table.trainable == table.adapter == vision.trainable + scoring.trainable
    assert table.total == total
    assert table.percent == pytest.approx(100 * table.trainable / total)


def test_fingerprint_is_of_the_base(random_sam3):
    # An adapter, the dtype and a reload do not change it; one changed tensor does.
    before = fingerprint(random_sam3)
    model = apply_lora(random_sam3, LoraSettings(rank=2, use_dora=True))
    assert fingerprint(model) == before
    base = model.unload()
    assert fingerprint(base.to(torch.bfloat16)) == before
    with torch.no_grad():
        base.text_projection.bias += 1
    assert fingerprint(base) != before
    with pytest.raises(ValueError, match="meta device"):
        fingerprint(nn.Linear(2, 2, device="meta"))
