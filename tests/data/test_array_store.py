"""Arrays come back whole or not at all, the store keeps to its limit, and one process makes what several need."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sam3lora.data import array_store
from sam3lora.data.array_store import ArrayStore, digest, image_digest

KEYS = [digest("key", number) for number in range(12)]
ARRAY = np.arange(1000, dtype=np.uint8)
ENTRY_BYTES = ARRAY.nbytes + 128  # with the header of a .npy file


def new_store(root: Path, entries: float = 100) -> ArrayStore:
    """A store of a new run, with room for this many arrays."""
    return ArrayStore(root, int(entries * ENTRY_BYTES))


def filled_by_an_earlier_run(root: Path, *numbers: int) -> None:
    """Arrays under these keys, in order of their last use, the least recent first."""
    store = new_store(root)
    for position, number in enumerate(numbers):
        store.put(KEYS[number], ARRAY)
        os.utime(file_of(store, KEYS[number]), (1e9 + position, 1e9 + position))


def file_of(store: ArrayStore, key: str) -> Path:
    return store.root / key[:2] / f"{key[2:]}.npy"


def held(store: ArrayStore) -> list[int]:
    return [number for number, key in enumerate(KEYS) if file_of(store, key).is_file()]


def in_another_process(store: ArrayStore) -> ArrayStore:
    """The store as a process of the same run receives it: deepcopy uses the pickled state."""
    return copy.deepcopy(store)


def read_all(store: ArrayStore, numbers) -> int:
    """Read arrays as a run does and make the missing ones; returns how many were there."""
    found = 0
    for number in numbers:
        if store.get(KEYS[number]) is None:
            store.put(KEYS[number], ARRAY)
        else:
            found += 1
    assert sum(file.stat().st_size for file in store.root.glob("??/*")) <= store.limit_bytes
    return found


@pytest.fixture
def pause(monkeypatch):
    """Lets more than an hour pass."""
    passed = []
    clock = SimpleNamespace(
        time=lambda: time.time() + sum(passed), time_ns=lambda: time.time_ns() + sum(passed) * 10**9
    )
    monkeypatch.setattr(array_store, "time", clock)
    return lambda: passed.append(4000)


# ---- storing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [ARRAY, np.float32([[1.5, np.nan], [np.inf, -0.0]]), np.array(7, dtype=np.uint16), np.zeros((0, 3)), ARRAY[::2]],
    ids=["bytes", "floats", "scalar", "empty", "strided"],
)
def test_arrays_come_back_unchanged_in_later_runs_and_other_processes(tmp_path, array):
    assert new_store(tmp_path).put(KEYS[0], array)
    for store in (new_store(tmp_path), in_another_process(new_store(tmp_path))):
        kept = store.get(KEYS[0])
        assert (kept.dtype, kept.shape, kept.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert KEYS[0] in store
        assert KEYS[1] not in store
        assert store.get(KEYS[1]) is None


class Attack:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("damage", [0, 3, 60, 200, ENTRY_BYTES - 1, "garbage", "pickle"])
def test_a_damaged_file_counts_as_missing_and_is_replaced(tmp_path, damage, caplog):
    store = new_store(tmp_path)
    store.put(KEYS[0], ARRAY)
    file = file_of(store, KEYS[0])
    if damage == "garbage":
        file.write_bytes(b"\x93NUMPY\x01\x00v\x00" + b"garbage " * 200)
    elif damage == "pickle":
        np.save(file, np.array([Attack(tmp_path / "attacked")], dtype=object), allow_pickle=True)
    else:  # cut off after so many bytes
        file.write_bytes(file.read_bytes()[:damage])
    assert store.get(KEYS[0]) is None
    assert file.name in caplog.text
    assert KEYS[0] not in store
    assert store.put(KEYS[0], ARRAY)
    assert np.array_equal(store.get(KEYS[0]), ARRAY)
    assert not (tmp_path / "attacked").exists()


def test_a_failed_write_leaves_nothing_and_ends_writing(tmp_path, monkeypatch, caplog):
    # a full disk does not stop a run: it goes on with the arrays that are there
    store = new_store(tmp_path)
    store.put(KEYS[0], ARRAY)

    def write(stream, array, **options):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(np.lib.format, "write_array", write)
    assert not store.put(KEYS[1], ARRAY)
    assert not store.put(KEYS[2], ARRAY)
    assert caplog.text.count("no space left") == 1
    assert [path.name for path in tmp_path.glob("??/*")] == [file_of(store, KEYS[0]).name]
    assert np.array_equal(store.get(KEYS[0]), ARRAY)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        new_store(tmp_path / "file")


# ---- the limit -------------------------------------------------------------------------------------------------------


def test_least_recently_used_arrays_of_earlier_runs_are_evicted_and_those_of_this_run_stay(tmp_path, caplog):
    filled_by_an_earlier_run(tmp_path, 2, 0, 3, 1)
    store = new_store(tmp_path, entries=4.5)
    for number, left in ((4, [0, 1, 3, 4]), (5, [1, 3, 4, 5]), (6, [1, 4, 5, 6]), (7, [4, 5, 6, 7])):
        assert store.put(KEYS[number], ARRAY)
        assert held(store) == left
    assert [store.put(key, ARRAY) for key in KEYS[8:10]] == [False, False]
    assert held(store) == [4, 5, 6, 7]
    assert len(caplog.records) == 1


def test_arrays_that_this_run_used_stay(tmp_path, pause):
    # 0 was read, 1 was looked for, 2 was looked for by another process of this run, 3 was not used
    filled_by_an_earlier_run(tmp_path, 0, 1, 2, 3)
    store = new_store(tmp_path, entries=4.5)
    assert store.get(KEYS[0]) is not None
    assert KEYS[1] in store
    assert KEYS[2] in in_another_process(store)
    assert store.put(KEYS[4], ARRAY)
    assert held(store) == [0, 1, 2, 4]
    # they fill the store: nothing is added, and nothing is lost
    assert not store.put(KEYS[5], ARRAY)
    assert store.is_full
    assert held(store) == [0, 1, 2, 4]
    # a run after a pause may evict them
    pause()
    assert new_store(tmp_path, entries=4.5).put(KEYS[5], ARRAY)
    assert len(held(store)) == 4


@pytest.mark.parametrize("order", [1, -1])
def test_runs_in_turn_find_the_arrays_that_fit(tmp_path, order, pause):
    # there is room for half of the arrays that each trial of a sweep reads, one after another and two at a time
    hits = [read_all(new_store(tmp_path, entries=6.5), range(12)[:: order**trial]) for trial in range(3)]
    assert hits == [0, 6, 6]
    first, second = new_store(tmp_path, entries=6.5), new_store(tmp_path, entries=6.5)
    assert [read_all(first, range(12)), read_all(second, range(12)), read_all(first, range(12))] == [6, 6, 6]
    # epochs may take longer than an hour: a trial's first one finds the arrays of the trial before it
    store = new_store(tmp_path, entries=6.5)
    pause()
    assert read_all(store, range(11, -1, -1)) == 6
    assert read_all(in_another_process(store), range(11, -1, -1)) == 6


def test_other_images_get_room_an_hour_later(tmp_path, pause):
    first = new_store(tmp_path, entries=4.5)
    read_all(first, range(4))
    assert read_all(new_store(tmp_path, entries=4.5), range(4, 8)) == 0
    assert held(first) == [0, 1, 2, 3]
    pause()
    assert read_all(first, range(4)) == 4  # a long run that goes on
    assert read_all(new_store(tmp_path, entries=4.5), range(4, 8)) == 0
    assert held(first) == [0, 1, 2, 3]
    pause()
    later = new_store(tmp_path, entries=4.5)
    assert [read_all(later, range(4, 8)), read_all(later, range(4, 8))] == [0, 4]
    assert held(first) == [4, 5, 6, 7]
    assert len(list(tmp_path.glob("runs/*"))) == 1


def test_an_array_that_was_used_since_the_count_stays(tmp_path):
    # arrays are counted once in a while; another process of the run has used the oldest since then
    filled_by_an_earlier_run(tmp_path, 0, 1, 2)
    store = new_store(tmp_path, entries=30)
    assert store.put(KEYS[3], ARRAY)  # counts
    store.limit_bytes = int(4.5 * ENTRY_BYTES)
    store._content.added_bytes = 0
    assert KEYS[0] in in_another_process(store)
    assert store.put(KEYS[4], ARRAY)
    assert held(store) == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("total", "free", "fits"),
    [
        (10**12, 3 * 10**9, True),
        (10**12, 2 * 10**9 + 500, False),  # 2 GB stay free
        (10**10, 6 * 10**8, True),  # of a small disk a twentieth stays free
        (10**10, 5 * 10**8 + 500, False),
    ],
)
def test_the_disk_is_not_filled(tmp_path, monkeypatch, total, free, fits):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(total, 0, free))
    assert new_store(tmp_path).put(KEYS[0], ARRAY) == fits


def test_files_of_killed_writers_are_removed(tmp_path):
    store = new_store(tmp_path)
    store.put(KEYS[0], ARRAY)
    old, young = (file_of(store, KEYS[0]).with_name(f".{name}.tmp") for name in ("old", "young"))
    for file in (old, young):
        file.touch()
    os.utime(old, (1e9, 1e9))
    new_store(tmp_path).put(KEYS[1], ARRAY)
    assert (old.exists(), young.exists()) == (False, True)


# ---- claims ----------------------------------------------------------------------------------------------------------


def claimed(root: Path, key: str) -> bool:
    """Whether another thread, with a store of its own, gets the lock after waiting."""

    def claim() -> bool:
        with new_store(root).claim(key, wait=True) as got:
            return got

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(claim).result()


def test_one_process_holds_a_claim_at_a_time(tmp_path):
    store, other = new_store(tmp_path), new_store(tmp_path)
    alike = KEYS[0][:3] + KEYS[1][3:]  # shares the lock of key 0
    with store.claim(KEYS[0]) as mine, other.claim(KEYS[0]) as theirs, other.claim(KEYS[1]) as another:
        assert (mine, theirs, another) == (True, False, True)
        with store.claim(alike) as second:
            assert not second
    with other.claim(KEYS[0]) as theirs:
        assert theirs
    assert claimed(tmp_path, alike)


def test_waiting_for_a_claim_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(array_store, "LONGEST_WAIT_S", 0.1)
    with new_store(tmp_path).claim(KEYS[0]):
        assert not claimed(tmp_path, KEYS[0])


HOLD = """
with store.claim(keys[0]):
    print("ready", flush=True)
    time.sleep(600)
"""
MAKE_ALL = """
print("ready", flush=True)
sys.stdin.readline()
for key in keys:
    with store.claim(key, wait=True):
        if store.get(key) is None:
            print(key)
            store.put(key, np.arange(10))
"""


def start_process(root: Path, code: str) -> subprocess.Popen:
    """A process that runs the code with this store, once it is ready."""
    head = "import sys, time\nfrom pathlib import Path\nimport numpy as np\n"
    head += "from sam3lora.data.array_store import ArrayStore\n"
    head += f"store, keys = ArrayStore(Path({str(root)!r}), 10**6), {KEYS!r}\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + code],
        env=os.environ | {"PYTHONPATH": str(Path(array_store.__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_claim_of_a_dead_process_is_free(tmp_path):
    holder = start_process(tmp_path, HOLD)
    with new_store(tmp_path).claim(KEYS[0]) as got:
        assert not got
    holder.kill()
    holder.communicate(timeout=60)
    assert claimed(tmp_path, KEYS[0])


def test_each_array_is_made_by_one_of_several_processes(tmp_path):
    processes = [start_process(tmp_path, MAKE_ALL) for _ in range(2)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    made = [key for process in processes for key in process.communicate(timeout=60)[0].split()]
    assert Counter(made) == dict.fromkeys(KEYS, 1)


# ---- image files -----------------------------------------------------------------------------------------------------


def test_image_digest_is_that_of_the_content(tmp_path, monkeypatch):
    # the file is read once, in this run and later ones, until it changes
    image, other = tmp_path / "a.png", tmp_path / "b.png"
    image.write_bytes(b"pixels")
    other.write_bytes(b"pixels")
    reads = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: reads.append(1) or original(*arguments))
    for store in (new_store(tmp_path / "store"), new_store(tmp_path / "store")):
        assert image_digest(store, str(image)) == hashlib.sha256(b"pixels").hexdigest()
    assert len(reads) == 1
    assert image_digest(store, str(other)) == image_digest(store, str(image))
    # the new content has the same length; set the time, as a file system's clock tick may be too coarse to change it
    image.write_bytes(b"others")
    now = time.time_ns()
    os.utime(image, ns=(now, now))
    assert image_digest(store, str(image)) == hashlib.sha256(b"others").hexdigest()
    image.unlink()
    with pytest.raises(FileNotFoundError):
        image_digest(store, str(image))
