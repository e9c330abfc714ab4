"""Numbers that COCO's evaluation fixes (https://cocodataset.org/#detection-eval)."""

from __future__ import annotations

MAX_DETECTIONS = 100
"""Detections per image and category that count, those of the highest scores."""

SIZE_LIMITS = (32**2, 96**2)
"""Areas between small, medium and large objects, in pixels of the original image."""
