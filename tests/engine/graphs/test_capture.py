"""The stand-in for CUDA graphs refuses what a GPU could not capture, and repeats what Python decided once."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from jobs.bench.recorded_graphs import CaptureError, RecordingCapturer
from sam3lora.engine.graphs.capture import SWITCH, CudaCapturer, wants_cuda_graphs

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


@pytest.fixture
def cuda(monkeypatch) -> mock.Mock:
    """Stands for torch.cuda: notes what is asked of it, in order."""
    asked = mock.Mock()

    @contextmanager
    def block(name, *arguments, **options):
        asked(name)
        yield
        asked("end of " + name)

    for name in ("Stream", "CUDAGraph", "graph_pool_handle", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name, **options: block(name, *args, **options))
    monkeypatch.setattr(torch.cuda, "device", lambda device: block("device"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 << 30, 80 << 30))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: asked("clear"))
    return asked


def test_a_capture_comes_after_a_run_on_its_stream_and_owns_its_memory(cuda):
    capturer = CudaCapturer(torch.device("cuda"))
    cuda.reset_mock()

    def function() -> None:
        cuda("run")
        assert not torch.is_autocast_cache_enabled()

    capturer.capture(function)
    order = [call.args[0] for call in cuda.call_args_list]
    warm_up = ["stream", "run", "end of stream"]
    assert order == ["device", *warm_up, "clear", "graph", "run", "end of graph", "clear", "end of device"]
    assert torch.is_autocast_cache_enabled()


def test_a_capture_leaves_memory_for_what_runs_without(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 << 30, 80 << 30))
    with pytest.raises(torch.OutOfMemoryError, match="9216 of 81920 MiB"):
        CudaCapturer(torch.device("cuda")).capture(lambda: None)


def test_a_failed_capture_leaves_autocast_as_it_was(cuda):
    with pytest.raises(ZeroDivisionError):
        CudaCapturer(torch.device("cuda")).capture(lambda: 1 / 0)
    assert torch.is_autocast_cache_enabled()
