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
        trainer = sys.modules.get("sam3lora.training.trainer")
        if trainer is not None and hasattr(trainer, "Trainer") and not hasattr(trainer, "_plain_step"):
            builtins.__import__ = plain_import
            _patch(trainer)
        return module

    builtins.__import__ = watching_import


def _patch(trainer_module):
    import os
    import signal

    import torch

    trainer_module._plain_step = trainer_module.optimizer_step

    def step(trainer, group):
        training = trainer.config.training
        if training.seed == EXCEPTION:
            raise LookupError("a fault made for a test")
        if training.seed == NOT_FINITE:
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(torch.nan)
        if training.seed == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if training.seed == OUT_OF_MEMORY or (training.seed == OUT_OF_MEMORY_ONCE and training.batch_size > 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return trainer_module._plain_step(trainer, group)

    trainer_module.optimizer_step = step
