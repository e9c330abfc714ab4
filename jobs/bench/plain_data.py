"""The plain way to read training data: a `Dataset` around pycocotools and OpenCV, in a torch `DataLoader`.

What a careful user would write: one read of the annotations, OpenCV to decode, the resizing that SAM 3's processor does
(PIL shrinks, OpenCV enlarges, which is the same to one level and faster), polygons scaled to the side of the masks and
drawn by pycocotools, pixels left as bytes until they are on the device.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset


class PlainDataset(Dataset[dict[str, Any]]):
    """Images of a COCO folder with their queries, one for each category that there is: present or absent."""

    def __init__(self, folder: Path, annotation_file: str, resolution: int, mask_size: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco = COCO(str(folder / annotation_file))
        self._folder, self._resolution, self._mask_size = folder, resolution, mask_size
        self._image_ids = sorted(self._coco.getImgIds())
        self._categories = {row["id"]: row["name"] for row in self._coco.loadCats(self._coco.getCatIds())}

    def __len__(self) -> int:
        return len(self._image_ids)

    def __getitem__(self, number: int) -> dict[str, Any]:
        image_id = self._image_ids[number]
        record = self._coco.loadImgs(image_id)[0]
        annotations = self._coco.loadAnns(self._coco.getAnnIds(image_id))
        by_category: dict[int, list[dict[str, Any]]] = {category: [] for category in self._categories}
        for annotation in annotations:
            by_category[annotation["category_id"]].append(annotation)
        present = [category for category, found in by_category.items() if found]
        asked = present + [category for category, found in by_category.items() if not found]
        ordered = [annotation for category in asked for annotation in by_category[category]]
        size_wh = (record["width"], record["height"])
        return {
            "image": self._read(self._folder / record["file_name"]),
            "prompts": [self._categories[category] for category in asked],
            "num_targets": torch.tensor([len(by_category[category]) for category in asked]),
            "boxes": self._boxes([annotation["bbox"] for annotation in ordered], size_wh),
            "masks": self._masks([annotation["segmentation"] for annotation in ordered], size_wh),
        }

    def _read(self, path: Path) -> torch.Tensor:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise OSError(f"cannot read image {path}")
        side = self._resolution
        if side >= max(image.shape[:2]):
            image = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
        else:
            image = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        return torch.from_numpy(image)

    def _boxes(self, boxes_xywh: list[list[float]], size_wh: tuple[int, int]) -> torch.Tensor:
        scaled = np.array(boxes_xywh, dtype=np.float64).reshape(-1, 4) / (*size_wh, *size_wh)
        scaled[:, :2] += scaled[:, 2:] / 2
        return torch.from_numpy(scaled.astype(np.float32))

    def _masks(self, segmentations: list[list[list[float]]], size_wh: tuple[int, int]) -> torch.Tensor:
        side = self._mask_size
        masks = np.zeros((len(segmentations), side, side), dtype=bool)
        for mask, polygons in zip(masks, segmentations, strict=True):
            parts = [(np.reshape(polygon, (-1, 2)) / size_wh * side).ravel().tolist() for polygon in polygons]
            mask[:] = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, side, side)))
        return torch.from_numpy(masks)


def plain_loader(
    folder: Path, annotation_file: str, *, resolution: int, mask_size: int, batch_size: int, num_workers: int
) -> DataLoader[dict[str, Any]]:
    """Batches in the order of the annotations."""
    return DataLoader(
        PlainDataset(folder, annotation_file, resolution, mask_size),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_samples,
        persistent_workers=num_workers > 0,
        prefetch_factor=2 if num_workers > 0 else None,
    )


def collate_samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Images (I, S, S, 3) uint8, boxes (T, 4), masks (T, M, M) bool, targets of each query and its image."""
    return {
        "images": torch.stack([sample["image"] for sample in samples]),
        "prompts": [prompt for sample in samples for prompt in sample["prompts"]],
        "query_image": torch.arange(len(samples)).repeat_interleave(
            torch.tensor([len(sample["prompts"]) for sample in samples])
        ),
        "num_targets": torch.cat([sample["num_targets"] for sample in samples]),
        "boxes": torch.cat([sample["boxes"] for sample in samples]),
        "masks": torch.cat([sample["masks"] for sample in samples]),
    }
