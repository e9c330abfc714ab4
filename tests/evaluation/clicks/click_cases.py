"""A click head that answers by rules of a test, and objects drawn by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt, drawn_mask_logits
from sam3lora.evaluation.clicks.asking import AnswerPrompts

SIDE = 64
"""Side of the images, of the model's input and of its masks: they are answered without loss."""


def square(x: int, y: int, side: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y : y + side, x : x + side] = True
    return mask


def clicking(masks_of: Callable[[ClickPrompt], Sequence[np.ndarray]]) -> AnswerPrompts:
    """A click head whose masks, bool (H, W), are said by a function; the last one has the highest score."""

    def ask(prompts: Sequence[ClickPrompt]) -> list[ClickAnswer]:
        answers = []
        for prompt in prompts:
            logits = torch.stack([drawn_mask_logits(mask, SIDE) for mask in masks_of(prompt)])
            answers.append(ClickAnswer.of(logits, np.linspace(0.5, 0.9, len(logits)).tolist(), 1.0))
        return answers

    return ask
