"""Base models: the three kinds of names, complete files, clear refusals, resolutions and prompts."""

import json
import logging
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from sam3lora.errors import UserError
from sam3lora.model import base_folder
from sam3lora.model.loading import load_base, tokenize

from .conftest import RESOLUTION, byte_tokenizer, largest_difference, make_inputs, outputs_of


@pytest.fixture
def folder(small_base, tmp_path):
    """A copy of the saved base that a test may damage."""
    return shutil.copytree(small_base, tmp_path / "sam3")


def test_folder(small_base, random_sam3):
    # The weights and the settings of the folder, frozen and in evaluation mode.
    base = load_base(str(small_base))
    assert largest_difference(outputs_of(base.model), outputs_of(random_sam3)) < 1e-6
    assert (base.resolution, base.revision, base.name) == (RESOLUTION, None, str(small_base))
    assert base.image_mean == (0.4, 0.5, 0.6)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())


def test_video_checkpoint_and_tensors_of_something_else(small_base, saved_video_base, folder, caplog):
    # The detector of a video checkpoint is the same model; its tracker is no reason for a warning. Weights that are
    # present and not used may mean a wrong checkpoint.
    caplog.set_level(logging.WARNING, logger="sam3lora")
    assert load_base(str(saved_video_base)).fingerprint == load_base(str(small_base)).fingerprint
    assert not caplog.records
    tensors = load_file(folder / "model.safetensors") | {"adapter.weight": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_base(str(folder))
    assert "1 tensors are not used, first adapter.weight" in caplog.text


def test_bfloat16_and_eager_attention(small_base):
    # An adapter trained over a bfloat16 base fits the float32 base. Attention reaches the sub-models.
    low, eager, plain = (load_base(str(small_base), **to) for to in ({"dtype": "bfloat16"}, {"attention": "eager"}, {}))
    assert low.model.dtype == torch.bfloat16
    assert low.fingerprint == plain.fingerprint
    assert eager.model.detr_decoder.config._attn_implementation == "eager"
    assert eager.model.vision_encoder.backbone.config._attn_implementation == "eager"
    assert largest_difference(outputs_of(eager.model), outputs_of(plain.model)) < 1e-4


@pytest.mark.parametrize("resolution", [56, 168])
def test_other_resolutions(small_base, resolution):
    # Whole windows run, and rotary positions, which loading makes anew, fit the grid; the weights are the same.
    base = load_base(str(small_base), resolution=resolution)
    outputs = outputs_of(base.model, **make_inputs(side=resolution))
    assert outputs["pred_masks"].shape[-1] == resolution // 14 * 4
    assert all(torch.isfinite(value).all() for value in outputs.values())
    assert base.resolution == resolution
    assert base.fingerprint == load_base(str(small_base)).fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # the nearest sides that fit are named; 126 is a multiple of the patch but not of patch x window
        *(
            ({"resolution": side}, f"multiple of 56 pixels.*got {side}: the nearest are {nearest}")
            for side, nearest in ((100, "56 and 112"), (126, "112 and 168"), (0, "56 and 112"))
        ),
        ({"dtype": "float16"}, "must be float32 or"),
        ({"dtype": torch.int8}, "must be float32 or"),
        ({"attention": "flash"}, "must be 'sdpa' or"),
    ],
)
def test_bad_arguments(small_base, arguments, message):
    with pytest.raises(UserError, match=message):
        load_base(str(small_base), **arguments)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file(folder, file):
    # The message names the file. A pickle such as the hub's sam3.pt is no alternative.
    (folder / file).rename(folder / "sam3.pt")
    with pytest.raises(UserError, match=rf"lacks {file} .*sam3\.pt there is a pickle"):
        load_base(str(folder))


def test_missing_shard(folder):
    # A sharded checkpoint needs every shard of its index.
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-00002\.safetensors\."):
        load_base(str(folder))


def test_weights_that_are_missing_or_cannot_be_read(folder):
    # transformers would fill them with random numbers.
    file = folder / "model.safetensors"
    tensors = load_file(file)
    projection = tensors.pop("text_projection.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for 1 parameters, first text_projection\.weight"):
        load_base(str(folder))
    # Of another shape than the configuration's, and from a download that broke off.
    save_file(tensors | {"text_projection.weight": torch.zeros(5, 5)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="could not be loaded"):
        load_base(str(folder))
    save_file(tensors | {"text_projection.weight": projection}, file, metadata={"format": "pt"})
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="could not be loaded"):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "sam2"}', "model_type 'sam2': expected a SAM 3"),
        ("{}", "model_type None"),
        ("{", "cannot be read as JSON"),
        ('{"model_type": "sam3", "vision_config": 3}', "no valid SAM 3 configuration"),
    ],
)
def test_configuration_of_something_else(folder, config, message):
    # Said before any weight is read.
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        load_base(str(folder))


def test_broken_tokenizer(folder):
    # The tokenizers library raises a bare Exception.
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"the tokenizer in .* could not be loaded"):
        load_base(str(folder))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "sam3", "a/b/c"])
def test_folder_that_does_not_exist(name, monkeypatch):
    # A path with a typo must not become a question to the hub.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="does not exist"):
        load_base(name)


def test_tiny_is_loaded_like_any_folder(small_base, monkeypatch):
    # Only the place differs.
    monkeypatch.setattr(base_folder, "TINY_FOLDER", small_base)
    base = load_base("tiny")
    assert base.name == base.model.name_or_path == "tiny"
    assert base.fingerprint == load_base(str(small_base)).fingerprint


def test_hub_id(small_base, tmp_path, monkeypatch):
    # Only the files that are needed are asked for, and the commit is recorded.
    snapshot = shutil.copytree(small_base, tmp_path / "snapshots" / "0123abcd")
    asked = {}

    def snapshot_download(name, **arguments):
        asked.update(arguments, name=name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    base = load_base("facebook/sam3", revision="main")
    assert (base.name, base.revision, base.model.name_or_path) == ("facebook/sam3", "0123abcd", "facebook/sam3")
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("facebook/sam3", "main", False)
    assert not any(pattern.endswith((".pt", ".bin", ".pth", "*")) for pattern in asked["allow_patterns"])


def http_error(kind):
    return kind("refused", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: http_error(errors.GatedRepoError), "gated: request access.*hf auth login.*HF_TOKEN"),
        (lambda: http_error(errors.RepositoryNotFoundError), "not found on the hub.*hf auth login"),
        (lambda: http_error(errors.RevisionNotFoundError), "no revision 'v9'"),
        (lambda: errors.LocalEntryNotFoundError("not cached"), "not in the local cache.*HF_HUB_OFFLINE"),
        (lambda: errors.OfflineModeIsEnabled("offline"), "not in the local cache.*download it once"),
        (lambda: errors.HFValidationError("bad"), "no valid hub id"),
        (lambda: http_error(errors.HfHubHTTPError), "could not download facebook/sam3 at revision v9"),
        (lambda: errors.HTTPError("read timed out"), "could not download.*timed out"),
        (lambda: OSError("disk full"), "could not download.*disk full"),
    ],
)
def test_hub_refusals_say_what_to_do(monkeypatch, error, message):
    # One message for each thing that goes wrong with the hub.
    def snapshot_download(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=message):
        load_base("facebook/sam3", revision="v9")


def test_local_files_only_without_cache(tmp_path, monkeypatch):
    # The real hub client, with an empty cache and no network allowed.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="not in the local cache"):
        load_base("facebook/sam3-nowhere", local_files_only=True)


def test_tokenize_pads_to_the_context():
    # 32 positions for every prompt, 1 where there is a token.
    ids, mask = tokenize(byte_tokenizer(), ["crack", "hole"])
    assert ids.shape == mask.shape == (2, 32)
    assert ids.dtype == mask.dtype == torch.int64
    assert mask.sum(1).tolist() == [7, 6]
    assert tokenize(byte_tokenizer(), "crack")[0].tolist() == ids[:1].tolist()
    assert [values.shape for values in tokenize(byte_tokenizer(), [])] == [(0, 32), (0, 32)]
    # 30 letters and the two special tokens fill the context exactly
    ids, mask = tokenize(byte_tokenizer(), ["x" * 30])
    assert mask.sum() == 32
    assert ids[0, -1] == 513


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 1 is empty"),
        (" \n", "is empty"),
        (3, "must be text"),
        ("x" * 31, r"'x{31}' has 33 tokens.*at most 32"),
    ],
)
def test_prompts_that_cannot_be_asked(prompt, message):
    # The position is named, since prompts come from category lists.
    with pytest.raises(UserError, match=message):
        tokenize(byte_tokenizer(), ["crack", prompt])
