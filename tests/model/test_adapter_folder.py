"""Adapter folders: saving, loading with and without this package, metadata, post-processing and model cards.

Damaged files are in test_adapter_weights.py: both readers of a folder share the checks.
"""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import (
    list_adapters,
    load_adapter,
    read_metadata,
    record_post_processing,
    save_adapter,
)
from sam3lora.model.adapter.lora_layers import LoraSettings, adapted_modules, apply_lora
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.components import COMPONENTS
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.publish.model_card import render_model_card

from .conftest import RESOLUTION, largest_difference, make_inputs, make_sam3, outputs_of, randomise_adapter

SETTINGS = LoraSettings(
    rank=2, components=COMPONENTS, target_modules=("q_proj", "fc1", "query_proj", "text_projection")
)


def train(model, seed=2, settings=SETTINGS):
    """A model with an adapter that does something."""
    model.name_or_path = "some/base"
    print_of_base = fingerprint(model)
    model = apply_lora(model, settings).eval()
    randomise_adapter(model, seed)
    metadata = AdapterMetadata(
        base_model="some/base",
        base_fingerprint=print_of_base,
        prompts=["crack", 'a "deep" hole'],
        resolution=RESOLUTION,
        post_processing=PostProcessing(threshold=0.4, prompt_thresholds={"crack": 0.25}),
        metrics={"map_50": 0.51234, "per_category": {"crack": 0.5}},
        lora=settings.to_dict(),
    )
    return model, metadata


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, outputs of the trained model, metadata); read only."""
    model, metadata = train(make_sam3())
    folder = save_adapter(model, tmp_path_factory.mktemp("runs") / "best", metadata)
    return folder, outputs_of(model, **make_inputs()), metadata


@pytest.fixture
def saved(trained, tmp_path):
    """Like `trained`, as copies that a test may change."""
    folder, outputs, metadata = trained
    return shutil.copytree(folder, tmp_path / "runs" / "best"), outputs, deepcopy(metadata)


@pytest.mark.parametrize("variant", [{"use_rslora": True}, {"use_dora": True}])
def test_round_trip(random_sam3, tmp_path, variant):
    # A loaded adapter computes bit for bit what was saved.
    settings = LoraSettings(**(SETTINGS.to_dict() | variant))
    model, metadata = train(random_sam3, settings=settings)
    loaded, _ = load_adapter(make_sam3(), save_adapter(model, tmp_path / "best", metadata))
    assert largest_difference(outputs_of(loaded, **make_inputs()), outputs_of(model, **make_inputs())) == 0
    assert adapted_modules(loaded) == adapted_modules(model)


def test_plain_peft_reads_it(trained):
    # No code of ours is needed, and the files are the promised ones, flat, with the same permissions.
    folder, outputs, _ = trained
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "sam3lora.json", "README.md"}
    assert [path.name for path in folder.parent.iterdir()] == ["best"]
    plain = PeftModel.from_pretrained(make_sam3(), str(folder)).eval()
    assert largest_difference(outputs_of(plain, **make_inputs()), outputs) == 0


def test_frozen_or_trainable(trained):
    # Inference freezes everything; resuming trains the adapter and nothing else.
    frozen, metadata = load_adapter(make_sam3(), trained[0])
    assert not any(p.requires_grad for p in frozen.parameters())
    assert metadata == read_metadata(trained[0]) == trained[2]
    resumed, _ = load_adapter(make_sam3(), trained[0], trainable=True)
    assert all(p.requires_grad == (".lora_" in name) for name, p in resumed.named_parameters())


def test_saving_is_reproducible(random_sam3, tmp_path):
    # The same adapter gives the same bytes (PEFT keeps target modules in an unordered set).
    model, metadata = train(random_sam3)
    first, second = (save_adapter(model, tmp_path / name, metadata) for name in ("a", "b"))
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    config = json.loads((first / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"]
    assert config["bias"] == "none"
    assert config["base_model_name_or_path"] == "some/base"


def test_other_base_is_refused(trained):
    # Same architecture, other weights: both names and both fingerprints are in the message. The dtype does not matter.
    other = make_sam3(seed=9)
    other.name_or_path = "other/base"
    with pytest.raises(UserError, match=r"'some/base'.*fingerprint.*'other/base'.*fingerprint"):
        load_adapter(other, trained[0])
    assert not adapted_modules(other)
    assert load_adapter(other, trained[0], check_base=False)
    assert load_adapter(make_sam3().to(torch.bfloat16), trained[0])
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), trained[0], check_base=False)


def drop_a_tensor(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_damaged_tensors_are_refused_and_the_model_is_left_alone(saved):
    # PEFT alone would warn at most, and compute something else.
    drop_a_tensor(saved[0])
    model = make_sam3()
    before = outputs_of(model)
    with pytest.raises(UserError, match="lacks 1 tensors"):
        load_adapter(model, saved[0])
    assert not adapted_modules(model)
    assert largest_difference(outputs_of(model), before) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "JSON object"),
        ('{"format_version": 99}', "format 99"),
        ('{"prompts": "crack"}', "prompts must be list"),
        ('{"post_processing": {"threshold": 2}}', "post_processing: threshold"),
        ('{"post_processing": {"soft_nms": true}}', "post_processing: soft_nms"),
        ('{"thresholds": [0.3]}', "thresholds must be dict"),
        ('{"thresholds": {"nms_iou": "high"}}', "thresholds: nms_iou"),
    ],
)
def test_damaged_metadata(saved, text, message):
    # Metadata that cannot be trusted stops the load, it is not ignored.
    (saved[0] / "sam3lora.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_adapter(make_sam3(), saved[0])


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ({}, None),
        ({"thresholds": {}}, None),
        ({"thresholds": {"detection_threshold": 0.3}}, PostProcessing(threshold=0.3)),
        (
            {
                "thresholds": {
                    "detection_threshold": 0.4,
                    "nms_iou": 0.6,
                    "merge": True,
                    "merge_iou": 0.2,
                    "max_detections": 7,
                }
            },
            PostProcessing(threshold=0.4, nms="mask", nms_iou=0.6, merge=True, merge_iou=0.2, max_detections=7),
        ),
        (
            {"post_processing": {"threshold": 0.2, "nms": "box"}, "thresholds": {"detection_threshold": 0.9}},
            PostProcessing(threshold=0.2, nms="box"),
        ),
    ],
)
def test_recorded_post_processing(tmp_path, recorded, expected):
    # Earlier versions wrote "thresholds", measured with mask suppression: they keep their meaning.
    (tmp_path / "sam3lora.json").write_text(json.dumps(recorded))
    assert read_metadata(tmp_path).post_processing == expected


POST = PostProcessing(threshold=0.35, prompt_thresholds={"crack": 0.2}, nms_iou=0.5)


@pytest.mark.parametrize("version", ["this", "earlier", "edited card", "without metadata"])
def test_recording_post_processing(saved, version, tmp_path):
    # Metadata and model card agree afterwards; other values, also unknown ones of a newer version, and edits stay.
    folder, outputs, metadata = saved
    file, card = folder / "sam3lora.json", folder / "README.md"
    values = json.loads(file.read_text()) | {"colour": "blue"}
    if version == "earlier":
        del values["post_processing"]
        values["thresholds"] = {"detection_threshold": 0.9}
        card.write_text(card.read_text().replace("## Post-processing", "## Thresholds"))
    file.write_text(json.dumps(values))
    if version == "edited card":
        card.write_text("# Mine\n\nHand-made.\n")
    if version == "without metadata":
        file.unlink()
        card.unlink()
    record_post_processing(folder, POST)
    assert read_metadata(folder).post_processing == POST
    assert "| threshold | 0.35 |" in card.read_text()
    if version in ("this", "earlier"):
        metadata.post_processing = POST
        assert read_metadata(folder) == metadata
        assert card.read_text() == render_model_card(metadata)
        found = json.loads(file.read_text())
        assert (found["colour"], "thresholds" in found) == ("blue", False)
    if version == "edited card":
        assert card.read_text().startswith("# Mine\n\nHand-made.\n\n## Post-processing\n")
    assert largest_difference(outputs_of(load_adapter(make_sam3(), folder)[0], **make_inputs()), outputs) == 0
    with pytest.raises(UserError, match="no adapter folder"):
        record_post_processing(tmp_path / "runs", POST)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["best"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_an_adapter(saved, monkeypatch, exchange):
    # The new one is whole and nothing of the old one or of the writing is left, also without an atomic exchange.
    if not exchange:
        monkeypatch.setattr("sam3lora.files._exchange", lambda first, second: False)
    folder, old, _ = saved
    (folder / "stale.txt").write_text("of the old adapter")
    model, metadata = train(make_sam3(), seed=5)
    save_adapter(model, folder, metadata)
    loaded, _ = load_adapter(make_sam3(), folder)
    assert largest_difference(outputs_of(loaded, **make_inputs()), old) > 1e-3
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


FOLDER = "model.adapter.folder"


@pytest.mark.parametrize(
    "step", [f"{FOLDER}.save_file", f"{FOLDER}.render_model_card", "files._sync", "files.replace_folder"]
)
def test_failure_while_saving_keeps_the_old_adapter(saved, trained, monkeypatch, step):
    # Whatever fails, the last good adapter is still there and no scratch folder remains.
    folder, _, metadata = saved
    model, _ = train(make_sam3(), seed=5)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(f"sam3lora.{step}", fail)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, folder, metadata)
    for file in trained[0].iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_half_written_folders_are_never_chosen(saved):
    # A killed process leaves its scratch folder; a copy in progress lacks files.
    root = saved[0].parent
    shutil.copytree(saved[0], root / ".best.0123.tmp")
    (root / "copying").mkdir()
    shutil.copy(saved[0] / "adapter_config.json", root / "copying")
    (root / "notes.txt").write_text("not a folder")
    assert list_adapters(root) == {"best": saved[0]}
    with pytest.raises(UserError, match=r"lacks adapter_model\.safetensors"):
        load_adapter(make_sam3(), root / "copying")


def test_what_must_not_be_saved(random_sam3, tmp_path):
    # Saving to a folder with someone's data would delete it; best/ must never hold NaN.
    (tmp_path / "photo.jpg").write_text("precious")
    model, metadata = train(random_sam3)
    with pytest.raises(UserError, match="no adapter folder"):
        save_adapter(model, tmp_path, metadata)
    next(p for name, p in model.named_parameters() if ".lora_B." in name).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        save_adapter(model, tmp_path / "best", metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_several_adapters_on_one_base(saved, tmp_path):
    # Serving keeps many; each computes what it computes alone, and a refused one leaves the others alone.
    first, first_outputs, _ = saved
    model, metadata = train(make_sam3(), seed=5)
    second, second_outputs = save_adapter(model, tmp_path / "second", metadata), outputs_of(model, **make_inputs())
    shared, _ = load_adapter(make_sam3(), first, adapter_name="cracks")
    shared, _ = load_adapter(shared, second, adapter_name="holes")
    drop_a_tensor(second)
    with pytest.raises(UserError, match="lacks 1 tensors"):
        load_adapter(shared, second, adapter_name="broken")
    assert set(shared.peft_config) == {"cracks", "holes"}
    for name, expected in (("cracks", first_outputs), ("holes", second_outputs)):
        shared.set_adapter(name)
        assert largest_difference(outputs_of(shared, **make_inputs()), expected) == 0
    with pytest.raises(ValueError, match="already has an adapter 'holes'"):
        load_adapter(shared, first, adapter_name="holes")
    again = save_adapter(shared, tmp_path / "again", adapter_name="holes")
    assert (again / "adapter_model.safetensors").is_file()  # flat, whatever the name


def test_any_torch_model(tmp_path):
    # Without metadata only PEFT's files are written, and they load.
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    copy = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    copy.load_state_dict(base.state_dict())
    model = apply_lora(base, LoraSettings(rank=2, components=None, target_modules=("0", "2"))).eval()
    randomise_adapter(model)
    folder = save_adapter(model, tmp_path / "plain")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded, metadata = load_adapter(copy, folder)
    assert metadata is None
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x))


def card_code(metadata):
    return [part.split("```")[0] for part in render_model_card(metadata).split("```python\n")[1:]]


@pytest.mark.parametrize(
    ("base", "geometry_cls", "resolution"),
    [("small_base", True, RESOLUTION), ("small_base", False, None), ("saved_video_base", True, 2 * RESOLUTION)],
)
def test_model_card_code_runs_without_our_package(
    random_sam3, request, tmp_path, monkeypatch, base, geometry_cls, resolution
):
    # The card's second example, with its placeholders filled in, gives the numbers of our own path.
    from PIL import Image

    from sam3lora.model.loading import load_base

    small_base = request.getfixturevalue(base)
    model, metadata = train(random_sam3)
    metadata.base_model, metadata.geometry_cls, metadata.resolution = str(small_base), geometry_cls, resolution
    folder = save_adapter(model, tmp_path / "best", metadata)
    Image.new("RGB", (80, 60), (200, 30, 90)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    code = card_code(metadata)[1].replace("PATH_OF_THIS_FOLDER", str(folder))
    assert "sam3lora" not in code
    scope: dict = {}
    exec(compile(code, "card", "exec"), scope)
    ours, _ = load_adapter(load_base(str(small_base), resolution=resolution).model, folder)
    inputs = dict(scope["inputs"])
    assert ("input_boxes" in inputs) == geometry_cls
    assert inputs["pixel_values"].shape[-1] == (resolution or RESOLUTION)
    assert torch.equal(ours(**inputs).pred_masks, scope["outputs"].pred_masks)


def test_model_card_is_valid_python_and_names_the_base():
    # Prompts with quotes and a hub id; the tiny base has no hub page.
    card = AdapterMetadata(base_model="facebook/sam3", prompts=['a "deep" \\ hole'])
    assert "base_model: facebook/sam3" in render_model_card(card)
    for metadata in (card, AdapterMetadata(base_model="tiny")):
        for code in card_code(metadata):
            compile(code, "card", "exec")
    assert "base_model:" not in render_model_card(AdapterMetadata(base_model="tiny"))
