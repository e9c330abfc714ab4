"""Drawn scenes for the click head: tokens of the frozen trunk, made once, and the objects' masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.pretrain.bank import MAX_OBJECTS, SceneBank
from jobs.pretrain.vision_stage import to_pixel_values
from sam3lora.files import whole_file
from sam3lora.model.loading import LoadedBase

LEAST_PIXELS = 60
"""Smaller objects are left out: the masks of the tiny model are 64 x 64."""


@dataclass
class ClickScenes:
    """`I` scenes and their tokens after the trunk (I, S, C), in bfloat16."""

    bank: SceneBank
    tokens_ISC: Tensor

    @classmethod
    def open(cls, bank: SceneBank, base: LoadedBase, file: Path) -> ClickScenes:
        """Tokens are read from a file, which is made if it is not there."""
        if not file.exists():
            with whole_file(file) as scratch:
                save_file({"tokens": _tokens(bank, base)}, scratch)
        return cls(bank, load_file(file)["tokens"])

    def __len__(self) -> int:
        return len(self.bank)

    def objects(self, rows: np.ndarray, rng: np.random.Generator, most: int) -> tuple[Tensor, Tensor]:
        """At most so many objects of each scene by chance: the place of their scene in `rows` (N,), masks (N, H, W)."""
        places, masks = [], []
        for place, row in enumerate(rows):
            labels_HW = np.asarray(self.bank.labels[row])
            numbers = large_objects(labels_HW)
            for number in rng.permutation(numbers)[:most]:
                places.append(place)
                masks.append(labels_HW == number)
        return torch.tensor(places), torch.from_numpy(np.stack(masks))


def large_objects(labels_HW: np.ndarray) -> np.ndarray:
    """The numbers of a scene's objects that show enough of themselves."""
    areas = np.bincount(labels_HW.ravel(), minlength=MAX_OBJECTS + 1)[1:]
    return np.flatnonzero(areas >= LEAST_PIXELS) + 1


@torch.inference_mode()
def _tokens(bank: SceneBank, base: LoadedBase, batch: int = 32) -> Tensor:
    trunk, found = base.model.vision_encoder.backbone, []
    for start in range(0, len(bank), batch):
        pixels = to_pixel_values(np.array(bank.images[start : start + batch]))
        found.append(trunk(pixels).last_hidden_state.to(torch.bfloat16))
    return torch.cat(found)
