"""Items come ahead, in order, with the errors in their places; nothing is left behind."""

from __future__ import annotations

import gc
import threading

import pytest

from sam3lora.training.prefetch import prefetch


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sam3lora-prefetch"]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_order_is_that_of_the_source(ahead):
    assert list(prefetch(range(50), lambda number: number * 2, ahead=ahead)) == list(range(0, 100, 2))
    assert list(prefetch([], str, ahead=ahead)) == []
    assert not threads()


def test_two_items_are_made_while_one_is_used():
    started = [threading.Event() for _ in range(4)]
    prepared_in = set()

    def prepare(number):
        prepared_in.add(threading.current_thread().name)
        return number

    def source():
        for number, event in enumerate(started):
            event.set()
            yield number

    items = prefetch(source(), prepare)
    assert not any(event.is_set() for event in started)  # nothing is read before it is asked for
    assert next(items) == 0
    assert started[1].wait(10)
    assert started[2].wait(10)
    assert not started[3].is_set()  # the third waits until there is room
    assert next(items) == 1
    assert started[3].wait(10)
    assert list(items) == [2, 3]
    assert prepared_in == {"sam3lora-prefetch"}


@pytest.mark.parametrize("where", ["source", "prepare"])
def test_an_error_comes_in_its_place(where):
    def source():
        yield from range(3)
        if where == "source":
            raise KeyError("broken")
        yield 3

    def prepare(number):
        if number == 3:
            raise KeyError("broken")
        return number

    items = prefetch(source(), prepare)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="broken"):
        next(items)
    assert next(items, None) is None
    assert not threads()


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_the_thread_and_the_source_end_with_the_iterator(how):
    ended = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            ended.set()

    items = prefetch(endless(), str)
    assert next(items) == "0"
    assert len(threads()) == 1
    if how == "closed":
        items.close()
    else:
        del items
        gc.collect()
    assert ended.wait(10)
    assert not threads()


def test_no_room_at_all():
    with pytest.raises(ValueError, match="positive, got 0"):
        prefetch([], str, ahead=0)
