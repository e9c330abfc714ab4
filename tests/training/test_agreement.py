"""Two workers whose hosts differ: they agree on a checkpoint, or stop with one message."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from sam3lora.training import agreement, distributed
from sam3lora.training.agreement import check_agreement
from sam3lora.training.launch import train

from .changed_scenes import rewritten
from .forked_workers import run_workers

EARLY, LATE, LACKING = "step_00000001", "step_00000002", ("00002.jpg", "00005.jpg")


def without(*names: str):
    """A change that takes images out of the list."""

    def change(content: dict) -> None:
        gone = {image["id"] for image in content["images"] if image["file_name"] in names}
        content["images"] = [image for image in content["images"] if image["id"] not in gone]
        content["annotations"] = [label for label in content["annotations"] if label["image_id"] not in gone]

    return change


def shift_a_box(content: dict) -> None:
    label = content["annotations"][0]
    label.update(bbox=[10, 10, 20, 20], segmentation=[[10, 10, 30, 10, 30, 30, 10, 30]])


@pytest.fixture
def outcomes(make_config, scenes, tmp_path):
    """What each of two processes with real collectives makes of the cases, by case and rank."""
    config = make_config("evaluation.base_loss=false", save_steps=1, max_steps=2, on_bad_image="skip")
    train(config)
    saved, other = Path(config.output.output_dir), tmp_path / "other"
    (tmp_path / "new").mkdir()
    shutil.copytree(saved, other)
    shutil.copy(saved / "checkpoints" / EARLY / "adapter.safetensors", other / "checkpoints" / LATE)
    incomplete = shutil.copytree(scenes, tmp_path / "incomplete")
    for name in LACKING:
        (incomplete / "train" / name).unlink()
    fewer = rewritten(scenes, tmp_path / "fewer", without("00001.jpg"), "train")
    no_valid = shutil.copytree(scenes, tmp_path / "no_valid")
    shutil.rmtree(no_valid / "valid")
    relabelled = rewritten(scenes, tmp_path / "relabelled", shift_a_box, "valid")

    def workers(folder: Path | str, second: Path | str | None = None, of_both: dict | None = None, **second_host):
        first = {"folder": str(tmp_path / folder), "host": {"name": "a"}, **(of_both or {})}
        return [first, first | {"folder": str(tmp_path / (second or folder)), "host": {"name": "b", **second_host}}]

    def stale_first(hidden: str, **of_both) -> list[dict]:
        return workers(saved, of_both={"host": {"name": "a", "hidden": hidden, "hidden_s": 60}, **of_both})

    cases = {
        "same": workers("new", seed=1),
        "incomplete": workers("new", data_dir=str(incomplete)),
        "as many steps": workers("new", data_dir=str(fewer)),
        "no validation": workers("new", data_dir=str(no_valid)),
        "other labels": workers("new", data_dir=str(relabelled)),
        "late": workers(saved, hidden=LATE, hidden_s=1),
        "late first": workers(
            saved, of_both={"host": {"name": "a", "hidden": "step_", "hidden_s": 1}, "longest_wait_s": 60}
        ),
        "first never": stale_first(LATE, longest_wait_s=0.2),
        "first sees none": stale_first("step_", longest_wait_s=0.2),
        "nobody sees it": workers("new", of_both={"longest_wait_s": 0.2, "known": LATE}),
        "newer than known": workers(saved, of_both={"longest_wait_s": 0.2, "known": EARLY}),
        "other base": workers("new", base="tiny"),
        "other rank": workers("new", rank=8),
        "never": workers(saved, of_both={"longest_wait_s": 0.2}, hidden=LATE, hidden_s=60),
        "own copy": workers(saved, other),
    }
    (tmp_path / "cases.json").write_text(json.dumps({"config": config.model_dump(mode="json"), "cases": cases}))
    run_workers("disagreeing_workers", 2, tmp_path)
    both = [json.loads((tmp_path / f"outcomes_{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [outcome[name] for outcome in both] for name in cases}


@pytest.mark.slow
def test_workers_agree_or_stop(outcomes):
    # The same weights on both, although the second host drew others from the seed.
    first, second = outcomes["same"]
    assert first == second
    assert (first["step"], first["weights"] > 0) == (0, True)
    # Data that differ end both workers, by the same words, also where both would have taken as many steps (3 of 2).
    for case, told in {
        "incomplete": ("train images: 6 [", "4 [", f"host b (worker 1), which lacks {', '.join(LACKING)}"),
        "as many steps": ("train images: 6 [", "5 [", "host b (worker 1), which lacks 00001.jpg"),
        "no validation": (
            "valid images: 3 [",
            "none on host b (worker 1), which lacks 00000.jpg, 00001.jpg, 00002.jpg",
        ),
        "other labels": ("valid labels: ", "on host a (worker 0)", "on host b (worker 1). All"),
        "own copy": ("adapter weights: digest", "on host b (worker 1)"),
    }.items():
        first, second = (outcome["error"] for outcome in outcomes[case])
        assert first == second
        assert all(text in first for text in told), first
    assert "images:" not in outcomes["other labels"][0]["error"]
    assert "images:" not in outcomes["own copy"][0]["error"]
    # Shapes are compared before any weights are exchanged.
    for case, told in (("other base", "base model: fingerprint"), ("other rank", "adapter shapes: ")):
        first, second = (outcome["error"] for outcome in outcomes[case])
        assert first == second
        assert told in first
    assert "fingerprint" not in outcomes["other rank"][0]["error"]
    # A checkpoint that either host sees late is waited for, also where the first would have begun at step 0.
    first, second = outcomes["late"]
    assert first == second
    assert first["step"] == 2
    assert outcomes["late first"] == [{"chosen": LATE}] * 2
    # One that a host never sees is named on both, and the host, also if only the process that resumed saw it.
    for case, told in {
        "never": ("host b (worker 1)",),
        "first never": ("host a (worker 0)",),
        "first sees none": ("host a (worker 0)",),
        "nobody sees it": ("host a (worker 0)", "host b (worker 1)"),
    }.items():
        first, second = (outcome["error"] for outcome in outcomes[case])
        assert first == second
        named = re.findall(r"host \w \(worker \d\)", first)
        assert (tuple(named), LATE in first) == (told, True)
    # A restart finds newer checkpoints than the start did.
    assert outcomes["newer than known"] == [{"chosen": LATE}] * 2


def test_many_missing_images_are_counted(monkeypatch):
    # Three names, and how many more; a third worker that agrees is not named.
    facts = {"train images": "5 [digest aa]", "torch": "2"}
    names = ["a", "b", "c", "d", "e"]
    seen = iter([
        [("h0", facts), ("h1", facts), ("h2", facts | {"train images": "1 [digest bb]"})],
        [{"train images": names}, {"train images": names}, {"train images": ["e"]}],
    ])  # fmt: skip
    monkeypatch.setattr(distributed, "gather_objects", lambda value: next(seen))
    with pytest.raises(agreement.UserError, match=r"host h2 \(worker 2\), which lacks a, b, c and 1 more\. ") as error:
        check_agreement(facts, lambda: {"train images": names})
    assert "h1" not in str(error.value)
    assert "torch" not in str(error.value)


def test_workers_with_other_facts(monkeypatch):
    # Another version of the package may know other facts, in either direction.
    seen = iter([[("h0", {"torch": "2", "old": "x"}), ("h1", {"torch": "2", "new": "y"})], [{"a": ["1"]}, {}]])
    monkeypatch.setattr(distributed, "gather_objects", lambda value: next(seen))
    with pytest.raises(agreement.UserError) as error:
        check_agreement({}, dict)
    assert "old: x on host h0 (worker 0); unknown on host h1 (worker 1)" in str(error.value)
    assert "new: unknown on host h0 (worker 0); y on host h1 (worker 1)" in str(error.value)
