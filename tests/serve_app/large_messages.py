"""Images and answers of many MiB, to a running service: what one message between its processes has to hold."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import cv2
import numpy as np

MIB = 2**20
LIMITS = {"max_prompts": 2000, "timeout_s": 120}


def check_large_messages(url: str) -> None:
    """5, 12 and 31 MiB in each direction, as they are and base64; the service must have `LIMITS`."""
    for mib in (5, 12, 31):
        image = noise_png(mib)
        assert _post(f"{url}/v1/images", image, "image/png")["width"] == _side(mib)
        answer = _post(f"{url}/v1/segment?prompts=crack&masks=none", image, "image/png")
        assert answer["image"]["width"] == _side(mib)
    large = cv2.imencode(".png", np.full((7000, 7000), 200, np.uint8))[1].tobytes()
    image_id = _post(f"{url}/v1/images", large, "image/png")["image_id"]
    for mib, num_prompts in ((5, 220), (12, 520), (31, 1340)):
        asked = {"image_id": image_id, "threshold": 0.0, "nms": "none", "max_detections": 200}
        asked |= {"prompts": [f"hole {number}" for number in range(num_prompts)]}
        answer = _post(f"{url}/v1/segment", json.dumps(asked).encode(), "application/json")
        assert len(answer["results"]) == num_prompts
        assert len(json.dumps(answer)) > mib * MIB


def noise_png(mib: int) -> bytes:
    side = _side(mib)
    pixels = np.random.default_rng(mib).integers(0, 256, (side, side, 3), np.uint8)
    data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes()
    assert mib * MIB <= len(data) < (mib + 0.2) * MIB
    return data


def _side(mib: int) -> int:
    return int((mib * MIB / 3) ** 0.5) + 1


def _post(url: str, body: bytes, kind: str) -> dict[str, Any]:
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=180) as response:
        return json.load(response)
