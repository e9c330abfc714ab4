"""Dense folders read for an engine of many adapters: what they hold, and what is refused before it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder_files import CONFIG_FILE, HEAD_FILE, METADATA_FILE, WEIGHTS_FILE
from sam3lora.model.adapter.weights import AdapterSummary, AdapterWeights
from sam3lora.model.any_adapter import AdapterReader
from sam3lora.model.dense.weights import DenseWeights
from sam3lora.model.loading import LoadedBase, load_base

from ..conftest import write_adapter
from .dense_cases import write_dense


def read_weights(folder: Path, base: LoadedBase, max_rank: int | None = None) -> AdapterWeights:
    return AdapterReader(base, no_clicks, max_rank).read(folder)


def summarise(folder: Path, base: LoadedBase, max_rank: int | None = None) -> AdapterSummary:
    return AdapterReader(base, no_clicks, max_rank).summarise(folder)


def no_clicks():
    pytest.fail("no click head is needed")


@pytest.fixture(scope="module")
def base(spread_base: Path) -> LoadedBase:
    return load_base(str(spread_base))


@pytest.fixture(scope="module")
def original(spread_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(spread_base, tmp_path_factory.mktemp("dense") / "best")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "gears")


def change(folder: Path, **values) -> None:
    """Other values in the metadata; those of `dense` by their own names."""
    file = folder / METADATA_FILE
    found = json.loads(file.read_text())
    for name, value in values.items():
        (found if name in found else found["dense"])[name] = value
    file.write_text(json.dumps(found))


def test_the_lora_and_the_head(folder: Path, base: LoadedBase):
    weights = read_weights(folder, base)
    assert isinstance(weights, DenseWeights)
    assert weights.settings.classes == ("background", "gear", "red bolt")
    assert weights.components == {"vision_encoder"}
    assert all(name.startswith("vision_encoder.backbone.layers.") for name in weights.modules)
    saved = load_file(folder / HEAD_FILE)
    read = weights.head.state_dict()
    assert {f"head.{name}" for name in read} == set(saved)
    assert all(torch.equal(read[name.removeprefix("head.")], tensor) for name, tensor in saved.items())
    assert not any(parameter.requires_grad for parameter in weights.head.parameters())
    of_lora = sum(update.size_bytes for update in weights.modules.values())
    assert weights.size_bytes == of_lora + sum(tensor.nbytes for tensor in saved.values())


def test_a_head_alone_and_one_with_batch_norm(spread_base: Path, base: LoadedBase, tmp_path: Path):
    weights = read_weights(write_dense(spread_base, tmp_path / "alone", "binary", lora=False, norm="batch"), base)
    assert isinstance(weights, DenseWeights)
    assert (weights.modules, weights.rank, weights.components) == ({}, 0, frozenset())
    known = summarise(tmp_path / "alone", base)
    assert (known.config, known.rank, known.components) == (None, None, frozenset())
    assert known.size_bytes == (tmp_path / "alone" / HEAD_FILE).stat().st_size


def test_bottlenecks_are_an_adapter_of_the_trunk(spread_base: Path, base: LoadedBase, tmp_path: Path):
    folder = write_dense(spread_base, tmp_path / "narrow", lora=False, bottleneck_width=8)
    weights = read_weights(folder, base)
    assert isinstance(weights, DenseWeights)
    assert (weights.modules, weights.components) == ({}, {"vision_encoder"})
    assert summarise(folder, base).components == {"vision_encoder"}
    tensors = load_file(folder / HEAD_FILE)
    assert weights.bottlenecks is not None
    assert torch.equal(weights.bottlenecks[2].up.weight, tensors["trunk.layers.2.bottleneck.up.weight"])
    assert weights.size_bytes == sum(tensor.nbytes for tensor in tensors.values())
    # they are in the file whose version counts
    save_file(tensors | {"trunk.layers.2.bottleneck.up.bias": torch.ones(32)}, folder / HEAD_FILE)
    assert read_weights(folder, base).version != weights.version


def test_prompted_folders_are_read_as_ever(spread_base: Path, base: LoadedBase, tmp_path: Path):
    folder = write_adapter(spread_base, tmp_path / "prompts")
    weights = read_weights(folder, base)
    assert not isinstance(weights, DenseWeights)
    assert weights.rank == summarise(folder, base).rank


def test_the_version_changes_with_every_file(folder: Path, base: LoadedBase):
    seen = {read_weights(folder, base).version}
    for file in (HEAD_FILE, WEIGHTS_FILE):
        tensors = load_file(folder / file)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / file)
        seen.add(read_weights(folder, base).version)
    change(folder, classes=["background", "gear", "bolt"])
    seen.add(read_weights(folder, base).version)
    assert len(seen) == 4


FAULTS = {
    "no head": (lambda folder: (folder / HEAD_FILE).unlink(), "lacks dense_head.safetensors"),
    "no LoRA": (lambda folder: (folder / CONFIG_FILE).unlink(), CONFIG_FILE),
    "another resolution": (lambda folder: change(folder, resolution=336), "trained at 336 pixels"),
    "another base": (lambda folder: change(folder, base_fingerprint="0" * 64), "was trained on the base"),
    "a layer that there is not": (lambda folder: change(folder, layers=[1, 7]), "numbers from 0 to 2"),
    "a layer below 0": (lambda folder: change(folder, layers=[-1]), "numbers from 0 to 2"),
    "layers that fall": (lambda folder: change(folder, layers=[2, 1]), "ascending"),
    "a class twice": (lambda folder: change(folder, classes=["a", "b", "a"]), "differ"),
    "a class of control characters": (lambda folder: change(folder, classes=["a", "b", "\x1b[2J"]), "be shown"),
    "a class of many words": (lambda folder: change(folder, classes=["a", "b", "c" * 201]), "200 characters"),
    "a width of words": (lambda folder: change(folder, width="wide"), "width"),
    "a mode of megabytes": (lambda folder: change(folder, mode="m" * 10**6), "mode"),
    "a rank above the limit": (lambda folder: None, "has rank 2"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_listing_knows_already(folder: Path, base: LoadedBase, name: str):
    make, words = FAULTS[name]
    make(folder)
    max_rank = 1 if "rank" in name else None
    for read in (summarise, read_weights):
        with pytest.raises(UserError, match=words) as refused:
            read(folder, base, max_rank=max_rank)
        assert len(str(refused.value)) < 1000


DAMAGE = {
    "junk": (lambda file: file.write_bytes(b"junk"), "damaged"),
    "no bottlenecks": (lambda file: change(file.parent, bottleneck_width=8), "does not fit sam3lora.json"),
    "another width": (lambda file: change(file.parent, width=64), "does not fit sam3lora.json"),
    "one class more": (lambda file: change(file.parent, classes=["a", "b", "c", "d"]), "does not fit sam3lora.json"),
    "a tensor too many": (
        lambda file: save_file(load_file(file) | {"head.more": torch.zeros(3)}, file),
        "unexpected 1 tensors",
    ),
    "NaN": (lambda file: save_file({k: v * torch.nan for k, v in load_file(file).items()}, file), "NaN"),
    "bytes": (lambda file: save_file({k: v.to(torch.int8) for k, v in load_file(file).items()}, file), "dtype I8"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_head_that_does_not_fit_is_refused(folder: Path, base: LoadedBase, name: str):
    make, words = DAMAGE[name]
    make(folder / HEAD_FILE)
    with pytest.raises(UserError, match=words):
        read_weights(folder, base)


def test_an_adapter_outside_of_the_trunk_is_no_dense_one(
    folder: Path, spread_base: Path, base: LoadedBase, tmp_path: Path
):
    other = write_adapter(spread_base, tmp_path / "prompts")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copy(other / file, folder / file)
    with pytest.raises(UserError, match="expected the vision trunk alone"):
        read_weights(folder, base)
