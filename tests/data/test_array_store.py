"""Arrays come back whole or not at all, the store stays within its bound, and one process makes what several need."""

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
    return ArrayStore(root, int(entries * ENTRY_BYTES))


def file_of(store: ArrayStore, key: str) -> Path:
    return store.root / key[:2] / f"{key[2:]}.npy"


def age(store: ArrayStore, *keys: str) -> None:
    """Let arrays be of earlier runs, the first the oldest."""
    for number, key in enumerate(keys):
        os.utime(file_of(store, key), (1e9 + number, 1e9 + number))


@pytest.fixture
def pause(monkeypatch):
    """Lets an hour and a bit go by."""
    passed = []

    def forward() -> None:
        passed.append(4000)

    clock = SimpleNamespace(
        time=lambda: time.time() + sum(passed), time_ns=lambda: time.time_ns() + sum(passed) * 10**9
    )
    monkeypatch.setattr(array_store, "time", clock)
    return forward


def visit(store: ArrayStore, numbers) -> int:
    """Read arrays as a run does, and make what is missing; returns how many were there."""
    found = 0
    for number in numbers:
        if store.get(KEYS[number]) is None:
            store.put(KEYS[number], ARRAY)
        else:
            found += 1
    assert sum(file.stat().st_size for file in store.root.glob("??/*")) <= store.limit_bytes
    return found


def held(store: ArrayStore) -> list[int]:
    return [number for number, key in enumerate(KEYS) if file_of(store, key).is_file()]


def travelled(store: ArrayStore) -> ArrayStore:
    """The store as another process of the run has it."""
    return copy.deepcopy(store)  # by what it is pickled with


# ---- keeping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [ARRAY, np.float32([[1.5, np.nan], [np.inf, -0.0]]), np.array(7, dtype=np.uint16), np.zeros((0, 3)), ARRAY[::2]],
    ids=["bytes", "floats", "scalar", "empty", "strided"],
)
def test_arrays_come_back_as_they_were(tmp_path, array):
    # Also in a later run, and in a process that the store was sent to.
    assert new_store(tmp_path).put(KEYS[0], array)
    for store in (new_store(tmp_path), travelled(new_store(tmp_path))):
        kept = store.get(KEYS[0])
        assert (kept.dtype, kept.shape) == (array.dtype, array.shape)
        assert kept.tobytes() == array.tobytes()
        assert KEYS[0] in store
        assert KEYS[1] not in store
        assert store.get(KEYS[1]) is None


@pytest.mark.parametrize("length", [0, 3, 60, 200, ENTRY_BYTES - 1])
def test_truncated_file_counts_as_missing_and_is_replaced(tmp_path, length, caplog):
    store = new_store(tmp_path)
    store.put(KEYS[0], ARRAY)
    file = file_of(store, KEYS[0])
    file.write_bytes(file.read_bytes()[:length])
    assert store.get(KEYS[0]) is None
    assert "is damaged" in caplog.text
    assert KEYS[0] not in store
    assert store.put(KEYS[0], ARRAY)
    assert np.array_equal(store.get(KEYS[0]), ARRAY)


def test_garbage_and_pickles_count_as_missing(tmp_path):
    store = new_store(tmp_path)
    file = file_of(store, KEYS[0])
    file.parent.mkdir()
    file.write_bytes(b"\x93NUMPY\x01\x00v\x00" + b"garbage " * 200)
    assert store.get(KEYS[0]) is None

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    np.save(file, np.array([Attack()], dtype=object), allow_pickle=True)
    assert store.get(KEYS[0]) is None
    assert not (tmp_path / "attacked").exists()


def test_failed_write_leaves_nothing_and_ends_writing(tmp_path, monkeypatch, caplog):
    # A full disk is no reason to stop a run: it goes on with what is kept.
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


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        new_store(tmp_path / "file")


# ---- the bound -------------------------------------------------------------------------------------------------------


def test_oldest_arrays_of_earlier_runs_go_first(tmp_path):
    before = new_store(tmp_path)
    for key in KEYS[:4]:
        before.put(key, ARRAY)
    age(before, KEYS[2], KEYS[0], KEYS[3], KEYS[1])
    store = new_store(tmp_path, entries=4.5)
    assert store.put(KEYS[4], ARRAY)
    assert held(store) == [0, 1, 3, 4]
    assert store.put(KEYS[5], ARRAY)
    assert held(store) == [1, 3, 4, 5]


def test_arrays_that_this_run_read_stay(tmp_path, pause):
    # 0 was read, 1 was asked for, 2 by another process of this run, 3 by nobody.
    before = new_store(tmp_path)
    for key in KEYS[:4]:
        before.put(key, ARRAY)
    age(before, *KEYS[:4])
    store = new_store(tmp_path, entries=4.5)
    assert store.get(KEYS[0]) is not None
    assert KEYS[1] in store
    assert KEYS[2] in travelled(store)
    assert store.put(KEYS[4], ARRAY)
    assert held(store) == [0, 1, 2, 4]
    # They fill the store: nothing is added, and nothing is lost.
    assert not store.put(KEYS[5], ARRAY)
    assert store.is_full
    assert held(store) == [0, 1, 2, 4]
    # A run after a pause may drop them.
    pause()
    assert new_store(tmp_path, entries=4.5).put(KEYS[5], ARRAY)
    assert len(held(store)) == 4


def test_what_one_run_wrote_stays(tmp_path, caplog):
    store = new_store(tmp_path, entries=3.5)
    assert [store.put(key, ARRAY) for key in KEYS[:5]] == [True, True, True, False, False]
    assert held(store) == [0, 1, 2]
    assert caplog.text.count("nothing more is added") == 1


@pytest.mark.parametrize("order", [1, -1])
def test_runs_in_turn_find_what_fits(tmp_path, order):
    # Room for half of what each of them reads: trials of a sweep, one after another and two at a time.
    hits = [visit(new_store(tmp_path, entries=6.5), range(12)[:: order**trial]) for trial in range(3)]
    assert hits == [0, 6, 6]
    first, second = new_store(tmp_path, entries=6.5), new_store(tmp_path, entries=6.5)
    assert [visit(first, range(12)), visit(second, range(12)), visit(first, range(12))] == [6, 6, 6]


def test_epochs_that_take_longer_than_an_hour(tmp_path, pause):
    # A trial's first epoch finds what the trial before it left, however long that was ago by then.
    visit(new_store(tmp_path, entries=6.5), range(12))
    store = new_store(tmp_path, entries=6.5)
    pause()
    assert visit(store, range(11, -1, -1)) == 6
    assert visit(travelled(store), range(11, -1, -1)) == 6


def test_other_images_get_room_an_hour_later(tmp_path, pause):
    first = new_store(tmp_path, entries=4.5)
    visit(first, range(4))
    assert visit(new_store(tmp_path, entries=4.5), range(4, 8)) == 0
    assert held(first) == [0, 1, 2, 3]
    pause()
    assert visit(first, range(4)) == 4  # a long run that goes on
    assert visit(new_store(tmp_path, entries=4.5), range(4, 8)) == 0
    assert held(first) == [0, 1, 2, 3]
    pause()
    later = new_store(tmp_path, entries=4.5)
    assert [visit(later, range(4, 8)), visit(later, range(4, 8))] == [0, 4]
    assert held(first) == [4, 5, 6, 7]
    assert len(list(tmp_path.glob("runs/*"))) == 1


def test_array_that_was_read_since_the_count_stays(tmp_path):
    # What may go is counted once in a while; another process of the run has read the oldest since.
    before = new_store(tmp_path)
    for key in KEYS[:3]:
        before.put(key, ARRAY)
    age(before, *KEYS[:3])
    store = new_store(tmp_path, entries=30)
    assert store.put(KEYS[3], ARRAY)  # counted
    store.limit_bytes = int(4.5 * ENTRY_BYTES)
    store._content.added = 0
    assert KEYS[0] in travelled(store)
    assert store.put(KEYS[4], ARRAY)
    assert held(store) == [0, 2, 3, 4]


def test_disk_is_not_filled(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = [3 * 10**9]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free[0]))
    store = new_store(tmp_path)
    assert store.put(KEYS[0], ARRAY)
    free[0] = 2 * 10**9 + 500
    assert not store.put(KEYS[1], ARRAY)
    # Of a small disk a twentieth stays free.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 0, 6 * 10**8))
    assert new_store(tmp_path).put(KEYS[1], ARRAY)


def test_files_of_killed_writers_are_removed(tmp_path):
    store = new_store(tmp_path)
    store.put(KEYS[0], ARRAY)
    old, young = (file_of(store, KEYS[0]).with_name(f".{name}.tmp") for name in ("old", "young"))
    for file in (old, young):
        file.touch()
    os.utime(old, (1e9, 1e9))
    new_store(tmp_path).put(KEYS[1], ARRAY)
    assert (old.exists(), young.exists()) == (False, True)


# ---- who makes it ----------------------------------------------------------------------------------------------------


def test_one_holds_the_right_at_a_time(tmp_path):
    store, other = new_store(tmp_path), new_store(tmp_path)
    with store.claim(KEYS[0]) as mine, other.claim(KEYS[0]) as theirs, other.claim(KEYS[1]) as another:
        assert (mine, theirs, another) == (True, False, True)
    with other.claim(KEYS[0]) as theirs:
        assert theirs


def test_keys_that_share_a_lock(tmp_path):
    store = new_store(tmp_path)
    alike = KEYS[0][:3] + KEYS[1][3:]
    with store.claim(KEYS[0]) as first, store.claim(alike) as second:
        assert (first, second) == (True, False)
    with store.claim(alike, wait=True) as second:
        assert second


def test_wait_has_an_end(tmp_path):
    with new_store(tmp_path).claim(KEYS[0]):
        code = f"from tests_claim import *; print(claimed({str(tmp_path)!r}, {KEYS[0]!r}, 0.1))"
        found = run_light(tmp_path, code)
    assert found == "False"


HELPER = """
from pathlib import Path
import sys, time
import numpy as np
from sam3lora.data import array_store
from sam3lora.data.array_store import ArrayStore

def claimed(root, key, longest):
    array_store.LONGEST_WAIT_S = longest
    with ArrayStore(Path(root), 10**6).claim(key, wait=True) as got:
        return got

def hold(root, key):
    with ArrayStore(Path(root), 10**6).claim(key):
        print("held", flush=True)
        time.sleep(600)

def make_all(root, keys, log):
    store = ArrayStore(Path(root), 10**6)
    print("ready", flush=True)
    sys.stdin.readline()
    for key in keys:
        with store.claim(key, wait=True):
            if store.get(key) is None:
                with open(log, "a") as file:
                    file.write(key + "\\n")
                store.put(key, np.arange(10))
"""


def start_light(folder: Path, code: str) -> subprocess.Popen:
    """A process that imports this package without torch."""
    scripts = folder / "scripts"
    scripts.mkdir(exist_ok=True)
    (scripts / "tests_claim.py").write_text(HELPER)
    paths = os.pathsep.join([str(scripts), str(Path(array_store.__file__).parents[2])])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_light(folder: Path, code: str) -> str:
    process = start_light(folder, code)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out.strip()


def test_right_of_a_dead_process_is_free(tmp_path):
    store = new_store(tmp_path / "store")
    holder = start_light(tmp_path, f"from tests_claim import *; hold({str(store.root)!r}, {KEYS[0]!r})")
    assert holder.stdout.readline() == "held\n"
    with store.claim(KEYS[0]) as got:
        assert not got
    holder.kill()
    holder.communicate(timeout=60)
    with store.claim(KEYS[0], wait=True) as got:
        assert got


def test_each_array_is_made_by_one_of_several_processes(tmp_path):
    log = tmp_path / "log"
    code = f"from tests_claim import *; make_all({str(tmp_path / 'store')!r}, {KEYS!r}, {str(log)!r})"
    processes = [start_light(tmp_path, code) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert Counter(log.read_text().split()) == dict.fromkeys(KEYS, 1)


# ---- image files -----------------------------------------------------------------------------------------------------


def test_image_digest_is_that_of_the_content(tmp_path, monkeypatch):
    # The file is read once, in this run and later ones, until it changes; the same content elsewhere is the same.
    image, copy = tmp_path / "a.png", tmp_path / "b.png"
    image.write_bytes(b"pixels")
    copy.write_bytes(b"pixels")
    reads = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: reads.append(1) or original(*arguments))
    for store in (new_store(tmp_path / "store"), new_store(tmp_path / "store")):
        assert image_digest(store, str(image)) == hashlib.sha256(b"pixels").hexdigest()
    assert len(reads) == 1
    assert image_digest(store, str(copy)) == image_digest(store, str(image))
    # The same length, and a time as it changes within a clock tick of most file systems.
    image.write_bytes(b"others")
    now = time.time_ns()
    os.utime(image, ns=(now, now))
    assert image_digest(store, str(image)) == hashlib.sha256(b"others").hexdigest()
    image.unlink()
    with pytest.raises(FileNotFoundError):
        image_digest(store, str(image))
