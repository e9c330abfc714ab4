"""Ray Data gives what the plain loop gives, in the order of the plan, on real data."""

from __future__ import annotations

from threading import Thread

import numpy as np
import pytest
from ray.data import DataContext

from sam3lora.data import pipeline
from sam3lora.data.batch import Batch
from sam3lora.data.coco import CocoIndex
from sam3lora.data.images import ImageError
from sam3lora.data.pipeline import iterate_batches, stream_batches, warm_up_reading
from sam3lora.data.plan import plan_run
from sam3lora.data.sample import DecodeSettings

from .coco_builder import SHARED_FOLDERS, annotation


def assert_same(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        assert np.array_equal(value, getattr(b, name)), name
        assert getattr(value, "dtype", None) == getattr(getattr(b, name), "dtype", None), name


def test_stream_equals_iterate_over_epochs(folder, ray_session, monkeypatch):
    # 11 images, ragged numbers of objects, three epochs of augmentation, in datasets that end within an epoch
    monkeypatch.setattr(pipeline, "_BATCHES_PER_DATASET", 7)
    annotations = [annotation(10 * i + k, image_id=i) for i in range(11) for k in range(i % 3)]
    index = CocoIndex.from_folder(folder.write(annotations, num_images=11))
    settings = DecodeSettings(names=index.names, resolution=64, mask_size=32, augmentation="sam3", horizontal_flip=0.5)
    plans = list(plan_run(len(index), images_per_step=2, num_epochs=3, seed=5))
    expected = list(iterate_batches(index.table, plans, settings))
    streamed = list(stream_batches(index.table, plans, settings, num_cpus=2))
    assert [(b.epoch, b.step) for b in streamed] == [(p.epoch, p.step) for p in plans]
    for a, b in zip(expected, streamed, strict=True):
        assert_same(a, b)
    # the epochs place the same image differently
    boxes = [np.concatenate([b.boxes_cxcywh_T4 for b in expected if b.epoch == epoch]) for epoch in range(2)]
    assert sorted(boxes[0].ravel()) != sorted(boxes[1].ravel())


def test_broken_image_stops_the_stream_with_its_name_or_is_listed(folder, ray_session):
    path = folder.write([annotation(i, image_id=i) for i in range(4)], num_images=4)
    (path / "2.png").write_bytes(b"no image")
    index = CocoIndex.from_folder(path)
    plans = list(plan_run(4, images_per_step=1, num_epochs=1, shuffle=False))
    settings = {"names": index.names, "resolution": 32, "mask_size": 32}
    batches = stream_batches(index.table, plans, DecodeSettings(**settings))
    assert [next(batches).image_ids.tolist() for _ in range(2)] == [[0], [1]]
    with pytest.raises(ImageError, match=r"cannot read image .*2\.png"):
        next(batches)
    skipping = stream_batches(index.table, plans, DecodeSettings(**settings, on_bad_image="skip"))
    assert [[skip[0] for skip in batch.skipped] for batch in skipping] == [[], [], [2], []]


def test_stream_needs_no_free_cpu(folder, ray_session):
    # Training workers may have taken all: tasks that asked for a CPU of their own would wait without end.
    index = CocoIndex.from_folder(folder.write([annotation(0)]))

    @ray_session.remote(num_cpus=ray_session.cluster_resources()["CPU"])
    def read() -> list[int]:
        settings = DecodeSettings(names=index.names, resolution=32, mask_size=32)
        [batch] = stream_batches(index.table, [(0, 0, [0])], settings)
        return batch.image_ids.tolist()

    assert ray_session.get(read.remote(), timeout=120) == [0]


def test_warming_up_beside_it_changes_nothing_that_is_read(folder, ray_session):
    # Both set the options of Ray Data, which are those of the whole process, and put them back.
    index = CocoIndex.from_folder(folder.write([annotation(i, image_id=i) for i in range(4)], num_images=4))
    settings, before = DecodeSettings(names=index.names, resolution=32, mask_size=32), DataContext.get_current()
    plans = list(plan_run(4, images_per_step=1, num_epochs=1, shuffle=False))
    beside = Thread(target=warm_up_reading)
    beside.start()
    streamed = list(stream_batches(index.table, plans, settings))
    beside.join()
    for expected, found in zip(iterate_batches(index.table, plans, settings), streamed, strict=True):
        assert_same(expected, found)
    assert DataContext.get_current() is before


def test_no_batches_need_no_ray(folder):
    index = CocoIndex.from_folder(folder.write([annotation(0)]))
    assert list(stream_batches(index.table, [], DecodeSettings(names=index.names))) == []


@pytest.mark.parametrize("name", SHARED_FOLDERS)
def test_real_data_sets_load(shared_data, ray_session, name):
    for split in ("train", "valid"):
        index = CocoIndex.from_folder(shared_data / name / split)
        settings = DecodeSettings(names=index.names, resolution=112, mask_size=112, num_negatives=2)
        rows = list(range(min(len(index), 6)))
        plans = [(0, step, [row]) for step, row in enumerate(rows)]
        batches = list(stream_batches(index.table, plans, settings))
        assert [b.image_ids[0] for b in batches] == [index.record(row)["image_id"] for row in rows]
        for batch, row in zip(batches, rows, strict=True):
            record = index.record(row)
            present = {a["category"] for a in record["annotations"]}
            absent = [prompt for prompt, num in zip(batch.prompts_B, batch.num_B, strict=True) if num == 0]
            assert not present & set(absent)
            assert batch.num_B.sum() == sum(not a["iscrowd"] for a in record["annotations"])
            assert batch.boxes_cxcywh_T4.min(initial=0) >= 0
            assert batch.boxes_cxcywh_T4.max(initial=0) <= 1


def test_traps_of_the_real_data_sets(shared_data):
    # id 0 is an unused row whose name repeats a real class
    for name, category in (("potholes_gopro", "pothole"), ("facade", "facade")):
        index = CocoIndex.from_folder(shared_data / name / "train")
        assert index.names.count(category) == 1
        assert 0 not in index.category_names
    # dense masks as RLE, and a JSON that points into images/
    cracks = CocoIndex.from_folder(shared_data / "uav_crack_dense" / "train")
    assert cracks.record(0)["path"].endswith(".png")
    # crowds, gaps in the ids
    coco = CocoIndex.from_folder(shared_data / "coco_tiny_permissive" / "valid")
    assert next(i for i in coco.faults if i.kind == "crowd").count == 6
