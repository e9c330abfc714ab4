"""What a batch run reads and the folder it writes: pieces without a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import psutil
import pytest

from sam3lora.errors import UserError
from sam3lora.inference.batch.image_list import ImageSource, choose_categories, list_images
from sam3lora.inference.batch.job import predict_batch
from sam3lora.inference.batch.merge import write_bad_images, write_dataset
from sam3lora.inference.batch.output_folder import open_output, part_path, read_parts, write_part
from sam3lora.inference.batch.worker import ModelChoice

from ..data.faulty_labels import counts
from .batch_cases import PROMPTS, REPOSITORY, begin, draw_image

# --- input ---


def test_folder_is_searched_without_the_output_and_hidden_files(tmp_path):
    for name in ("b.JPG", "sub/b.jpg", "sub/.hidden.jpg", ".cache/a.jpg", "out/dataset/train/b.jpg", "notes.md"):
        draw_image(tmp_path / (name if name.lower().endswith("jpg") else "x.png")).rename(tmp_path / name)
    (tmp_path / "sub" / "circle").symlink_to(tmp_path)
    images, categories, faults = list_images(tmp_path, leave_out=tmp_path / "out")
    assert [image.name for image in images] == ["b.JPG", "sub/b.jpg"]
    assert [image.image_id for image in images] == [1, 2]
    assert (categories, faults) == ({}, [])


def test_list_is_relative_to_its_file_and_may_name_what_is_missing(tmp_path):
    (tmp_path / "list.txt").write_text("x/a.jpg\n\n../elsewhere/a.jpg\nx/a.jpg\n")
    images, _, _ = list_images(tmp_path / "list.txt", leave_out=tmp_path / "out")
    # A path listed twice is one image; names tell equal base names apart.
    assert [image.path for image in images] == [f"{tmp_path}/x/a.jpg", f"{tmp_path.parent}/elsewhere/a.jpg"]
    assert len({image.name for image in images}) == 2


def test_coco_file_keeps_its_ids_and_sizes(tmp_path):
    draw_image(tmp_path / "a.png")
    images = [
        {"id": 7, "file_name": "a.png", "height": 40, "width": 60},
        {"id": 0, "file_name": "gone.png", "height": 1, "width": 1},
    ]
    annotation = {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 1, 9, 9]}
    categories = [{"id": 5, "name": "Gear"}, {"id": 9, "name": "Gear"}, {"id": 2, "name": "leaf"}]
    raw = {"images": images, "annotations": [annotation], "categories": categories}
    (tmp_path / "labels.json").write_text(json.dumps(raw))
    found, known, faults = list_images(tmp_path / "labels.json", leave_out=tmp_path / "out")
    assert found == [
        ImageSource(7, str(tmp_path / "a.png"), "a.png", (40, 60)),
        ImageSource(0, str(tmp_path / "gone.png"), "gone.png", None),  # missing: to be reported, not forgotten
    ]
    # The missing one is told at the start; what concerns the labels (a repeated name) is not.
    assert [(fault["kind"], fault["count"], fault["examples"]) for fault in faults] == [
        ("missing_image", 1, ["image 0 gone.png"])
    ]
    # Of ids that share a name the one that annotations use counts.
    assert choose_categories(["gear", "bolt", "leaf"], known) == {"gear": 5, "bolt": 6, "leaf": 2}


def test_ids_are_kept_as_the_coco_file_writes_them(tmp_path):
    for name in "abc":
        draw_image(tmp_path / f"{name}.png")
    images = [
        {"id": "left/1", "file_name": "a.png", "height": 40, "width": 60},
        {"id": "0007", "file_name": "b.png", "height": 40, "width": 60},
        # One id for two files: neither can be told from the other in the results.
        {"id": 3, "file_name": "c.png", "height": 40, "width": 60},
        {"id": 3, "file_name": "a.png", "height": 40, "width": 60},
        {"file_name": "c.png"},
    ]
    categories = [{"id": "1", "name": "gear"}, {"id": "thing", "name": "bolt"}]
    (tmp_path / "labels.json").write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    found, known, faults = list_images(tmp_path / "labels.json", leave_out=tmp_path / "out")
    assert [(image.image_id, image.name) for image in found] == [("left/1", "a.png"), ("0007", "b.png")]
    assert counts(faults) == {"ambiguous_image_id": 2, "bad_image_entry": 1}
    assert known == {"gear": "1", "bolt": "thing"}
    # The next free number is none that a text stands for.
    assert choose_categories(["gear", "new", "bolt"], known) == {"gear": "1", "new": 2, "bolt": "thing"}


def test_an_image_whose_label_is_unclear_is_asked(tmp_path):
    # It is left out of training, but to be asked it needs no label.
    draw_image(tmp_path / "a.png")
    raw = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 99, "bbox": [1, 1, 5, 5]}],
        "categories": [],
    }
    (tmp_path / "labels.json").write_text(json.dumps(raw))
    found, _, faults = list_images(tmp_path / "labels.json", leave_out=tmp_path / "out")
    assert found == [ImageSource(1, str(tmp_path / "a.png"), "a.png", (40, 60))]
    assert faults == []


def test_input_and_prompts_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="expected a folder, a list"):
        list_images(tmp_path / "nowhere", leave_out=tmp_path)
    with pytest.raises(UserError, match="holds no images"):
        list_images(tmp_path, leave_out=tmp_path / "out")
    for prompts in ([], ["gear", "  "], ["Gear", " gear"]):
        with pytest.raises(UserError, match="prompt"):
            choose_categories(prompts, {})


# --- output ---


def test_output_goes_on_only_with_the_same_settings(tmp_path):
    output = tmp_path / "out"
    begin(output, {"threshold": 0.5, "categories": {"gear": 1}})
    (output / "parts" / ".half.tmp").touch()
    begin(output, {"threshold": 0.5, "categories": {"gear": 1}})
    assert not list((output / "parts").iterdir())  # what a crash left half-written is gone
    with pytest.raises(UserError, match=r"threshold was 0\.5, now 0\.3.*--overwrite"):
        begin(output, {"threshold": 0.3, "categories": {"gear": 1}})
    (output / "notes.md").touch()
    (output / "predictions.json").touch()
    begin(output, {"threshold": 0.3, "categories": {"gear": 1}}, overwrite=True)
    assert sorted(os.listdir(output)) == ["batch.json", "notes.md", "parts"]


def test_folder_of_something_else_is_not_touched(tmp_path):
    draw_image(tmp_path / "dataset" / "a.png")
    (tmp_path / "batch.json").write_text('{"name": "of another program"}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds no batch run"):
            begin(tmp_path, {}, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["batch.json", "dataset"]


def test_second_start_leaves_the_first_alone(small_base, tmp_path):
    # It would remove what the first is writing and what it has counted.
    draw_image(tmp_path / "images" / "a.png")
    output = tmp_path / "out"
    with open_output(output, {}):
        writing = [output / ".predictions.json.tmp", output / "parts" / ".run.tmp", output / "parts" / "run.tries"]
        for path in writing:
            path.touch()
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"another process .*{output}"):
                predict_batch(
                    tmp_path / "images", output, ["gear"], choice=ModelChoice(str(small_base)), overwrite=overwrite
                )
        assert all(path.exists() for path in writing)
    begin(output, {})


HOLD = """
import subprocess, sys, time
from pathlib import Path
from sam3lora.inference.batch.output_folder import open_output
with open_output(Path(sys.argv[1]), {}):
    print(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, close_fds=False).pid, flush=True)
    time.sleep(60)
"""


def test_lock_ends_with_a_killed_process_and_not_with_its_children(tmp_path):
    # Workers of a killed run may live on for a while.
    output = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    child = psutil.Process(int(holder.stdout.readline()))
    try:
        with pytest.raises(UserError, match="another process is writing results"):
            begin(output, {})
        holder.kill()
        holder.communicate()
        begin(output, {})
        assert child.is_running()
    finally:
        holder.kill()
        child.kill()


def test_results_are_counted_through_once_whatever_the_number_of_images(tmp_path):
    # Once for each image would take hours for a million of them.
    class Places(dict):
        num_walks = 0

        def items(self):
            self.num_walks += 1
            return super().items()

    sources = [ImageSource(number, f"/{number}.png", f"{number}.png") for number in range(5)]
    (tmp_path / "out" / "parts").mkdir(parents=True)
    bad = [{"path": source.path, "error": "the file is empty"} for source in sources]
    write_part(part_path(tmp_path / "out", "run", 0), "0" * 64, bad)
    finished = read_parts(tmp_path / "out")
    finished.places = places = Places(finished.places)
    write_dataset(tmp_path / "set", sources, finished, PROMPTS)
    assert len(write_bad_images(tmp_path / "bad.json", sources, finished)) == 5
    assert places.num_walks == 1
