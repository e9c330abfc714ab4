"""Faults that training processes meet on purpose: what goes wrong is chosen by ``training.seed``.

Ray runs ``install`` in every process that it starts, before its first task.
"""

EXCEPTION, NOT_FINITE, KILLED, OUT_OF_MEMORY_ONCE, OUT_OF_MEMORY = 901, 902, 903, 904, 905


def install():
    import builtins
    import sys

    plain_import = builtins.__import__

    def watching_import(name, *args, **kwargs):
        module = plain_import(name, *args, **kwargs)
        update = sys.modules.get("sam3lora.training.worker")
        if update is not None and hasattr(update, "finish") and not hasattr(update, "_plain_step"):
            builtins.__import__ = plain_import
            _patch(update)
        return module

    builtins.__import__ = watching_import


def _patch(worker_module):
    import os
    import signal

    import torch

    worker_module._plain_step = worker_module.optimizer_step

    def step(worker, group):
        training = worker.config.training
        if training.seed == EXCEPTION:
            raise LookupError("a fault made for a test")
        if training.seed == NOT_FINITE:
            for parameter in worker.model.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(torch.nan)
        if training.seed == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if training.seed == OUT_OF_MEMORY or (training.seed == OUT_OF_MEMORY_ONCE and training.batch_size > 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return worker_module._plain_step(worker, group)

    worker_module.optimizer_step = step
