"""Faults of the labels are told when a run begins, and stay in its log and its adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sam3lora.errors import UserError
from sam3lora.model.adapter.metadata import read_metadata
from sam3lora.training.datasets import load_run_data
from sam3lora.training.launch import train
from sam3lora.training.metrics_log import MetricsLog, describe_line

from ..data.faulty_labels import FAULTS, add_faults, counts
from .run_folder import folder_of, lines_of


@pytest.fixture
def faulty(scenes, tmp_path) -> Path:
    """The scenes, with the faults of `add_faults` in each split."""
    folder = shutil.copytree(scenes, tmp_path / "faulty")
    for split in ("train", "valid"):
        add_faults(folder / split)
    return folder


def test_a_run_tells_its_faults(make_config, faulty, capsys):
    config = make_config(
        "logging.progress=lines", "training.max_steps=1", data_dir=str(faulty), num_epochs=1, on_bad_image="skip"
    )
    train(config)
    [line] = lines_of(config, "faults")
    assert [fault["split"] for fault in line["faults"]] == ["train"] * 3 + ["valid"] * 3
    assert counts(line["faults"]) == {kind: 2 * count for kind, count in FAULTS.items()}
    assert {(fault["kind"], fault["level"]) for fault in line["faults"]} >= {
        ("missing_image", "lost"),
        ("out_of_bounds", "changed"),
    }
    # The adapter's data summary counts what is left out, and the images that are there.
    metadata = read_metadata(folder_of(config) / "last")
    assert (metadata.data["num_labels_left_out"], metadata.data["num_images_left_out"]) == (2, 2)
    assert (metadata.data["num_train_images"], metadata.data["num_valid_images"]) == (6, 3)
    # A person sees it once, after the first line, with the missing image's name.
    printed = capsys.readouterr().out
    assert printed.count("2 labels and 2 images are left out") == 1
    assert printed.index("gone/a.jpg") < printed.index("step 1/1")
    assert f"sam3lora data check {faulty}" in printed
    assert lines_of(config, "end")[0]["num_skipped"] == 0


def test_a_clean_run_tells_nothing(make_config, scenes):
    data = load_run_data(make_config(), 112)
    assert data.faults == []
    assert (data.summary()["num_labels_left_out"], data.summary()["num_images_left_out"]) == (0, 0)


def test_counts_are_of_the_file_whatever_categories_are_chosen(make_config, faulty):
    names = load_run_data(make_config(), 112).train.names
    config = make_config(f"data.categories=['{names[-1]}']", data_dir=str(faulty), on_bad_image="skip")
    assert counts(load_run_data(config, 112).faults) == {kind: 2 * count for kind, count in FAULTS.items()}


def test_a_missing_image_that_stops_is_named(make_config, faulty):
    with pytest.raises(UserError, match=r"gone/a\.jpg"):
        load_run_data(make_config(data_dir=str(faulty)), 112)


def test_without_any_query_the_faults_say_why(make_config, scenes, tmp_path):
    # All objects are degenerate and absence is not known: the categories are not to blame.
    folder = shutil.copytree(scenes, tmp_path / "empty")
    file = folder / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"] = [item | {"bbox": [1, 1, 0, 0], "segmentation": []} for item in content["annotations"][:1]]
    file.write_text(json.dumps(content))
    config = make_config("data.exhaustive=false", "training.num_negatives=0", data_dir=str(folder))
    with pytest.raises(UserError, match="without any area"):
        load_run_data(config, 112)


def test_the_end_counts_skipped_images(tmp_path):
    assert describe_line({"kind": "end", "step": 1, "num_skipped": 0}) is None
    assert describe_line({"kind": "end", "step": 1, "num_skipped": 1}).startswith("1 image ")
    assert describe_line({"kind": "end", "step": 1, "num_skipped": 12}).startswith("12 images ")
    log = MetricsLog(tmp_path)
    log.write("step", step=1)
    assert [line["kind"] for line in log.lines()] == ["step"]
