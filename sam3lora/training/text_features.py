"""`TextBank`: text features of prompts, computed once per run if the text tower is frozen, else once per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sam3lora.model.staged.forward import StagedSam3, TextFeatures

Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


class TextBank:
    """Text features by prompt; none are kept if the text tower is `trainable`, that is, carries an adapter.

    `tokenize` maps prompts to token ids and attention mask, both (P, 32).
    """

    def __init__(self, staged: StagedSam3, tokenize: Tokenize, *, trainable: bool, device: torch.device) -> None:
        self._staged, self._tokenize, self._trainable, self._device = staged, tokenize, trainable, device
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, prompts: Sequence[str]) -> None:
        """Encode the new prompts in one pass, at the precision of the weights."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if missing and not self._trainable:
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                features = self._encode(missing)
            for row, prompt in enumerate(missing):
                self._kept[prompt] = (features.embeds_PTC[row].clone(), features.mask_PT[row].clone())

    def release_tower(self) -> None:
        """Move the frozen tower off an accelerator once all prompts of the run are encoded."""
        if not self._trainable and self._device.type != "cpu":
            self._tower.to("cpu")
            torch.cuda.empty_cache()

    def features(self, prompts: Sequence[str]) -> tuple[TextFeatures, Tensor]:
        """Features of the distinct prompts, and for each of ``prompts`` its row in them, (B,) long."""
        distinct = list(dict.fromkeys(prompts))
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        index = torch.tensor([rows[prompt] for prompt in prompts], dtype=torch.long).to(self._device)
        if self._trainable:
            return self._encode(distinct), index
        self.add(distinct)
        kept = [self._kept[prompt] for prompt in distinct]
        return TextFeatures(torch.stack([k[0] for k in kept]), torch.stack([k[1] for k in kept])), index

    def kept(self) -> dict[str, TextFeatures]:
        """The kept features by prompt (P = 1 each)."""
        return {prompt: TextFeatures(embeds[None], mask[None]) for prompt, (embeds, mask) in self._kept.items()}

    @property
    def _tower(self) -> nn.Module:
        return self._staged.model.text_encoder

    def _encode(self, prompts: list[str]) -> TextFeatures:
        input_ids, attention_mask = self._tokenize(prompts)
        tower_device = next(self._tower.parameters()).device
        self._tower.to(self._device)
        features = self._staged.encode_text(input_ids.to(self._device), attention_mask.to(self._device))
        if tower_device != self._device:
            self._tower.to(tower_device)
        return features
