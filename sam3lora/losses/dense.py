"""The training loss of dense prediction: one label, or one probability per class, for every pixel.

Of one map with target m in {0, 1}, logit x, p = sigmoid(x), and v = 0 where the label is ignored, else 1:

    w    = v (1 + boundary_weight |mean of m around the pixel - m|)
    wBCE = sum w BCE(x, m) / sum w
    wIoU = 1 - (sum w p m + 1) / (sum w (p + m - p m) + 1)

Their sum is the structure loss of F3Net (Wei et al. 2020, https://arxiv.org/abs/1911.11445). Classes that exclude each
other have, with softmax probabilities p, one-hot labels y and w of the foreground as a whole:

    wCE  = sum w CE / sum w
    dice = mean over the classes that the image shows of 1 - (2 sum v p y + 1) / (sum v p + sum v y + 1)

Every term is a sum over images divided by the number of images of the whole optimizer step, so micro-batches and
workers add up. All is computed in float32.

Shapes: `I` images, `N` channels of the output, `M` maps of one target each, `L` levels, `H` `W` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3lora.label_values import IGNORE

Mode = Literal["binary", "multiclass", "multilabel"]
_WINDOW, _WINDOW_SIDE = 31, 336  # the original's window, in pixels of a map of this side


@dataclass(frozen=True)
class DenseLossOutput:
    """The loss of one forward.

    Attributes:
        total: The sum of the terms, with gradient.
        terms: The terms, summed over levels by their weights, without gradient.
    """

    total: Tensor
    terms: dict[str, Tensor]


class DenseCriterion:
    """The loss of logits at one or more resolutions against labels at the finest.

    Args:
        mode: `binary` and `multilabel` have the structure loss (of each class, and the mean of these), `multiclass`
            weighted cross-entropy and dice.
        level_weights: Of each level of logits, the finest first (deep supervision).
        boundary_weight: How much more a pixel counts whose surroundings differ from it; 0 weighs all pixels alike.
    """

    def __init__(
        self,
        mode: Mode = "binary",
        *,
        level_weights: Sequence[float] = (1.0, 0.4, 0.2),
        boundary_weight: float = 5.0,
    ) -> None:
        self.mode = mode
        self.level_weights = tuple(level_weights)
        self.boundary_weight = boundary_weight

    @property
    def term_names(self) -> tuple[str, str]:
        return ("dense_ce", "dense_dice") if self.mode == "multiclass" else ("dense_bce", "dense_iou")

    def __call__(
        self, logits: Sequence[Tensor], labels: Tensor, num_images: float, world_size: int = 1
    ) -> DenseLossOutput:
        """Loss of some images of an optimizer step.

        Args:
            logits: (I, N, h, w) of each level, the finest first. There may be fewer levels than weights. Their sides
                divide those of the labels; a coarser level is compared to the labels at its pixels' centres.
            labels: uint8 (I, H, W), or (I, N, H, W) of 0 and 1 for `multilabel`; 255 is ignored.
            num_images: Images of the whole step, of all its batches and workers.
            world_size: Number of workers whose gradients are averaged.

        Raises:
            ValueError: The shapes do not fit.
        """
        if not 0 < len(logits) <= len(self.level_weights):
            raise ValueError(f"expected 1 to {len(self.level_weights)} levels of logits, got {len(logits)}")
        with torch.autocast(logits[0].device.type, enabled=False):
            sums_L2 = [
                weight * self._sums(one_INhw.to(torch.promote_types(one_INhw.dtype, torch.float32)), labels)
                for weight, one_INhw in zip(self.level_weights, logits, strict=False)
            ]
            terms_2 = torch.stack(sums_L2).sum(dim=0) * (world_size / (num_images or 1))
        return DenseLossOutput(terms_2.sum(), dict(zip(self.term_names, terms_2.detach().unbind(), strict=True)))

    def _sums(self, logits_INhw: Tensor, labels: Tensor) -> Tensor:
        """Both terms (2,), summed over images."""
        images, channels, *size = logits_INhw.shape
        expected = (images, channels) if self.mode == "multilabel" else (images,)
        if labels.shape[:-2] != expected or (self.mode == "binary" and channels != 1):
            raise ValueError(
                f"expected {self.mode} labels for logits {tuple(logits_INhw.shape)}, got {tuple(labels.shape)}"
            )
        labels = at_centres(labels, size)
        if self.mode == "multiclass":
            return torch.stack(cross_entropy_and_dice(logits_INhw, labels, self.boundary_weight)).sum(dim=1)
        flat_MHW, labels_MHW = logits_INhw.flatten(0, 1), labels.reshape(-1, *size)
        return torch.stack(structure_terms(flat_MHW, labels_MHW, self.boundary_weight)).sum(dim=1) / channels


def structure_terms(logits_MHW: Tensor, labels_MHW: Tensor, boundary_weight: float = 5.0) -> tuple[Tensor, Tensor]:
    """wBCE >= 0 and wIoU in [0, 1) of each map (M,), of uint8 labels 0, 1 and 255; 0 where all is ignored."""
    target, valid = _float_of(labels_MHW == 1, logits_MHW), _float_of(labels_MHW != IGNORE, logits_MHW)
    weight = boundary_weights(target, valid, boundary_weight)
    entropy = F.binary_cross_entropy_with_logits(logits_MHW, target, reduction="none")
    probability = logits_MHW.sigmoid()
    overlap = (weight * probability * target).sum(dim=(1, 2))
    union = (weight * (probability + target - probability * target)).sum(dim=(1, 2))
    return _mean(entropy, weight), 1 - (overlap + 1) / (union + 1)


def cross_entropy_and_dice(
    logits_INHW: Tensor, labels_IHW: Tensor, boundary_weight: float = 5.0
) -> tuple[Tensor, Tensor]:
    """wCE >= 0 and dice loss in [0, 1) of each image (I,), of uint8 labels below N or 255; 0 where all is ignored."""
    valid = _float_of(labels_IHW != IGNORE, logits_INHW)
    foreground = _float_of((labels_IHW != IGNORE) & (labels_IHW != 0), logits_INHW)
    weight = boundary_weights(foreground, valid, boundary_weight)
    entropy = F.cross_entropy(logits_INHW, labels_IHW.long(), reduction="none", ignore_index=IGNORE)

    classes_N11 = torch.arange(logits_INHW.shape[1], device=labels_IHW.device)[:, None, None]
    of_class_INHW = labels_IHW[:, None] == classes_N11
    probability = logits_INHW.softmax(dim=1) * valid[:, None]
    overlap_IN, predicted_IN = (probability * of_class_INHW).sum(dim=(2, 3)), probability.sum(dim=(2, 3))
    true_IN = of_class_INHW.sum(dim=(2, 3))
    dice_IN = 1 - (2 * overlap_IN + 1) / (predicted_IN + true_IN + 1)
    shown_IN = true_IN > 0
    return _mean(entropy, weight), (dice_IN * shown_IN).sum(dim=1) / shown_IN.sum(dim=1).clamp(min=1)


@torch.no_grad()
def boundary_weights(target_MHW: Tensor, valid_MHW: Tensor, boundary_weight: float) -> Tensor:
    """v (1 + boundary_weight |mean of m over the valid pixels around - m|), of m and v in {0, 1}.

    The surroundings are a square of 31 pixels in a map of side 336, and the same part of other maps.
    """
    if boundary_weight == 0:
        return valid_MHW
    side = 2 * (valid_MHW.shape[-1] * _WINDOW // (2 * _WINDOW_SIDE)) + 1  # the nearest odd number
    # zeros around the map count in both means, so their ratio is the mean of the valid pixels of the map
    both_M2HW = torch.stack([target_MHW, valid_MHW], dim=1)
    in_columns = F.avg_pool2d(both_M2HW, (side, 1), stride=1, padding=(side // 2, 0))
    of_target, of_valid = F.avg_pool2d(in_columns, (1, side), stride=1, padding=(0, side // 2)).unbind(dim=1)
    around_MHW = of_target / of_valid.clamp(min=0.5 / side**2)
    return valid_MHW * (1 + boundary_weight * (around_MHW - target_MHW).abs())


def at_centres(labels: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Labels (..., H, W) at the centres of the pixels of a coarser map.

    >>> at_centres(torch.arange(4).expand(4, 4), (2, 2))
    tensor([[1, 3],
            [1, 3]])

    Raises:
        ValueError: The sides of the map do not divide those of the labels.
    """
    (height, rest_h), (width, rest_w) = (divmod(labels.shape[d], size_hw[d]) for d in (-2, -1))
    if rest_h or rest_w or not height or not width:
        raise ValueError(f"expected logits whose sides divide {tuple(labels.shape[-2:])}, got {tuple(size_hw)}")
    return labels[..., height // 2 :: height, width // 2 :: width]


def _mean(values_MHW: Tensor, weight_MHW: Tensor) -> Tensor:
    """Weighted mean of each map (M,); 0 where no pixel has a weight (one that has any has at least 1)."""
    return (values_MHW * weight_MHW).sum(dim=(1, 2)) / weight_MHW.sum(dim=(1, 2)).clamp(min=1)


def _float_of(mask: Tensor, like: Tensor) -> Tensor:
    return mask.to(like.dtype)
