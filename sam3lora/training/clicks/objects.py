"""The objects of a batch as simulated users click on them, the same however the step is divided.

Random numbers belong to an image in an epoch. So prompts do not depend on the batch, the worker or an interruption.

Shapes: `N` objects, `h` `w` pixels of masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sam3lora.config.clicks import StartShares
from sam3lora.data.batch import Batch
from sam3lora.data.prompts import sample_rng
from sam3lora.engine.clicks.answers import MAX_OBJECTS
from sam3lora.training.clicks.sampling import Prompts, Start, draw_start, next_clicks, start_prompts

_CLICK_STREAM = 3  # of `sample_rng`; decoding uses 0 to 2


@dataclass(frozen=True, eq=False)
class ClickTargets:
    """At most `MAX_OBJECTS` objects of one image, whose interactions start in the same way.

    Attributes:
        image: Position of the image in its batch.
        truth_Nhw: bool.
        generator: Of all that is drawn for them.
    """

    image: int
    start: Start
    truth_Nhw: Tensor
    generator: torch.Generator

    def first(self, side: int) -> Prompts:
        """The first prompts; `side` is that of the model's input in pixels."""
        image_N = torch.zeros(len(self.truth_Nhw), dtype=torch.long, device=self.truth_Nhw.device)
        return start_prompts(self.start, self.truth_Nhw, side, self.generator, image_N)

    def next_clicks(self, found_Nhw: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Clicks (N, 1, 2) and labels (N, 1) that correct what was found."""
        return next_clicks(self.truth_Nhw, found_Nhw, side, self.generator)


def click_targets(batch: Batch, starts: StartShares, seed: int, device: torch.device) -> list[ClickTargets]:
    """The objects of a batch that have a mask."""
    masks_TMM = batch.masks(device)
    assert masks_TMM is not None, "a run of task clicks decodes masks"
    image_T = batch.query_image_B[batch.query_T]
    found = []
    for image in np.unique(image_T[batch.mask_valid_T]).tolist():
        rng = sample_rng(seed, batch.epoch, int(batch.image_ids[image]), _CLICK_STREAM)
        rows = np.flatnonzero((image_T == image) & batch.mask_valid_T)
        for first in range(0, len(rows), MAX_OBJECTS):
            on_host = torch.Generator().manual_seed(int(rng.integers(2**63)))
            generator = torch.Generator(device).manual_seed(int(rng.integers(2**63)))
            own = torch.from_numpy(rows[first : first + MAX_OBJECTS]).to(device)
            found.append(ClickTargets(image, draw_start(starts, on_host), masks_TMM[own], generator))
    return found


def groups_of(objects: Iterable[ClickTargets]) -> Iterator[list[ClickTargets]]:
    """Those of one start together, up to `MAX_OBJECTS` objects: prompts of one kind pass the head at once."""
    by_start: dict[Start, list[ClickTargets]] = {}
    for one in objects:
        group = by_start.setdefault(one.start, [])
        if group and sum(len(other.truth_Nhw) for other in group) + len(one.truth_Nhw) > MAX_OBJECTS:
            yield by_start.pop(one.start)
        by_start.setdefault(one.start, []).append(one)
    yield from by_start.values()


def joined(prompts: Sequence[Prompts]) -> Prompts:
    """Prompts of one kind, one after the other."""
    boxes = [one.boxes_xyxy_N4 for one in prompts if one.boxes_xyxy_N4 is not None]
    masks = [one.masks_Nhw for one in prompts if one.masks_Nhw is not None]
    return Prompts(
        torch.cat([one.points_Nk2 for one in prompts]),
        torch.cat([one.labels_Nk for one in prompts]),
        torch.cat(boxes) if boxes else None,
        torch.cat(masks) if masks else None,
    )
