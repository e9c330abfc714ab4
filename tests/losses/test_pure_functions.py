"""Single functions against the reference: boxes, focal, dice, presence, IABCE variants, matchers, masks, points,
semantic."""

import numpy as np
import pytest
import torch

from sam3lora.losses import HungarianCost, OneToManyRule, Pairs, Predictions, Targets, match
from sam3lora.losses.boxes import box_giou, box_iou_and_union, cxcywh_to_xyxy
from sam3lora.losses.masks import (
    mask_loss_sums,
    resize,
    sample_points,
    semantic_loss_sums,
    union_of_masks,
)
from sam3lora.losses.matching import assign
from sam3lora.losses.terms import iabce_elements, iabce_term, presence_term, sigmoid_focal, soft_dice, visible_queries

from .conftest import indices_of

IABCE_VARIANTS = {
    "default": {},
    "pad200": {"pad_n_queries": 200},
    "posw5": {"pos_weight": 5.0},
    "gamma0": {"gamma": 0.0},
    "alpha50": {"alpha": 0.5},
    "presence_a25_g2": {"presence": {"alpha": 0.25, "gamma": 2.0}},
}


def pairs_of(indices_M3: torch.Tensor) -> Pairs:
    rows = np.concatenate([np.zeros((len(indices_M3), 1), dtype=np.int64), indices_M3.numpy()], axis=1)
    return Pairs.from_rows(rows, num_layers=1)


def targets_of(pure) -> Targets:
    num_targets = len(pure["iabce__tgt_boxes_cxcywh"])
    valid = torch.zeros(num_targets, dtype=torch.bool)
    return Targets(pure["iabce__tgt_num"], pure["iabce__tgt_boxes_cxcywh"], None, valid)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_focal(labels, pure, assert_matches_reference):
    # Element by element for six (alpha, gamma), hard and soft labels, and the derivative.
    for row, (alpha, gamma) in enumerate(pure["focal__alpha_gamma"].tolist()):
        x = pure["focal__x"].clone().requires_grad_()
        loss = sigmoid_focal(x, pure[f"focal__y_{labels}"], alpha, gamma)
        loss.sum().backward()
        torch.testing.assert_close(loss, pure[f"focal__exp_{labels}"][row], rtol=1e-5, atol=1e-7)
        assert_matches_reference("grad", x.grad, pure[f"focal__exp_grad_{labels}"][row])


@pytest.mark.parametrize("kind", ["focal", "dice"])
def test_mask_reduction(kind, pure, assert_matches_reference):
    # Mean over pixels, sum over masks, divided by the number of boxes.
    x, y = pure["mask_reduce__x"].clone().requires_grad_(), pure["mask_reduce__y"]
    sums = mask_loss_sums(x[:, None], y[:, None], torch.arange(len(x)))  # a row of pixels each
    value = sums[["focal", "dice"].index(kind)] / pure["mask_reduce__num_boxes"]
    value.backward()
    assert_matches_reference(kind, value, pure[f"mask_reduce__exp_{kind}"])
    assert_matches_reference("grad", x.grad, pure[f"mask_reduce__exp_{kind}_grad"])
    assert_matches_reference("dice", soft_dice(x, y), pure["mask_reduce__exp_dice_per_instance"])


def test_boxes(pure, assert_matches_reference):
    # Conversion, IoU, union, GIoU and L1 of all pairs, of rows, and the GIoU gradient.
    a, b = pure["boxes__a_cxcywh"].clone().requires_grad_(), pure["boxes__b_cxcywh"]
    a_xyxy, b_xyxy = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    assert_matches_reference("a", a_xyxy, pure["boxes__exp_a_xyxy"])
    assert_matches_reference("b", b_xyxy, pure["boxes__exp_b_xyxy"])
    iou, union = box_iou_and_union(a_xyxy[:, None], b_xyxy[None])
    giou = box_giou(a_xyxy[:, None], b_xyxy[None])
    for name, value in {"iou": iou, "union": union, "giou": giou}.items():
        torch.testing.assert_close(value, pure[f"boxes__exp_{name}"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((a[:, None] - b[None]).abs().sum(-1), pure["boxes__exp_l1_cdist"], rtol=1e-5, atol=1e-6)
    rows = min(len(a), len(b))
    row_iou = box_iou_and_union(a_xyxy[:rows], b_xyxy[:rows])[0]
    row_giou = box_giou(a_xyxy[:rows], b_xyxy[:rows])
    torch.testing.assert_close(row_iou, pure["boxes__exp_diag_iou"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(row_giou, pure["boxes__exp_diag_giou"], rtol=1e-5, atol=1e-6)
    (1 - row_giou).sum().backward()
    grad_rows = pure["boxes__giou_grad_rows"]
    assert_matches_reference("grad", a.grad[grad_rows], pure["boxes__exp_giou_loss_grad"])


def test_presence_per_query(pure, assert_matches_reference):
    # One query at a time gives half the binary cross-entropy of each.
    present = (pure["iabce__tgt_num"] > 0).float()
    logits = pure["iabce__presence_logits"][:, 0]
    per_query = torch.stack(
        [presence_term(logits[None, b : b + 1], present[b : b + 1], 1)[0] for b in range(len(logits))]
    )
    assert_matches_reference("presence", per_query, pure["presence__exp_per_query"])


@pytest.mark.parametrize("variant", IABCE_VARIANTS)
def test_iabce(variant, pure, assert_matches_reference):
    # Value and gradient of the classification and presence terms in each variant.
    settings = {"pad_n_queries": None, "pos_weight": 10.0, **IABCE_VARIANTS[variant]}
    presence_settings = settings.pop("presence", {})
    logits = pure["iabce__logits"].clone().requires_grad_()
    presence = pure["iabce__presence_logits"].clone().requires_grad_()
    targets, pairs, num_queries = targets_of(pure), pairs_of(pure["iabce__indices"]), len(logits)
    present = visible_queries(targets.boxes_cxcywh_T4, targets.query_index(), num_queries)
    loss, _ = iabce_term(
        logits[None],
        pure["iabce__boxes_cxcywh"][None],
        targets.boxes_cxcywh_T4,
        pairs,
        present,
        num_queries,
        **settings,
    )
    loss.sum().backward()
    assert_matches_reference("ce", loss[0], pure[f"iabce__exp_loss_ce__{variant}"])
    assert_matches_reference("grad", logits.grad, pure[f"iabce__exp_grad_logits__{variant}"])
    loss = presence_term(presence.transpose(0, 1), present, num_queries, **presence_settings)
    loss.sum().backward()
    assert_matches_reference("presence", loss[0], pure[f"iabce__exp_presence_loss__{variant}"])
    if f"iabce__exp_grad_presence__{variant}" in pure:
        assert_matches_reference("grad", presence.grad, pure[f"iabce__exp_grad_presence__{variant}"])


def test_iabce_elements(pure):
    # Before averaging, including the zeros of the query without targets.
    targets = targets_of(pure)
    loss, _ = iabce_elements(
        pure["iabce__logits"][None],
        pure["iabce__boxes_cxcywh"][None],
        targets.boxes_cxcywh_T4,
        pairs_of(pure["iabce__indices"]),
        pos_weight=10.0,
    )
    loss = loss[0] * (targets.num_B > 0)[:, None]
    torch.testing.assert_close(loss, pure["iabce__exp_per_element"], rtol=1e-5, atol=1e-7)


def test_hungarian(pure):
    # Costs of each query and the assignment.
    targets = targets_of(pure)
    cost = HungarianCost()(pure["iabce__logits"][None], pure["iabce__boxes_cxcywh"][None], targets)[0]
    for query, rows in enumerate(cost.split(targets.num_B.tolist())):
        if len(rows):
            torch.testing.assert_close(rows.T, pure[f"hungarian__exp_cost_{query}"], rtol=1e-5, atol=1e-5)
    rows = assign(cost[None].numpy(), targets.num_B.numpy())
    assert rows[:, 1:].tolist() == pure["hungarian__exp_indices"].tolist()


def test_hungarian_with_fewer_object_queries_than_targets(pure):
    # Q = 3 against 5 targets: three pairs, no crash, the targets left over stay unmatched.
    q = int(pure["hungarian_fewer_queries__q"])
    predictions = Predictions(
        pure["iabce__logits"][None, :, :q], pure["iabce__boxes_cxcywh"][None, :, :q], torch.zeros(1, 4)
    )
    indices = indices_of(match(predictions, targets_of(pure)).o2o)[0]
    assert sorted(indices.tolist()) == pure["hungarian_fewer_queries__exp_indices"].tolist()


@pytest.mark.parametrize(("alpha", "threshold", "topk"), [(30, 40, 4), (30, 40, 6), (30, 10, 4), (0, 20, 3)])
def test_one_to_many(alpha, threshold, topk, pure):
    # The rule of the final one-to-many layer with four settings.
    rule = OneToManyRule(alpha / 100, threshold / 100, topk)
    logits, boxes = pure["o2m__logits"][None], pure["o2m__boxes_cxcywh"][None]
    predictions = Predictions(logits, boxes, torch.zeros(1, 4), logits, boxes)
    indices = indices_of(match(predictions, targets_of(pure), one_to_many=rule).o2m)[-1]
    assert indices.tolist() == pure[f"o2m__exp_indices__a{alpha}_t{threshold}_k{topk}"].tolist()


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_masks(chunk_size, pure, assert_matches_reference):
    # Non-square masks, a pair with several matches; the chunk size changes nothing.
    valid = pure["masks__tgt_valid"]
    b, q, t = pure["masks__indices"][valid[pure["masks__indices"][:, 2]]].T
    for name, number in {"mask": 0, "dice": 1}.items():
        pred = pure["masks__pred"].clone().requires_grad_()
        sums = mask_loss_sums(pred[b, q], pure["masks__tgt"], t, chunk_size=chunk_size)
        value = sums[number] / pure["masks__num_boxes"]
        value.backward()
        assert_matches_reference(name, value, pure[f"masks__exp_loss_{name}"])
        assert_matches_reference("grad", pred.grad, pure[f"masks__exp_grad_loss_{name}"])


def test_mask_points(pure, assert_matches_reference):
    # Bilinear samples at given points and the loss on them.
    b, q, t = pure["masks_points__kept_indices"].T
    coords = pure["masks_points__coords_xy"]
    predicted = sample_points(pure["masks__pred"][b, q], coords)
    target = sample_points(pure["masks__tgt"][t], coords)
    torch.testing.assert_close(predicted, pure["masks_points__exp_pred_samples"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target, pure["masks_points__exp_tgt_samples"], rtol=1e-5, atol=1e-6)
    focal, dice = mask_loss_sums(predicted[:, None], target[:, None], torch.arange(len(target)))
    assert_matches_reference("mask", focal / pure["masks__num_boxes"], pure["masks_points__exp_loss_mask"])
    assert_matches_reference("dice", dice / pure["masks__num_boxes"], pure["masks_points__exp_loss_dice"])


@pytest.mark.parametrize("variant", ["default", "explicit"])
def test_semantic(variant, pure, assert_matches_reference):
    # The union of instance masks, and a given mask.
    masks, counts = pure["semantic__tgt_masks"], pure["semantic__tgt_num"].tolist()
    ends = np.cumsum(counts).tolist()
    ranges = [(end - count, end) for end, count in zip(ends, counts, strict=True)]
    union = union_of_masks(masks, torch.ones(len(masks), dtype=torch.bool), ranges)
    assert_matches_reference("union", union, pure["semantic__exp_union"])
    if variant == "explicit":
        union = pure["semantic__explicit_masks"]
    positive = union.flatten(1).any(1).nonzero()[:, 0]
    for name, number in {"seg": 0, "dice": 1}.items():
        logits = pure["semantic__logits"].clone().requires_grad_()
        sums = semantic_loss_sums(
            logits[positive, 0],
            lambda start, end: union[positive][start:end],
            chunk_size=2,
        )
        value = sums[number] / (len(positive) + 1e-6)
        value.backward()
        assert_matches_reference(name, value, pure[f"semantic__exp_loss_semantic_{name}__{variant}"])
        assert_matches_reference("grad", logits.grad, pure[f"semantic__exp_grad_loss_semantic_{name}__{variant}"])


def test_resize_keeps_a_mask_of_the_right_size():
    # No interpolation, only fp32, where sizes agree already.
    mask = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.bfloat16)
    assert torch.equal(resize(mask, (2, 2)), mask.float())
