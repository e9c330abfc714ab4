"""The stand-in for CUDA graphs refuses what a GPU could not capture, and repeats what Python decided once."""

from __future__ import annotations

import pytest
import torch

from jobs.bench.recorded_graphs import CaptureError, RecordingCapturer
from sam3lora.engine.graphs.capture import SWITCH, wants_cuda_graphs

VALUES = torch.arange(4.0)


@pytest.mark.parametrize(
    "reads",
    [
        lambda: VALUES[0].item(),
        lambda: VALUES.tolist() if VALUES.sum() > 0 else None,
        lambda: VALUES[VALUES > 1],
        lambda: VALUES.nonzero(),
        lambda: torch.equal(VALUES, VALUES),
        lambda: torch.masked_select(VALUES, VALUES > 1),
        lambda: VALUES + torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda: torch.bincount(VALUES.long()),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_capture_reads_no_value_and_takes_none_from_the_host(reads, mode):
    with mode(), pytest.raises(CaptureError):
        RecordingCapturer().capture(reads)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_repetition_sees_new_values_and_old_decisions(mode):
    with mode():
        given, result, doubles = torch.ones(3), torch.zeros(3), [True]

        def function() -> None:
            value = given.view(3, 1).expand(3, 2).sum(1)
            result.copy_(value * 2 if doubles[0] else value)

        replay = RecordingCapturer().capture(function)
        doubles[0] = False
        given.fill_(5)
        replay()
    assert result.tolist() == [20, 20, 20]


def test_one_setting_switches_them_off(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    assert wants_cuda_graphs(None)
    assert not wants_cuda_graphs(False)
    monkeypatch.setenv(SWITCH, "0")
    assert not wants_cuda_graphs(None)
    assert wants_cuda_graphs(True)
