"""Reference cases as tensors, the criterion's answer to them, and the comparison of both."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sam3lora.losses import Criterion, LossSection, Pairs, Predictions, Targets

PADDINGS = {"pad200": 200, "padnone": None}
INPUTS = [
    "logits",
    "boxes_cxcywh",
    "presence_logits",
    "logits_o2m",
    "boxes_o2m",
    "masks",
    "masks_o2m",
    "semantic_logits",
]
PER_LAYER = ["loss_bbox", "loss_giou", "loss_ce", "loss_bbox_o2m", "loss_giou_o2m", "loss_ce_o2m", "presence_loss"]
FINAL = ["loss_mask", "loss_dice", "loss_mask_o2m", "loss_dice_o2m", "loss_semantic_seg", "loss_semantic_dice"]


def indices_of(pairs: Pairs) -> list[torch.Tensor]:
    """One (m, 3) tensor of (query, object query, packed target) for each layer."""
    columns = torch.stack([pairs.query_M, pairs.object_query_M, pairs.target_M], dim=1)
    return list(columns.split(pairs.num_per_layer))


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Folder of the numeric reference cases."""
    return Path(os.environ.get("SAM3LORA_REFERENCE_DIR", Path(__file__).parents[1] / "reference"))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


@pytest.fixture(scope="session")
def pure(reference_dir):
    """Arrays of the single-function cases."""
    return _tensors(reference_dir / "pure_functions.npz")


@pytest.fixture
def load_case(reference_dir):
    """Name to a case: `expected` arrays, `leaves` that collect gradients, and `targets`."""

    def load(name: str) -> SimpleNamespace:
        arrays = _tensors(reference_dir / f"loss_{name}.npz")
        leaves = {key: arrays[key].clone().requires_grad_() for key in INPUTS}
        targets = Targets(arrays["tgt_num"], arrays["tgt_boxes_cxcywh"], arrays["tgt_masks"], arrays["tgt_mask_valid"])
        return SimpleNamespace(expected=arrays, leaves=leaves, targets=targets)

    return load


@pytest.fixture
def make_predictions():
    """Leaf tensors to `Predictions`, of some of the queries, with or without the mask branches."""

    def make(leaves, queries: slice = slice(None), masks: bool = True, dtype=torch.float32) -> Predictions:
        part = {name: leaf.to(dtype) for name, leaf in leaves.items()}
        mask_leaves = {"o2o": part["masks"][queries], "o2m": part["masks_o2m"][queries]}
        semantic = part["semantic_logits"][queries, 0]
        return Predictions(
            part["logits"][:, queries],
            part["boxes_cxcywh"][:, queries],
            part["presence_logits"][:, queries, 0],
            part["logits_o2m"][:, queries],
            part["boxes_o2m"][:, queries],
            mask_logits=(lambda branch, b, q: mask_leaves[branch][b, q]) if masks else None,
            semantic_logits=(lambda b: semantic[b]) if masks else None,
        )

    return make


@pytest.fixture
def compute(make_predictions):
    """Case to the criterion's results under the names of the reference's expected arrays."""

    def run(case, padding: str, masks: bool = True, settings: LossSection | None = None) -> dict[str, torch.Tensor]:
        for leaf in case.leaves.values():
            leaf.grad = None
        criterion = Criterion(settings, pad_n_queries=PADDINGS[padding])
        output = criterion(make_predictions(case.leaves, masks=masks), case.targets)
        output.total.backward()
        padded = {"loss_ce", "loss_ce_o2m", "grad_logits", "grad_logits_o2m"}
        grads = {f"grad_{name}": leaf.grad for name, leaf in case.leaves.items() if leaf.grad is not None}
        total_name = "core_loss" if masks else "core_loss_det"
        results = {
            **{name: output.per_layer[name] for name in PER_LAYER},
            **{name: output.terms[name] for name in FINAL if masks},
            **grads,
            total_name: output.total.detach(),
            "ce_f1": output.diagnostics()["ce_f1"],
            "presence_dec_acc": output.diagnostics()["presence_accuracy"],
            "o2o_indices": torch.stack(indices_of(output.matches.o2o)),
            "o2m_indices_aux": torch.stack(indices_of(output.matches.o2m)[:-1]),
            "o2m_indices_final": indices_of(output.matches.o2m)[-1],
        }
        padded |= {total_name}
        return {f"exp_{name}{f'__{padding}' if name in padded else ''}": value for name, value in results.items()}

    return run


@pytest.fixture
def assert_matches_reference():
    """Compare one array: integers exactly, gradients to 1e-5 of the array's maximum, the rest to 1e-5 relative."""

    def check(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} for {tuple(expected.shape)}"
        assert actual.isfinite().all(), f"{name} is not finite"
        if not expected.is_floating_point():
            assert torch.equal(actual, expected), f"{name} differs"
            return
        error = (actual.double() - expected.double()).abs()
        scale = expected.double().abs()
        bound = 1e-5 * (scale.max() if "grad" in name and scale.numel() else scale)
        assert (error <= bound + 1e-9).all(), f"{name} is off by {error.max():.3g}, allowed {bound.max():.3g}"

    return check
