"""Index tables drawn at random, for comparing what counts columns with what goes through records."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from sam3lora.data.label_table import SCHEMA

CATEGORIES = ("crack", "gear", "Red Bolt", "weed")


def draw_table(seed: int, *, num_images: int = 30) -> pa.Table:
    """Some images without objects, some with crowd regions only; in pieces that begin inside a larger array."""
    generator = np.random.default_rng(seed)
    known = CATEGORIES[: generator.integers(1, 5)]
    records, annotation_id = [], 0
    for number in range(num_images + 2):
        annotations = []
        for _ in range(generator.integers(0, 6)):
            category = int(generator.integers(len(known)))
            annotation_id += 1
            annotations.append(
                {
                    "id": annotation_id,
                    "category_id": category,
                    "category": known[category],
                    "bbox_xywh": [1.0, 2.0, 3.0, 4.0],
                    "segmentation": f"[[{annotation_id},0,9,0,9,9]]",
                    "iscrowd": bool(generator.random() < 0.4),
                }
            )
        records.append(
            {
                "image_id": 7 * number,
                "path": f"/{number}.png",
                "file_name": f"{number}.png",
                "width": 100,
                "height": 80,
                "annotations": annotations,
            }
        )
    table = pa.Table.from_pylist(records, schema=SCHEMA)
    return pa.concat_tables([table.slice(1, 9), table.slice(10, 0), table.slice(10, num_images - 9)])
