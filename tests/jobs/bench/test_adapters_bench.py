"""A mixed batch is asked what the plain way is asked, and finds the same. Times decide nothing here."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.bench import adapters
from jobs.bench.adapters import KINDS, NUM_ADAPTERS, Requests, compare_adapters
from jobs.bench.processes import Measured
from sam3lora.errors import UserError


@pytest.mark.parametrize("num_images", [1, 8])
def test_every_adapter_has_as_many_requests(num_images):
    folders = tuple(Path(f"adapter_{number}") for number in range(4))
    requests = Requests("tiny", folders, num_images=num_images)
    assert [requests.adapter(number) for number in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({requests.pixels(number, 56).tobytes() for number in range(8)}) == num_images
    assert {Requests("tiny", folders[:1]).adapter(number) for number in range(8)} == {0}


def test_too_few_requests():
    with pytest.raises(UserError, match="at least 4, one for each adapter, got 3"):
        compare_adapters("tiny", num_requests=3)


@pytest.mark.slow
def test_all_cases_find_what_the_requests_find_one_by_one(monkeypatch):
    # in this process: starting one for each way takes longer than the work
    def measure(ways, *, rounds, **_):
        return {name: Measured((1.0,), 0.0, 1.0, (work.make(**work.arguments)(),)) for name, work in ways.items()}

    monkeypatch.setattr(adapters, "measure_in_turns", measure)
    found = compare_adapters("tiny", num_requests=NUM_ADAPTERS, repeats=1)
    assert len(found) == 2 + len(KINDS)
    for case in found:
        names = [way.name for way in case.ways]
        assert names == ["sam3lora, 4 adapters", "sam3lora, 1 adapter", "transformers and PEFT, 4 adapters"]
        assert case.facts["requests with equally many"] == "4 of 4"
        assert case.facts["detections, sam3lora"] == 4 * 3  # of 32 object queries
        assert case.facts["largest difference of scores"] < 1e-4
