"""Checks before a sweep starts, the order of trials, and the records of failed ones."""

import json
import shutil

import pytest
import ray.cloudpickle
from ray.tune.search import Searcher

from sam3lora.data.images import ImageError
from sam3lora.errors import OutOfMemory, UserError, WorkerLost
from sam3lora.folder_lock import locked_folder
from sam3lora.training.update import NonFiniteLoss
from sam3lora.tune.run import sweep, sweep_folder
from sam3lora.tune.run import trial as trial_run
from sam3lora.tune.run.ledger import Ledger, TrialRecord
from sam3lora.tune.run.trial import StoppedEarly
from sam3lora.tune.search.proposals import Proposer
from sam3lora.tune.search.ray_tune import LedgerSearcher
from sam3lora.tune.space.reader import load_space

from ..data.faulty_labels import FAULTS, add_faults, counts

SPACE = {
    "name": "small",
    "base": "quick_test",
    "parameters": {"lora.rank": {"choice": [2, 4, 16]}},
    "search": {"metric": "valid_loss", "num_trials": 3},
}


@pytest.fixture
def no_trials(monkeypatch):
    """A sweep without Ray: it stands still where trials would begin."""

    class StoodStill(Exception):
        pass

    def stop(*args):
        raise StoodStill

    monkeypatch.setattr(sweep, "_run_trials", stop)
    return StoodStill


def space(data_dir, **changes):
    return load_space(SPACE | changes, overrides=[f"training.data_dir={data_dir}"])


def test_a_folder_holds_one_sweep_of_one_space_and_one_driver(data_dir, tmp_path, no_trials):
    folder = tmp_path / "sweep"
    same = space(data_dir)
    with pytest.raises(UserError, match="nothing to resume"):
        sweep.run_sweep(same, folder, resume=True)
    for _ in range(2):  # a start that failed before its first trial may be repeated
        with pytest.raises(no_trials):
            sweep.run_sweep(same, folder)
    other = space(data_dir, parameters={"lora.rank": {"choice": [2, 4, 8]}})
    with pytest.raises(UserError, match=r"another search space: .*lora\.rank"):
        sweep.run_sweep(other, folder, resume=True)
    with pytest.raises(no_trials):
        sweep.run_sweep(space(data_dir, search=SPACE["search"] | {"num_trials": 4}), folder, resume=True)
    Ledger(folder).write(TrialRecord(0, {"lora.rank": 8}, is_base=True))
    with pytest.raises(UserError, match="already holds a sweep: give --resume"):
        sweep.run_sweep(same, folder)
    with locked_folder(folder, "running a sweep"), pytest.raises(UserError, match="another process is running a sweep"):
        sweep.run_sweep(same, folder)


def test_faults_of_the_labels_are_told_once_at_the_start(data_dir, tmp_path, no_trials, capsys):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    add_faults(folder / "valid")
    with pytest.raises(no_trials):
        sweep.run_sweep(space(folder, set={"training.on_bad_image": "skip"}), tmp_path / "sweep")
    printed = capsys.readouterr().out
    assert printed.count("1 label and 1 image are left out") == 1
    assert "gone/a.jpg" in printed
    summary = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert counts(summary["faults"]) == FAULTS
    # A clean set tells nothing.
    with pytest.raises(no_trials):
        sweep.run_sweep(space(data_dir), tmp_path / "clean")
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "clean" / "sweep.json").read_text())["faults"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"set": {"data.valid_split": "night"}}, "a sweep compares trials on validation images"),
        ({"constraints": {"max_trainable_parameters": 3}}, "over the budget"),
    ],
    ids=["no validation images", "a budget that nothing meets"],
)
def test_what_cannot_work_is_refused_before_anything_is_written(data_dir, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        sweep.run_sweep(space(data_dir, **changes), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("split", "message"), [("train", "train"), ("valid", "no annotation file|_annotations.coco.json")]
)
def test_a_split_without_annotations_is_found_before_any_trial(data_dir, tmp_path, split, message):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    (folder / split / "_annotations.coco.json").unlink()
    with pytest.raises(UserError, match=message):
        sweep.run_sweep(space(folder), tmp_path / "sweep")


@pytest.mark.parametrize(
    ("metric", "annotations", "reason"),
    [("map", [], "no object"), ("cgf1", None, "no prompt is absent")],
)
def test_a_metric_that_has_no_value_on_the_validation_images_is_refused(
    data_dir, tmp_path, metric, annotations, reason
):
    """mAP without objects; cgF1 of one category that is in every image."""
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    file = folder / "valid" / "_annotations.coco.json"
    coco = json.loads(file.read_text())
    if annotations is None:
        one = [next(a for a in coco["annotations"] if a["image_id"] == image["id"]) for image in coco["images"]]
        annotations = [{**annotation, "category_id": coco["categories"][0]["id"]} for annotation in one]
        coco["categories"] = coco["categories"][:1]
    file.write_text(json.dumps({**coco, "annotations": annotations}))
    with pytest.raises(UserError, match=f"search.metric {metric} cannot be measured on .*{reason}"):
        sweep.run_sweep(space(folder, search={"metric": metric, "num_trials": 2}), tmp_path / "sweep")


def test_begun_trials_come_before_new_ones(data_dir, tmp_path):
    """The base had begun; of the ranks 2, 4 and 16 there are no four trials."""
    ledger, settings = Ledger(tmp_path), space(data_dir, search={"num_trials": 5})
    ledger.write(TrialRecord(0, settings.base_values(), is_base=True, status="running"))
    records = ledger.records()
    begun, new = sweep._open_numbers(space(data_dir, search={"num_trials": 4}), records)
    assert (begun, new) == ([0], [1, 2, 3])
    observed = []

    def settle(number):
        observed.append(number)
        return ledger.read(number)

    proposer = Proposer(settings, taken=records)
    searcher = LedgerSearcher(ledger, proposer, begun=begun, new=[*new, 4], may_stop=True, settle=settle)
    asked = [searcher.suggest(f"trial {n}") for n in range(5)]
    assert [found["number"] for found in asked[:4]] == [0, 1, 2, 3]
    assert [found["is_base"] for found in asked[:4]] == [True, False, False, False]
    assert asked[4] == Searcher.FINISHED
    assert searcher.ran_out
    assert sorted(ledger.read(number).values["lora.rank"] for number in new) == [2, 4, 16]
    searcher.on_trial_complete("trial 2")
    assert observed == [2]
    ray.cloudpickle.dumps(searcher)  # Ray Tune writes it to disk


def test_failed_trials_are_done_again_only_where_asked(data_dir, tmp_path, no_trials):
    folder = tmp_path / "sweep"
    with pytest.raises(no_trials):
        sweep.run_sweep(space(data_dir), folder)
    ledger = Ledger(folder)
    failed = TrialRecord(1, {"lora.rank": 4}, status="failed", failure="exception", reason="x", trainable_parameters=9)
    ledger.write(failed)
    with pytest.raises(no_trials):
        sweep.run_sweep(space(data_dir), folder, resume=True)
    assert ledger.read(1) == failed
    with pytest.raises(no_trials):
        sweep.run_sweep(space(data_dir), folder, resume=True, retry_failed=True)
    assert ledger.read(1) == TrialRecord(1, {"lora.rank": 4}, trainable_parameters=9)


def test_a_session_that_was_killed_ends_with_the_last_sign_of_life(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"sessions": [{"started_at": 1e9}]}))
    trial = tmp_path / "trials" / "0000"
    trial.mkdir(parents=True)
    (trial / "metrics.jsonl").write_text("")
    [session] = sweep_folder.earlier_sessions(tmp_path)
    assert session["ended_at"] == (trial / "metrics.jsonl").stat().st_mtime


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemory("x"), "out of memory"),
        (NonFiniteLoss("x"), "loss not finite"),
        (WorkerLost("x"), "worker lost"),
        (ImageError("x"), "bad data"),
        (UserError("x"), "impossible settings"),
        (KeyError("x"), "exception"),
    ],
)
def test_kinds_of_failure(error, kind):
    assert trial_run.failure_kind(error) == kind


@pytest.mark.parametrize(
    ("batch", "accumulation", "halved"), [(8, 1, (4, 2)), (2, 3, (1, 6)), (3, 1, (1, 3)), (5, 2, (2, 5))]
)
def test_half_a_batch_keeps_the_images_of_a_step(data_dir, batch, accumulation, halved):
    settings = space(data_dir).config_of({"lora.rank": 4})
    changes = {"training.batch_size": batch, "training.gradient_accumulation_steps": accumulation}
    changed = trial_run._half_the_batch(settings.changed(changes))
    assert (changed["batch_size"], changed["gradient_accumulation_steps"]) == halved


def test_half_a_batch_leaves_a_fixed_step(data_dir):
    settings = space(data_dir).config_of({"lora.rank": 4}, {"training.batch_size": 4, "training.images_per_step": 6})
    assert trial_run._half_the_batch(settings) == {"batch_size": 2, "gradient_accumulation_steps": 1}


def test_a_trial_that_is_given_up_keeps_what_it_measured(data_dir, tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    ledger.write(TrialRecord(0, {"lora.rank": 4}))

    def train(config, report, *, may_stop):
        line = {"kind": "epoch", "epoch": 1, "step": 1, "train_loss": 2.0, "valid_loss": 3.0, "unix_time": 5.0}
        (ledger.folder(0) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        report({"epoch": 1, "valid_loss": 3.0})

    def report(entry):
        raise StoppedEarly("others were better")

    monkeypatch.setattr(trial_run, "_start", train)
    trial_run.complete_trial(space(data_dir), ledger, 0, report)
    record = ledger.read(0)
    assert (record.status, record.value, record.failure) == ("stopped", 3.0, None)


def test_a_trial_whose_process_is_gone_has_failed(data_dir, tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write(TrialRecord(0, {"lora.rank": 4}, status="running"))
    record = sweep._settle(space(data_dir), ledger, 0)
    assert (record.status, record.failure) == ("failed", "process lost")
    assert ledger.read(0) == record
    ledger.write(TrialRecord(1, {"lora.rank": 2}, status="finished", value=1.0))
    assert sweep._settle(space(data_dir), ledger, 1).status == "finished"
