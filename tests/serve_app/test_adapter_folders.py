"""From ids to folders: what must not be reached, and what a folder says about itself."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sam3lora.config.post_processing import PostProcessing
from sam3lora.model.adapter.weights import AdapterSummary, read_summary
from serve_app.http.errors import ServeError
from serve_app.replica.adapter_folders import AdapterFolders
from serve_app.settings import AdapterSettings

from .adapter_folders import write_adapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one adapter, and a whole adapter outside of it that nobody may reach."""
    write_adapter(tmp_path / "elsewhere", "secret")
    root = tmp_path / "root"
    write_adapter(root, "cracks")
    return root


def find(root: Path | None, adapter_id: str, **settings):
    return AdapterFolders(AdapterSettings(root=root, **settings)).find(adapter_id)


@pytest.mark.parametrize(
    "adapter_id",
    [
        "",
        ".",
        "..",
        "../elsewhere/secret",
        "cracks/../../elsewhere/secret",
        "cracks/",
        "/etc",
        ".cracks.0123.tmp",
        "cracks\0",
        "cracks\n",
        " cracks",
        "crаcks",  # a Cyrillic a
        "a" * 101,
    ],
)
def test_an_invalid_id_is_refused(root: Path, adapter_id: str):
    with pytest.raises(ServeError) as refused:
        find(root, adapter_id)
    assert refused.value.type == "invalid_adapter"
    assert not adapter_id.strip() or adapter_id not in refused.value.message or len(adapter_id) < 3


@pytest.mark.parametrize(
    "adapter_id", ["unknown", "secret", "elsewhere", "cracks.", "cracks..", "CRACKS", "a" * 100, "file"]
)
def test_an_unknown_id_is_not_found(root: Path, adapter_id: str):
    (root / "file").write_text("no folder")
    with pytest.raises(ServeError) as refused:
        find(root, adapter_id)
    assert refused.value.type == "adapter_not_found"
    assert str(root) not in refused.value.message


def test_an_id_is_an_allowed_folder_in_the_root(root: Path):
    (root.parent / "linked").symlink_to(root)
    for place in (root, root.parent / "linked"):  # the root itself may be a link
        found = find(place, "cracks", allowed=("cracks",))
        assert (found.id, found.path) == ("cracks", place / "cracks")
    for nowhere, allowed in ((None, None), (root / "missing", None), (root, ("potholes",))):
        with pytest.raises(ServeError, match="adapter_not_found"):
            find(nowhere, "cracks", allowed=allowed)


@pytest.mark.parametrize("target", ["../elsewhere/secret", "..", ".", "/", "link"])
def test_a_folder_linked_out_of_the_root_or_in_a_circle_is_refused(root: Path, target: str):
    (root / "link").symlink_to(target)
    with pytest.raises(ServeError) as refused:
        find(root, "link")
    assert refused.value.type == "invalid_adapter"
    assert str(root.parent) not in refused.value.message


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "sam3lora.json"])
def test_a_file_linked_out_of_the_root_is_refused(root: Path, file: str):
    (root / "cracks" / file).unlink()
    (root / "cracks" / file).symlink_to(root.parent / "elsewhere" / "secret" / file)
    with pytest.raises(ServeError, match="invalid_adapter"):
        find(root, "cracks")


def test_a_link_within_the_root_is_an_adapter(root: Path):
    (root / "current").symlink_to("cracks")
    before = find(root, "current")
    write_adapter(root, "newer")
    (root / "current").unlink()
    (root / "current").symlink_to("newer")
    assert find(root, "current").signature != before.signature


def test_signatures_differ_between_versions(root: Path):
    first = find(root, "cracks").signature
    assert find(root, "cracks").signature == first
    seen = {first}
    for file in ("adapter_model.safetensors", "adapter_config.json", "sam3lora.json"):
        path = root / "cracks" / file
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))  # same content, same size, a moment later
        seen.add(find(root, "cracks").signature)
    (root / "cracks" / "sam3lora.json").unlink()
    seen.add(find(root, "cracks").signature)
    assert len(seen) == 5


def test_the_signature_changes_when_a_file_is_rewritten_and_dated_back(root: Path):
    first = find(root, "cracks").signature
    file = root / "cracks" / "adapter_model.safetensors"
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of a file system has steps
        file.write_bytes(file.read_bytes()[::-1])
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find(root, "cracks").signature != first


def test_the_list_describes_adapters_and_their_faults(root: Path):
    write_adapter(root, "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"not safetensors")
    write_adapter(root, "half")
    (root / "half" / "adapter_model.safetensors").unlink()
    write_adapter(root, "odd")
    (root / "odd" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    write_adapter(root, "plain")
    (root / "plain" / "sam3lora.json").unlink()
    write_adapter(root, ".hidden")
    (root / "no_adapter").mkdir()
    (root / "nowhere").symlink_to("../nothing")

    listed = [one.info for one in AdapterFolders(AdapterSettings(root=root)).describe_all()]
    assert [info.id for info in listed] == ["broken", "cracks", "half", "odd", "plain"]
    broken, cracks, half, odd, plain = listed
    assert (cracks.prompts, cracks.rank, cracks.adapts) == (["what cracks finds"], 2, ["detr_decoder"])
    assert cracks.size_bytes == (root / "cracks" / "adapter_model.safetensors").stat().st_size
    assert (cracks.error, cracks.post_processing) == (None, PostProcessing(threshold=0.3))
    assert broken.post_processing is None
    assert "not a safetensors file" in str(broken.error)
    assert "lacks" in str(half.error)
    assert "LoRA" in str(odd.error)
    assert (plain.error, plain.post_processing) == (None, PostProcessing())
    assert not any(str(root.parent) in str(info.error) for info in listed)


def test_the_list_explains_a_link_out_of_the_root(root: Path):
    (root / "best").symlink_to("../elsewhere/secret")
    (root / "parent").symlink_to("..")  # no adapter
    folders = AdapterFolders(AdapterSettings(root=root))
    best, cracks = (one.info for one in folders.describe_all())
    assert (best.id, best.prompts, cracks.id, cracks.error) == ("best", [], "cracks", None)
    assert "outside the root: copy the folder" in str(best.error)
    assert str(root.parent) not in str(best.error)
    assert not AdapterFolders(AdapterSettings(root=root, allowed=("other",))).describe_all()


def test_a_damaged_folder_does_not_hide_the_others(root: Path):
    def summarise(folder: Path) -> AdapterSummary:
        return 1 / 0 if folder.name == "odd" else read_summary(folder)  # type: ignore[return-value]

    write_adapter(root, "nested")
    (root / "nested" / "adapter_config.json").write_text("[" * 100_000)
    write_adapter(root, "odd")
    cracks, nested, odd = (one.info for one in AdapterFolders(AdapterSettings(root=root), summarise).describe_all())
    assert (cracks.id, cracks.error) == ("cracks", None)
    assert "nested too deeply" in str(nested.error)
    assert "cannot be read" in str(odd.error)
    assert "ZeroDivision" not in str(odd.error)


def edit(folder: Path, file: str = "adapter_config.json", **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("adapter_config.json", {"r": 0}, ["r must be", "0"]),
        ("adapter_config.json", {"r": -4}, ["r must be", "-4"]),
        ("adapter_config.json", {"r": 10_000}, ["10000", "at most 256"]),
        ("adapter_config.json", {"r": "8"}, ["r must be", "'8'"]),
        ("adapter_config.json", {"rank_pattern": {"q_proj": 300}}, ["300", "at most 256"]),
        ("adapter_config.json", {"lora_alpha": [8]}, ["lora_alpha must be a number"]),
        ("adapter_config.json", {"alpha_pattern": {"q_proj": None}}, ["alpha_pattern", "must be a number"]),
        ("adapter_config.json", {"target_modules": "(?=x)"}, ["target_modules", "no expression"]),
        ("adapter_config.json", {"modules_to_save": ["x"]}, ["cannot share a batch"]),
        ("sam3lora.json", {"base_fingerprint": "of another base"}, ["trained on the base"]),
        ("sam3lora.json", {"prompts": ["\ud800"]}, ["characters that can be shown"]),
        ("sam3lora.json", {"prompts": [["nested"]]}, ["characters that can be shown"]),
        ("sam3lora.json", {"post_processing": {"threshold": 7}}, ["threshold"]),
    ],
)
def test_what_can_be_known_without_loading_is_an_error_of_the_list(
    root: Path, file: str, values: dict[str, Any], words: list[str]
):
    edit(root / "cracks", file, **values)
    model = torch.nn.Linear(2, 2)
    for _ in range(2):  # as a replica that starts later says
        folders = AdapterFolders(AdapterSettings(root=root), partial(read_summary, model=model, max_rank=256))
        (cracks,) = folders.describe_all()
        assert cracks.info.id == "cracks"
        assert all(word in str(cracks.info.error) for word in words), cracks.info.error
        assert str(root.parent) not in str(cracks.info.error)
        json.loads(cracks.json)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("my adapter", "my adapter"),
        ("-dash", "-dash"),
        ("two\nlines", "two?lines"),
        ("gr\u00fcn", "gr\u00fcn"),
        (b"no utf8 \xff", "no utf8 ?"),
        ("x" * 150, "x" * 100 + "..."),
    ],
)
def test_a_folder_whose_name_is_no_id_is_listed_with_the_remedy(root: Path, name: str | bytes, shown: str):
    write_adapter(root, "new").rename(root / os.fsdecode(name))
    found = {one.info.id: one for one in AdapterFolders(AdapterSettings(root=root)).describe_all()}
    assert found.keys() == {"cracks", shown}
    assert "rename the folder" in str(found[shown].info.error)
    json.loads(found[shown].json)
    assert not AdapterFolders(AdapterSettings(root=root, allowed=("other",))).describe_all()


def test_folders_that_are_linked_within_the_root_are_listed(root: Path):
    write_adapter(root, ".cracks-2", rank=3)
    (root / "latest").symlink_to(".cracks-2")
    folders = AdapterFolders(AdapterSettings(root=root))
    assert [(one.info.id, one.info.rank) for one in folders.describe_all()] == [("cracks", 2), ("latest", 3)]
    (root / "latest").unlink()
    (root / "latest").symlink_to("cracks")
    assert [(one.info.id, one.info.rank) for one in folders.describe_all()] == [("cracks", 2), ("latest", 2)]


def test_the_list_follows_the_disk_and_reads_what_changed(root: Path, monkeypatch: pytest.MonkeyPatch):
    folders = AdapterFolders(AdapterSettings(root=root))
    folders.describe_all()
    write_adapter(root, "cracks", rank=5)
    write_adapter(root, "potholes")
    listed = folders.describe_all()
    assert [(one.info.id, one.info.rank) for one in listed] == [("cracks", 5), ("potholes", 2)]
    monkeypatch.setattr(folders, "_summarise", lambda folder: pytest.fail("read again"))
    assert folders.describe_all() == listed
