"""Training SAM 3 adapters without this package, as a careful user of transformers and PEFT writes it.

`Sam3Model` sees one (image, prompt) pair at a time and each pair's graph is freed before the next one's is built. That
takes the least memory, and no prompt is padded to another image. The loss is ours, of what the stock forward returns:
the last decoder layer, without the one-to-many branch.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torchvision.ops import box_convert

from jobs.bench.training_work import PIXEL_MEAN_STD
from sam3lora.data.batch import Batch, to_pixel_values
from sam3lora.losses import Criterion, Normalizer, Predictions, Targets
from sam3lora.model.tokenization import tokenize


class PlainTraining:
    """Gradient accumulation over (image, prompt) pairs.

    Args:
        model: `get_peft_model` around a stock `Sam3Model`, in training mode; only the adapter requires gradients.
        tokenizer: Of the model.
        criterion: The loss.
        bf16: Forward under bfloat16 autocast.
        whole_images: One forward for all prompts of an image, the image repeated for each of them.
    """

    def __init__(
        self, model: PeftModel, tokenizer: Any, criterion: Criterion, *, bf16: bool = False, whole_images: bool = False
    ) -> None:
        self.model, self.tokenizer, self.criterion = model, tokenizer, criterion
        self.bf16, self.whole_images = bf16, whole_images

    def backward(self, batch: Batch, normalizer: Normalizer) -> Tensor:
        """Add the gradients of the batch to the adapter; return the detached loss."""
        total = torch.zeros(())
        targets = batch.targets()
        first_target = [0, *targets.num_B.cumsum(0).tolist()]
        for rows in self._forwards(batch):
            pixel_values = to_pixel_values(batch.images_NHWC[batch.query_image_B[rows[0]]][None], *PIXEL_MEAN_STD)
            input_ids, attention_mask = tokenize(self.tokenizer, [batch.prompts_B[row] for row in rows])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                output = self.model(
                    pixel_values=pixel_values.expand(len(rows), -1, -1, -1),
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                )
            own = slice(first_target[rows[0]], first_target[rows[-1] + 1])
            loss = self.criterion(_predictions(output), _part(targets, rows, own), normalizer).total
            loss.backward()
            total += loss.detach()
        return total

    def _forwards(self, batch: Batch) -> list[list[int]]:
        """Find queries of each forward."""
        if not self.whole_images:
            return [[row] for row in range(batch.num_queries)]
        images = batch.query_image_B.tolist()
        return [[row for row, of in enumerate(images) if of == image] for image in range(batch.num_images)]


def _predictions(output: Any) -> Predictions:
    """One decoder layer; the stock output holds the masks of all object queries already."""
    return Predictions(
        logits_LBQ=output.pred_logits[None],
        boxes_cxcywh_LBQ4=box_convert(output.pred_boxes.float(), "xyxy", "cxcywh")[None],
        presence_logits_LB=output.presence_logits.reshape(1, -1),
        mask_logits=lambda branch, b_index, q_index: output.pred_masks[b_index, q_index],
        semantic_logits=lambda b_index: output.semantic_seg[b_index, 0],
    )


def _part(targets: Targets, rows: list[int], own: slice) -> Targets:
    masks = None if targets.masks_THW is None else targets.masks_THW[own]
    return Targets(targets.num_B[rows], targets.boxes_cxcywh_T4[own], masks, targets.mask_valid_T[own])
