"""How well the labels of a data set can be drawn at all by maps of so many pixels, as a dense head makes them.

    python -m jobs.bench.dense_study_limit datasets/cracks --sides 64 96 288

A head has 4 pixels to a side of a patch: 64 x 64 of the tiny model, 96 x 96 of SAM 3 at 336 pixels, 288 x 288 at 1008.
Here each pixel is the share of it that a class covers, and the map is enlarged to the image as the head's is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from sam3lora.data.label_maps import LabelMaps
from sam3lora.data.prompts import prompt_key
from sam3lora.data.split_files import find_split_or_whole
from sam3lora.engine.dense_maps import plane
from sam3lora.evaluation.dense.class_counts import Counts, mean_or_none

_SHARES = (0.3, 0.4, 0.5)  # from which a pixel has the class; the best one counts


def best_iou(data_dir: Path, side: int) -> float | None:
    """Mean IoU over the classes of the validation images, each against all else."""
    index = find_split_or_whole(data_dir).read()
    labels = LabelMaps({prompt_key(name): value for value, name in enumerate(index.names, 1)}, overlapping=True)
    counts = np.zeros((len(_SHARES), 3, labels.num_maps), np.int64)
    for row in range(len(index)):
        for number, truth_HW in enumerate(labels.of_record(index.record(row)) == 1):
            counts[:, :, number] += _counts(truth_HW, side)
    return max((mean_or_none(Counts(*one).iou()) for one in counts), key=lambda value: value or 0.0)


def _counts(truth_HW: np.ndarray, side: int) -> np.ndarray:
    """For each of `_SHARES`, pixels in the truth, in the enlarged map and in both."""
    covered = cv2.resize(truth_HW.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    enlarged_HW = plane(covered, (truth_HW.shape[0], truth_HW.shape[1]))
    found = [enlarged_HW >= share for share in _SHARES]
    return np.array([(truth_HW.sum(), found_HW.sum(), (found_HW & truth_HW).sum()) for found_HW in found])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="folders with valid/")
    parser.add_argument("--sides", nargs="+", type=int, default=[64, 96, 288])
    given = parser.parse_args(arguments)
    print(f"| data | {' | '.join(f'{side} pixels' for side in given.sides)} |")
    print(f"|---|{'---:|' * len(given.sides)}")
    for data_dir in given.data:
        values = [best_iou(data_dir, side) for side in given.sides]
        print(f"| {data_dir.name} | {' | '.join('n/a' if one is None else f'{one:.3f}' for one in values)} |")


if __name__ == "__main__":
    main()
