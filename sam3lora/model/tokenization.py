"""Tokenisation of prompts for SAM 3's text tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sam3lora.errors import UserError

MAX_PROMPT_TOKENS = 32


def tokenize(
    tokenizer: Any, prompts: Sequence[str], *, max_tokens: int = MAX_PROMPT_TOKENS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of ``P`` prompts, both ``(P, max_tokens)`` int64; the mask is 1 at real tokens.

    Raises:
        UserError: A prompt is empty, not text, or longer than ``max_tokens`` tokens with the start and end tokens. It
            is not cut silently, as the model would then search for something else.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"prompt {index} must be text, got {type(prompt).__name__}: {prompt!r}")
        if not prompt.strip():
            raise UserError(f"prompt {index} is empty: write what to look for, for example 'crack'")
    if not prompts:
        empty = torch.zeros(0, max_tokens, dtype=torch.long)
        return empty, empty.clone()
    for prompt, ids in zip(prompts, tokenizer(list(prompts), verbose=False)["input_ids"], strict=True):
        if len(ids) > max_tokens:
            shown = prompt if len(prompt) <= 80 else prompt[:77] + "..."
            raise UserError(
                f"prompt {shown!r} has {len(ids)} tokens, start and end included; SAM 3 reads at most {max_tokens}: "
                "use a short noun phrase"
            )
    encoded = tokenizer(list(prompts), padding="max_length", max_length=max_tokens, return_tensors="pt")
    return encoded["input_ids"].long(), encoded["attention_mask"].long()
