"""Keys of `model`."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from sam3lora.errors import UserError
from sam3lora.model import loading

from ...model.conftest import make_sam3, save_base
from .conftest import acts, first_batch, loss_terms


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
    """The same shapes as `small_base` with other weights."""
    return save_base(tmp_path_factory.mktemp("other") / "commit_2", make_sam3(seed=1))


@pytest.fixture
def hub(monkeypatch, small_base, other_base, tmp_path):
    """Stands in for the hub: a model with two revisions, of which `old` alone is in the local cache."""
    old = tmp_path / "commit_1"
    shutil.copytree(small_base, old)

    def snapshot_download(name, *, revision=None, local_files_only=False, **options):
        if local_files_only and revision != "old":
            raise LocalEntryNotFoundError("not in the cache")
        return str(old if revision == "old" else other_base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@acts("model.name")
def test_name_chooses_the_weights(build, shared, other_base):
    one, other = shared().metadata, build(f"model.name={other_base}").metadata
    assert one.base_fingerprint != other.base_fingerprint
    assert other.base_model == str(other_base)


@acts("model.revision")
def test_revision_chooses_the_commit(build, hub):
    newest = build("model.name=owner/sam3").metadata
    old = build("model.name=owner/sam3", "model.revision=old").metadata
    assert (newest.base_revision, old.base_revision) == ("commit_2", "commit_1")
    assert newest.base_fingerprint != old.base_fingerprint


@acts("model.local_files_only")
def test_local_files_only_never_downloads(build, hub):
    build("model.name=owner/sam3")
    with pytest.raises(UserError, match="not in the local cache"):
        build("model.name=owner/sam3", "model.local_files_only=true")


@acts("model.resolution")
def test_resolution_is_the_side_of_the_input(build, shared):
    own, half = shared(), build("model.resolution=56")
    assert first_batch(own).images_NHWC.shape[1:3] == (112, 112)
    assert first_batch(half).images_NHWC.shape[1:3] == (56, 56)
    # What uses the adapter later has to know, and the model has to run at that size.
    assert half.metadata.resolution == 56
    assert loss_terms(half)


@acts("model.geometry_cls")
def test_geometry_cls_changes_what_the_model_sees(build, shared):
    with_cls, without = shared(), build("model.geometry_cls=false")
    assert loss_terms(with_cls)["loss_ce"] != pytest.approx(loss_terms(without)["loss_ce"], rel=1e-6)
    # The adapter says how it was trained, so that inference does the same.
    assert (with_cls.metadata.geometry_cls, without.metadata.geometry_cls) == (True, False)


@acts("model.dtype")
def test_dtype_is_that_of_the_frozen_weights(build, shared):
    def dtypes(worker, trainable):
        return {p.dtype for p in worker.model.parameters() if p.requires_grad == trainable}

    full, half = shared(), build("model.dtype=bfloat16", "training.mixed_precision=bf16")
    assert dtypes(full, False) == {torch.float32}
    assert torch.bfloat16 in dtypes(half, False)
    # The adapter itself learns in full precision.
    assert dtypes(half, True) == {torch.float32}


@acts("model.quantization")
def test_quantization_replaces_the_linear_layers(build, settings, monkeypatch):
    # bitsandbytes may be missing: what it is asked for is in tests/model/test_quantization.py.
    quantized = []
    monkeypatch.setattr(loading, "quantize_nf4", lambda model, device: quantized.append(device))
    build("training.mixed_precision=bf16")
    assert not quantized
    build("training.mixed_precision=bf16", "model.quantization=nf4")
    assert [device.type for device in quantized] == ["cpu"]
    with pytest.raises(UserError, match=r'"nf4" needs training\.mixed_precision bf16'):
        settings("model.quantization=nf4")


@acts("model.attention")
def test_attention_chooses_the_kernel(build, shared, monkeypatch):
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **options: calls.append(1) or kernel(*args, **options),
    )
    fused = loss_terms(shared())
    assert calls
    calls.clear()
    plain = loss_terms(build("model.attention=eager"))
    assert not calls
    # Another way to the same numbers.
    assert plain == pytest.approx(fused, rel=1e-3)
