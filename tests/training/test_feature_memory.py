"""Which tensors stay in memory, and how long those stay that were read ahead."""

from __future__ import annotations

import gc
import threading

import torch

from sam3lora.training.features.memory import FeatureMemory


class User:
    """Stands for a batch."""


def tensor(value: int) -> torch.Tensor:
    return torch.full((25,), float(value))  # 100 bytes


def test_the_first_that_fit_stay():
    memory = FeatureMemory(250)
    assert [memory.keep(str(number), tensor(number)) for number in range(4)] == [True, True, False, False]
    assert [memory.get(str(number)) is not None for number in range(4)] == [True, True, False, False]
    assert memory.keep("0", tensor(7))  # in its place
    assert torch.equal(memory.get("0"), tensor(7))
    assert memory.num_bytes == 200
    assert not FeatureMemory(0).keep("a", tensor(1))


def test_read_ahead_is_read_once():
    memory, reads, user = FeatureMemory(100), [], User()

    def read(key: str) -> torch.Tensor | None:
        reads.append(key)
        return None if key == "none" else tensor(len(reads))

    memory.read_ahead(["a", "b", "b", "none"], read, user)
    memory.read_ahead(["a", "b"], read, user)
    assert reads == ["a", "b", "none"]
    assert torch.equal(memory.get("b"), tensor(2))
    assert memory.get("b") is None  # had no room to stay
    assert torch.equal(memory.get("a"), memory.get("a"))
    assert memory.get("none") is None


def test_nothing_is_held_for_a_batch_that_is_gone():
    memory, user, other = FeatureMemory(0), User(), User()
    memory.read_ahead(["a", "b"], lambda key: tensor(1), user)
    memory.read_ahead(["c"], lambda key: tensor(1), other)
    assert len(memory) == 3
    del user
    gc.collect()
    assert memory.get("a") is None
    assert memory.get("c") is not None
    assert len(memory) == 0


def test_threads_read_ahead_while_another_uses_it():
    memory, users, errors = FeatureMemory(1000), [User() for _ in range(4)], []
    keys = [str(number) for number in range(40)]

    def work(user: User) -> None:
        try:
            for _ in range(20):
                memory.read_ahead(keys, lambda key: tensor(int(key)), user)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    found = [(key, memory.get(key)) for _ in range(20) for key in keys]
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert all(value is None or torch.equal(value, tensor(int(key))) for key, value in found)
    assert memory.num_bytes == 1000
