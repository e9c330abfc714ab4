"""The collector rests while much is imported, and what was imported is left alone only if that succeeded."""

from __future__ import annotations

import gc

import pytest

from sam3lora.garbage_collection import importing_for_good, no_garbage_collection


def test_the_collector_rests_in_the_block_and_works_after_it():
    was_enabled, frozen = [], gc.get_freeze_count()

    def fail() -> None:
        was_enabled.append(gc.isenabled())
        raise ImportError

    for block in (no_garbage_collection, importing_for_good):
        with pytest.raises(ImportError), block():
            fail()
        assert gc.isenabled()
        assert gc.get_freeze_count() <= frozen
    assert was_enabled == [False, False]


def test_later_passes_leave_alone_what_was_imported():
    frozen = gc.get_freeze_count()
    with importing_for_good():
        imported: list[object] = []
        imported.append(imported)  # a cycle
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen
    assert not any(found is imported for found in gc.get_objects())
    later: list[object] = []
    assert any(found is later for found in gc.get_objects())
