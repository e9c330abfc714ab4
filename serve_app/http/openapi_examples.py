"""Examples of responses in the OpenAPI description."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np

from sam3lora.data.rle import encode_rle


def segment_example() -> dict[str, Any]:
    mask = {"size": [64, 64], "counts": "ed02n1000000001O000000000000000000000000"}
    found = {"score": 0.87, "box_xyxy": [22.0, 16.0, 50.0, 44.0], "area_px": 613, "mask": mask}
    return {
        "request_id": "a1",
        "image": {"width": 64, "height": 64},
        "adapter": None,
        "results": [{"prompt": "red disc", "presence": 0.98, "num_detections": 1, "detections": [found]}],
        "timing_ms": {"body": 0.2, "check": 0.3, "forward": 8.1, "total": 10.4},
    }


def dense_example() -> dict[str, Any]:
    labels = np.zeros((64, 64), np.uint8)
    cv2.circle(labels, (36, 30), 14, 1, -1)
    area_px = int(labels.sum())
    areas = (("background", 4096 - area_px, 0), ("water", area_px, 1))
    return {
        "request_id": "a1",
        "image": {"width": 64, "height": 64},
        "adapter": "land-cover",
        "task": "dense",
        "classes": [
            {"name": name, "area_px": area, "share": round(area / 4096, 6), "value": value}
            for name, area, value in areas
        ],
        "label_png": base64.b64encode(cv2.imencode(".png", labels)[1].tobytes()).decode(),
        "timing_ms": {"body": 0.2, "check": 0.3, "forward": 8.1, "total": 10.4},
    }


def refine_example() -> dict[str, Any]:
    disc = encode_rle(cv2.circle(np.zeros((64, 64), np.uint8), (36, 30), 14, 1, -1) > 0)
    part = encode_rle(cv2.circle(np.zeros((64, 64), np.uint8), (36, 30), 6, 1, -1) > 0)
    masks = [
        {"score": 0.92, "box_xyxy": [22.0, 16.0, 51.0, 45.0], "area_px": 613, "mask": disc},
        {"score": 0.71, "box_xyxy": [30.0, 24.0, 43.0, 37.0], "area_px": 113, "mask": part},
    ]
    chosen, other = (mask | {"mask_id": f"msk_{number:032x}"} for number, mask in enumerate(masks))
    return {
        "request_id": "a1",
        "image": {"width": 64, "height": 64},
        "adapter": None,
        "click_adapter": None,
        "objects": [chosen | {"object_score": 0.99, "alternatives": [other]}],
        "timing_ms": {"body": 0.2, "check": 0.3, "forward": 4.1, "total": 6.4},
    }
