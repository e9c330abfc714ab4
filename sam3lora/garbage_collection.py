"""The garbage collector, paused while many objects are made of which none is garbage."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Make objects in the block without passes of the collector, which would search them again and again.

    It makes importing torch and transformers a fifth shorter.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def importing_for_good() -> Iterator[None]:
    """Import in the block, in a process of our own, without passes of the collector through what was imported: ever.

    Torch and transformers are half a million objects. The first passes after them would take most of a second, and each
    full pass later on a third.
    """
    with no_garbage_collection():
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries complain about objects that are left at the end
