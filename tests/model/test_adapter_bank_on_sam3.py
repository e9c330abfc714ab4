"""A whole SAM 3: a batch of rows with different adapters against PEFT one by one."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sam3lora.model.adapter.bank import AdapterBank
from sam3lora.model.adapter.folder import save_adapter
from sam3lora.model.adapter.weights import read_adapter_weights
from sam3lora.model.components import COMPONENTS
from sam3lora.model.staged.forward import StagedSam3

from .conftest import RESOLUTION, byte_tokenizer, hooked, make_sam3, noisy

DECODER = [f"{head}.layer{n}" for head in ("box_head", "presence_head", "ref_point_head") for n in (1, 2)]
ADAPTERS = {
    "vision": {
        "r": 2,
        "target_modules": r"vision_encoder\..*(q_proj|v_proj|o_proj|fc1|projection|proj1|proj2)",
        "rank_pattern": {"q_proj": 5, "proj1": 1},
    },
    "text and geometry": {
        "r": 3,
        "target_modules": r"text_projection|(text|geometry)_encoder\..*(k_proj|q_proj|out_proj|fc2|boxes_.*project)",
        "use_rslora": True,
    },
    "detector": {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": [*DECODER, "box_head.layer3", "box_rpb_embed_x.layer1", "box_rpb_embed_y.layer2", "fc1"],
        "alpha_pattern": {"box_head.layer1": 16},
    },
    "masks and scores": {
        "r": 2,
        "target_modules": r"mask_decoder\..*(q_proj|o_proj|layers\.\d|conv_layers\.\d|projection)"
        r"|dot_product_scoring\.(query_proj|text_proj|text_mlp\.layer1)",
    },
    "everything, DoRA": {"r": 2, "use_dora": True, "target_modules": "EVERYTHING"},
}


def config_of(name: str, model: nn.Module) -> LoraConfig:
    settings = dict(ADAPTERS[name])
    if settings["target_modules"] == "EVERYTHING":
        unused = "text_encoder.text_projection"
        kinds = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n != unused]
        settings["target_modules"] = kinds
    return LoraConfig(**settings)


def inject(model: nn.Module, name: str, seed: int) -> nn.Module:
    """A copy of the model with PEFT's layers, and an adapter that changes every output."""
    peft_model = get_peft_model(deepcopy(model), config_of(name, model)).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in peft_model.named_parameters():
        if ".lora_B." in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        elif "magnitude" in key:
            parameter.data = parameter.data * (0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))
    return peft_model


def noisy_sam3(num_layers: int) -> nn.Module:
    """In float64, which shows any mistake."""
    detr = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "dropout": 0.0}
    return noisy(make_sam3(detr_decoder_config=detr | {"num_layers": num_layers, "num_queries": 8}).double())


class Batch:
    """One image, one prompt and some exemplar boxes for each row."""

    def __init__(self, num_rows: int, num_boxes: int | None) -> None:
        generator = torch.Generator().manual_seed(1)
        prompts = [f"prompt {'x' * row}" for row in range(num_rows)]
        encoded = byte_tokenizer()(prompts, padding="max_length", max_length=32, return_tensors="pt")
        self.ids, self.attention = encoded["input_ids"], encoded["attention_mask"]
        self.pixels = torch.randn(num_rows, 3, RESOLUTION, RESOLUTION, generator=generator, dtype=torch.float64)
        self.boxes = None if num_boxes is None else 0.2 + 0.5 * torch.rand(num_rows, num_boxes, 4, generator=generator)

    def run(self, model: nn.Module, rows: slice) -> dict[str, Tensor]:
        """Everything the staged forward says about some rows; rows on axis 0."""
        staged = StagedSam3(model)
        with torch.no_grad():
            vision = staged.encode_images(self.pixels[rows])
            text = staged.encode_text(self.ids[rows], self.attention[rows])
            index = torch.arange(len(self.pixels[rows]))
            found = staged.detect(
                vision, text, index, index, boxes_cxcywh_BN4=None if self.boxes is None else self.boxes[rows]
            )
            head = staged.mask_head(found, index)
            num_queries = found.logits_LBQ.shape[-1]
            q_index = torch.arange(num_queries).repeat(len(index))
            masks = head.instance_logits(index.repeat_interleave(num_queries), q_index)
            return {
                "logits": found.logits_LBQ.transpose(0, 1),
                "boxes": found.boxes_cxcywh_LBQ4.transpose(0, 1),
                "presence": found.presence_logits_LB.transpose(0, 1),
                "masks": masks.unflatten(0, (len(index), num_queries)),
                "semantic": head.semantic_logits(index),
            }


def largest_relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    differences = [(found[name] - expected[name]).abs().max() / expected[name].abs().max() for name in expected]
    return torch.stack(differences).max().item()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """Number of layers -> (base, PEFT models by name, adapters as the bank takes them), made once."""
    return {}


def served(folders, tmp_path, num_layers):
    if num_layers not in folders:
        base = noisy_sam3(num_layers)
        peft_models = {name: inject(base, name, seed) for seed, name in enumerate(ADAPTERS)}
        weights = {}
        for number, (name, model) in enumerate(peft_models.items()):
            folder = save_adapter(model, tmp_path / str(number))
            weights[name] = read_adapter_weights(folder, base)
        folders[num_layers] = base, peft_models, weights
    return folders[num_layers]


@pytest.mark.parametrize("num_boxes", [None, 2])
@pytest.mark.parametrize(
    ("num_layers", "order"),
    [
        (2, ["vision", None, "everything, DoRA", "text and geometry", "detector", "masks and scores"]),
        (4, ["detector", "masks and scores", None, "everything, DoRA"]),  # as many rows as decoder layers
        (2, ["masks and scores", "detector"]),
        (2, ["vision", "vision", "vision"]),
    ],
)
def test_mixed_batches_equal_peft_one_by_one(folders, tmp_path, monkeypatch, num_layers, order, num_boxes):
    # Windowed attention, convolutions, text, boxes, box_head, query_proj and masks, in one forward.
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # SAM 3 keeps boxes in float32, and rounds there
    base, peft_models, weights = served(folders, tmp_path, num_layers)
    slot_of = {name: slot for slot, name in enumerate(ADAPTERS)}
    bank = AdapterBank(base, len(ADAPTERS))
    for name, slot in slot_of.items():
        bank.put(slot, weights[name])
    batch = Batch(len(order), num_boxes)
    with bank.rows([slot_of.get(name) for name in order]):
        found = batch.run(base, slice(None))
    for slot in slot_of.values():
        bank.clear(slot)
    assert hooked(base) == set()
    for row, name in enumerate(order):
        alone = slice(row, row + 1)
        plain = batch.run(base, alone)
        expected = plain if name is None else batch.run(peft_models[name].get_base_model(), alone)
        assert largest_relative({key: value[alone] for key, value in found.items()}, expected) < 1e-12, name
        if name is not None:
            assert largest_relative(plain, expected) > 1e-3  # the adapter does something


def test_every_kind_of_module_is_covered(folders, tmp_path):
    # The adapters above touch every component, and the modules that PEFT cannot mix.
    _, _, weights = served(folders, tmp_path, 2)
    assert frozenset().union(*(adapter.components for adapter in weights.values())) == set(COMPONENTS)
    plain = {module for name, adapter in weights.items() if "DoRA" not in name for module in adapter.modules}
    for module in (
        "vision_encoder.backbone.embeddings.patch_embeddings.projection",
        "vision_encoder.neck.fpn_layers.0.proj2",
        "geometry_encoder.boxes_pool_project",
        "geometry_encoder.boxes_direct_project",
        "text_projection",
        "detr_decoder.box_head.layer3",
        "detr_decoder.ref_point_head.layer1",
        "mask_decoder.instance_projection",
        "mask_decoder.pixel_decoder.conv_layers.0",
        "mask_decoder.mask_embedder.layers.0",
        "dot_product_scoring.query_proj",
    ):
        assert module in plain
