"""Tokenisation of prompts for SAM 3's text tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sam3lora.errors import UserError

MAX_PROMPT_TOKENS = 32


class PromptError(UserError):
    """A prompt that cannot be asked.

    Attributes:
        number: Place among the prompts, from 0.
        fault: What is wrong, in words that do not repeat the prompt.
        shown: The prompt, or its beginning, for the message; without it the message shows the number.
    """

    def __init__(self, number: int, fault: str, shown: str | None = None) -> None:
        super().__init__(number, fault, shown)
        self.number = number
        self.fault = fault
        self.shown = shown

    def __str__(self) -> str:
        return f"prompt {self.number if self.shown is None else repr(self.shown)} {self.fault}"


def tokenize(
    tokenizer: Any, prompts: Sequence[str], *, max_tokens: int = MAX_PROMPT_TOKENS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of ``P`` prompts, both ``(P, max_tokens)`` int64; the mask is 1 at real tokens.

    Raises:
        PromptError: A prompt is empty, not text, or longer than ``max_tokens`` tokens with the start and end tokens. It
            is not cut silently, as the model would then search for something else.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise PromptError(number, f"must be text, got {type(prompt).__name__}")
        if not prompt.strip():
            raise PromptError(number, "is empty: write what to look for, for example 'crack'")
    if not prompts:
        empty = torch.zeros(0, max_tokens, dtype=torch.long)
        return empty, empty.clone()
    for number, ids in enumerate(tokenizer(list(prompts), verbose=False)["input_ids"]):
        if len(ids) > max_tokens:
            prompt = prompts[number]
            shown = prompt if len(prompt) <= 80 else prompt[:77] + "..."
            fault = f"has {len(ids)} tokens, start and end included; SAM 3 reads at most {max_tokens}"
            raise PromptError(number, f"{fault}: use a short noun phrase", shown)
    encoded = tokenizer(list(prompts), padding="max_length", max_length=max_tokens, return_tensors="pt")
    return encoded["input_ids"].long(), encoded["attention_mask"].long()
