"""Metrics of binary tasks against those of pysodmetrics, with and without the stretching of maps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sam3lora.evaluation.dense.saliency import SaliencyMeter

SHIPPED = Path(__file__).parents[2] / "reference"
REFERENCE = Path(os.environ.get("SAM3LORA_REFERENCE_DIR", SHIPPED)) / "dense_metrics.json"


@pytest.fixture(scope="module")
def reference() -> dict:
    assert REFERENCE.is_file(), f"{REFERENCE} is missing: set SAM3LORA_REFERENCE_DIR to a folder of reference cases"
    return json.loads(REFERENCE.read_text())


def wrong(meter: SaliencyMeter, expected: dict[str, float]) -> list[str]:
    found = vars(meter.values())
    return [name for name, value in expected.items() if not abs(found[name] - value) <= 1e-9]


@pytest.mark.parametrize("normalise", [False, True])
def test_every_case_and_the_whole_set(reference, normalise):
    # A mean of maxima is no maximum of a mean: the set shows which one is taken.
    key = "min_max_on" if normalise else "min_max_off"
    assert len(reference["cases"]) >= 10
    whole = SaliencyMeter(normalise=normalise)
    for number, case in enumerate(reference["cases"]):
        prediction, truth = np.array(case["pred"], dtype=np.uint8), np.array(case["gt"], dtype=np.uint8)
        alone = SaliencyMeter(normalise=normalise)
        for meter in (alone, whole):
            meter.add(prediction, truth, image_id=number)
        assert wrong(alone, case[key]) == [], case["name"]
    assert len(reference["whole_set"][key]) == 9
    assert wrong(whole, reference["whole_set"][key]) == []
