"""What training asks the click head: how an interaction starts, and the clicks that correct what it found.

The values are those of SAM 2's fine-tuning, https://github.com/facebookresearch/sam2 . Starts from a wrong mask are an
addition for the correction of found objects.

Points and boxes are in pixels of the model's square input, and masks cover all of it, at any size. A click on a pixel
of a mask lies in the middle of it once the prompt encoder has added its half pixel. Everything stays on the device of
the masks, which is that of the generator.

Shapes: `N` objects, `h` `w` pixels of masks, `k` clicks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sam3lora.config.clicks import StartShares
from sam3lora.engine.clicks.prompt import as_mask_prompt, is_ambiguous
from sam3lora.training.clicks.regions import (
    boxes_of,
    grown,
    half_of,
    max_radius,
    random_true,
    shrunk,
    uniform,
)

Start = Literal["click", "box", "mask", "mask_and_box"]
"""How an interaction starts; the names are those of `StartShares`."""

JITTER_SHARE, JITTER_PX = 0.1, 20.0
"""A corner of a box moves by at most this share of the side, and by at most so many pixels."""
FROM_OBJECT = 0.1
"""Probability that a correcting click is drawn from the object, as if nothing had been found."""
WRONG_LOGIT = 8.0
"""Logit of a wrong mask to start from: +- this."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of one kind, one for each object.

    Attributes:
        points_Nk2: float32, x and y.
        labels_Nk: int64, 1 belongs to the object, 0 does not.
        boxes_xyxy_N4: float32, or None.
        masks_Nhw: Logits of an earlier mask without gradient, or None.
    """

    points_Nk2: Tensor
    labels_Nk: Tensor
    boxes_xyxy_N4: Tensor | None = None
    masks_Nhw: Tensor | None = None

    @property
    def multimask(self) -> bool:
        """Whether to answer with three masks."""
        return is_ambiguous(self.labels_Nk.shape[1], self.boxes_xyxy_N4 is not None, self.masks_Nhw is not None)

    def then(self, points_N12: Tensor, labels_N1: Tensor, logits_Nhw: Tensor) -> Prompts:
        """With a further click, and the logits of the mask that it corrects."""
        return replace(
            self,
            points_Nk2=torch.cat([self.points_Nk2, points_N12], dim=1),
            labels_Nk=torch.cat([self.labels_Nk, labels_N1], dim=1),
            masks_Nhw=as_mask_prompt(logits_Nhw),
        )


def draw_start(shares: StartShares, generator: torch.Generator) -> Start:
    """One way to start; it holds for a batch, since prompts of one kind pass the head together."""
    names: tuple[Start, ...] = get_args(Start)
    weights = torch.tensor([getattr(shares, name) for name in names], dtype=torch.float32, device=generator.device)
    return names[int(torch.multinomial(weights, 1, generator=generator))]


def start_prompts(
    start: Start, truth_Nhw: Tensor, side: int, generator: torch.Generator, image_index_N: Tensor | None = None
) -> Prompts:
    """The first prompts of some objects.

    Args:
        truth_Nhw: bool.
        side: Side of the model's input in pixels.
        image_index_N: See `wrong_masks`.

    Returns:
        For "click" a click in each object; for "box" a box that is a little off; for the others a wrong mask and a
        click that corrects it.
    """
    if start == "click":
        return Prompts(*next_clicks(truth_Nhw, None, side, generator))
    boxes_N4 = jittered_boxes(truth_Nhw, side, generator) if start != "mask" else None
    if start == "box":
        num = len(truth_Nhw)
        points_N02 = torch.zeros(num, 0, 2, device=truth_Nhw.device)
        return Prompts(points_N02, points_N02[..., 0].long(), boxes_N4)
    wrong_Nhw = wrong_masks(truth_Nhw, generator, image_index_N)
    points_N12, labels_N1 = next_clicks(truth_Nhw, wrong_Nhw, side, generator, from_object=0)
    logits_Nhw = torch.where(wrong_Nhw, WRONG_LOGIT, -WRONG_LOGIT)
    return Prompts(points_N12, labels_N1, boxes_N4, logits_Nhw)


def next_clicks(
    truth_Nhw: Tensor,
    found_Nhw: Tensor | None,
    side: int,
    generator: torch.Generator,
    from_object: float = FROM_OBJECT,
) -> tuple[Tensor, Tensor]:
    """A click (N, 1, 2) and its label (N, 1) for each object, on any pixel that is wrong with equal probability.

    With probability `from_object` it is any pixel of the object. Where nothing is wrong it lies in the background,
    or in the object if there is no background.

    Args:
        truth_Nhw: bool.
        found_Nhw: bool; None is nothing found, as before a first click.
    """
    wrong_Nhw = truth_Nhw if found_Nhw is None else truth_Nhw ^ found_Nhw
    if found_Nhw is not None and from_object > 0:
        is_from_object_N = (uniform(len(truth_Nhw), generator) < from_object) & truth_Nhw.flatten(1).any(dim=1)
        wrong_Nhw = torch.where(is_from_object_N[:, None, None], truth_Nhw, wrong_Nhw)
    wrong_NP, truth_NP = wrong_Nhw.flatten(1), truth_Nhw.flatten(1)
    region_NP = torch.where(wrong_NP.any(dim=1, keepdim=True), wrong_NP, ~truth_NP)
    region_NP = torch.where(region_NP.any(dim=1, keepdim=True), region_NP, True)
    pixel_N1 = random_true(region_NP, generator)[:, None]
    height, width = truth_Nhw.shape[1:]
    x_N1 = (pixel_N1 % width + 0.5) * (side / width) - 0.5
    y_N1 = (pixel_N1 // width + 0.5) * (side / height) - 0.5
    return torch.stack([x_N1, y_N1], dim=2).float(), truth_NP.gather(1, pixel_N1).long()


def jittered_boxes(truth_Nhw: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Boxes (N, 4) of masks whose corners are moved by chance, within the model's input."""
    height, width = truth_Nhw.shape[1:]
    scale_4 = torch.tensor([side / width, side / height] * 2, device=truth_Nhw.device)
    boxes_N4 = boxes_of(truth_Nhw) * scale_4
    reach_N2 = ((boxes_N4[:, 2:] - boxes_N4[:, :2]) * JITTER_SHARE).clamp(max=JITTER_PX)
    moves_N4 = 2 * uniform(boxes_N4.numel(), generator).view_as(boxes_N4).float() - 1
    return (boxes_N4 + moves_N4 * reach_N2.repeat(1, 2)).clamp(0, side)


def wrong_masks(truth_Nhw: Tensor, generator: torch.Generator, image_index_N: Tensor | None = None) -> Tensor:
    """Masks (N, h, w) bool as a detector may get them wrong: half of an object, too large, too small, two in one.

    Each way is equally likely. An object alone in its image gets too large instead of two in one, and one too thin to
    be shrunk is cut in half. The width of what is added or taken away is 10 to 30 % of the root of the object's area.

    Args:
        truth_Nhw: bool.
        image_index_N: Which image each object is in; None means that all are alone.
    """
    num = len(truth_Nhw)
    way_N = (4 * uniform(num, generator)).long()
    share_N = 0.1 + 0.2 * uniform(num, generator)
    radius_N = (share_N * truth_Nhw.sum(dim=(1, 2)).sqrt()).round().clamp(1, max_radius(truth_Nhw))
    large_Nhw, small_Nhw = grown(truth_Nhw, radius_N), shrunk(truth_Nhw, radius_N)
    half_Nhw = half_of(truth_Nhw, generator)
    small_Nhw = torch.where(small_Nhw.flatten(1).any(dim=1)[:, None, None], small_Nhw, half_Nhw)
    joined_Nhw = large_Nhw
    if image_index_N is not None:
        is_other_NN = image_index_N[:, None] == image_index_N
        is_other_NN.fill_diagonal_(False)
        other_Nhw = truth_Nhw[random_true(is_other_NN, generator)]
        joined_Nhw = torch.where(is_other_NN.any(dim=1)[:, None, None], truth_Nhw | other_Nhw, large_Nhw)
    ways_4Nhw = torch.stack([half_Nhw, large_Nhw, small_Nhw, joined_Nhw])
    return ways_4Nhw[way_N, torch.arange(num, device=truth_Nhw.device)]
