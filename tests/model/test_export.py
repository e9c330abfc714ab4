"""Merged models compute what base plus adapter compute, for people who have transformers alone."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from peft import LoraModel, PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import Sam3Config, Sam3Model, Sam3Processor

from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import RunFailed, UserError
from sam3lora.model.adapter.folder import read_metadata
from sam3lora.model.adapter.lora_layers import adapted_modules
from sam3lora.model.components import COMPONENTS
from sam3lora.model.loading import load_base
from sam3lora.model.publish.export import TOLERANCE, copy_adapter, merge_adapter
from sam3lora.model.publish.hub import is_merged_folder, push_adapter

from .conftest import RESOLUTION, make_sam3, save_base, write_adapter

TARGETS = ("q_proj", "fc1", "proj1", "proj2", "mask_embedder", "box_head", "query_proj", "text_projection")
OUTPUTS = ("pred_logits", "presence_logits", "pred_boxes", "pred_masks")
ALONE = """
import sys
import numpy as np, torch
from PIL import Image
from transformers import Sam3Model, Sam3Processor
folder, image, numbers = sys.argv[1:]
model, info = Sam3Model.from_pretrained(folder, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
inputs = Sam3Processor.from_pretrained(folder)(images=Image.open(image), text="gear", return_tensors="pt")
del inputs["original_sizes"]
inputs["input_boxes"] = torch.full((1, 1, 4), -10.0)
inputs["input_boxes_labels"] = torch.full((1, 1), -10)
with torch.no_grad():
    outputs = model.eval()(**inputs)
assert "sam3lora" not in sys.modules and "peft" not in sys.modules
found = {name: outputs[name].numpy() for name in ("pred_logits", "presence_logits", "pred_boxes", "pred_masks")}
np.savez(numbers, **inputs, **found)
"""


@pytest.fixture(scope="module")
def adapter(small_base, tmp_path_factory) -> Path:
    """Linear and Conv2d layers of every component, at half of the base's resolution; read only."""
    folder = tmp_path_factory.mktemp("adapter") / "best"
    post = PostProcessing(threshold=0)
    return write_adapter(
        small_base, folder, targets=TARGETS, components=COMPONENTS, resolution=56, post_processing=post
    )


@pytest.fixture(scope="module")
def report(adapter, tmp_path_factory):
    return merge_adapter(adapter, tmp_path_factory.mktemp("merged") / "model")


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- the merged model -----------------------------------------------------------------------------------------------


def test_report_and_folder(report, adapter):
    # Every output agrees, the report counts what was merged, and nothing but the folder itself is left behind. It is a
    # base model like any other, at the adapter's resolution, and says what it was made of.
    assert set(report.differences) == {"logits", "presence", "boxes", "masks"}
    assert all(item.relative <= TOLERANCE and item.scale > 0 for item in report.differences.values())
    metadata, loaded = read_metadata(report.folder), load_base(str(report.folder))
    plain = PeftModel.from_pretrained(load_base(metadata.base_model).model, str(adapter))
    assert report.num_modules == len(adapted_modules(plain))
    assert report.check == "the merged files against base plus adapter"
    assert files_in(report.folder.parent) == ["model"]
    weights = report.folder / "model.safetensors"
    assert report.size_mb == pytest.approx(weights.stat().st_size / 1e6)
    assert weights.stat().st_mode & 0o777 == (report.folder / "config.json").stat().st_mode & 0o777
    assert (loaded.resolution, adapted_modules(loaded.model)) == (56, ())
    assert (metadata.prompts, metadata.resolution) == (["gear"], 56)
    assert metadata.base_fingerprint == read_metadata(adapter).base_fingerprint != loaded.fingerprint
    assert is_merged_folder(report.folder)
    assert not is_merged_folder(adapter)


def test_transformers_alone_gives_the_same_numbers(report, adapter, small_base, picture, tmp_path):
    # In a process without peft and this package: all keys are there and no others, the processor has the adapter's
    # resolution, and the outputs are those of PEFT on the base, and not those of the base.
    numbers = tmp_path / "numbers.npz"
    subprocess.run([sys.executable, "-c", ALONE, str(report.folder), str(picture), str(numbers)], check=True)
    found = {name: torch.from_numpy(value) for name, value in np.load(numbers).items()}
    inputs = {name: value for name, value in found.items() if name not in OUTPUTS}
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)

    config = Sam3Config.from_pretrained(small_base)
    config.image_size = 56
    plain = Sam3Model.from_pretrained(small_base, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        untaught = plain(**inputs)
        expected = PeftModel.from_pretrained(plain, str(adapter)).eval()(**inputs)
    for name in OUTPUTS:
        scale = expected[name].abs().max()
        assert (found[name] - expected[name]).abs().max() <= TOLERANCE * scale, name
        assert (found[name] - untaught[name]).abs().max() > 1e-2 * scale, name


def test_code_of_the_card_runs(report, picture, monkeypatch, capsys):
    # The model card's lines can be pasted; they add the padding box, as the adapter was trained with the CLS token.
    card = (report.folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "torch.full((1, 1, 4), -10.0)" in code
    code = code.replace("PATH_OF_THIS_FOLDER", str(report.folder)).replace("image.jpg", str(picture))
    exec(code, {})
    assert "torch.Size([8, 60, 90])" in capsys.readouterr().out


def test_without_geometry_cls(small_base, tmp_path):
    # An adapter trained without the CLS token is compared without it, and the card does not add it.
    adapter = write_adapter(small_base, tmp_path / "best", geometry_cls=False)
    report = merge_adapter(adapter, tmp_path / "merged")
    assert "input_boxes" not in (report.folder / "README.md").read_text()
    assert read_metadata(report.folder).geometry_cls is False


def test_bfloat16(adapter, report, tmp_path):
    # The comparison is of the weights before the cast, and the report says so; what is written are these weights, cast.
    cast = merge_adapter(adapter, tmp_path / "half", dtype="bfloat16")
    assert "before their cast to bfloat16" in cast.check
    assert cast.differences == report.differences
    half, full = (load_file(item.folder / "model.safetensors") for item in (cast, report))
    assert half.keys() == full.keys()
    assert all(torch.equal(tensor, full[name].to(torch.bfloat16)) for name, tensor in half.items())
    assert json.loads((cast.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert Sam3Processor.from_pretrained(cast.folder).image_processor.image_mean == (0.4, 0.5, 0.6)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoiled", ["merge", "merge to nan", "file"])
def test_wrong_merge_leaves_nothing(adapter, report, tmp_path, monkeypatch, spoiled):
    # A merge that is slightly off, or not finite, or written wrong, fails with figures; an earlier model stays.
    earlier = shutil.copytree(report.folder, tmp_path / "merged")
    merge, save = LoraModel.merge_and_unload, Sam3Model.save_pretrained

    def wrong_merge(self, *args, **kwargs):
        model = merge(self, *args, **kwargs)
        next(model.dot_product_scoring.parameters()).data += float("nan") if "nan" in spoiled else 1e-3
        return model

    def wrong_save(self, *args, **kwargs):
        next(self.dot_product_scoring.parameters()).data += 1e-3
        save(self, *args, **kwargs)
        next(self.dot_product_scoring.parameters()).data -= 1e-3

    if spoiled == "file":
        monkeypatch.setattr(Sam3Model, "save_pretrained", wrong_save)
    else:
        monkeypatch.setattr(LoraModel, "merge_and_unload", wrong_merge)
    for output in ("merged", "new"):
        with pytest.raises(RunFailed, match=r"logits \S+ of .*masks \S+ of"):
            merge_adapter(adapter, tmp_path / output)
    assert files_in(tmp_path) == ["merged"]
    weights = "model.safetensors"
    assert (earlier / weights).read_bytes() == (report.folder / weights).read_bytes()


def test_base_must_be_named_and_the_right_one(adapter, small_base, copied, tmp_path):
    # The same architecture with other weights; PEFT's own folders name no base that can be checked.
    other = save_base(tmp_path / "other", make_sam3(seed=9))
    with pytest.raises(UserError, match="was trained on the base"):
        merge_adapter(adapter, tmp_path / "merged", model=str(other))
    (copied / "sam3lora.json").unlink()
    with pytest.raises(UserError, match="--model"):
        merge_adapter(copied, tmp_path / "merged")
    report = merge_adapter(copied, tmp_path / "merged", model=str(small_base))
    assert (report.base_model, report.resolution) == (str(small_base), RESOLUTION)
    assert files_in(tmp_path) == ["merged", "other", "run"]


@pytest.mark.parametrize("function", [merge_adapter, copy_adapter])
def test_other_folders_are_not_overwritten(function, adapter, small_base, tmp_path):
    # Neither a folder with other things, nor a file, nor a base model.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for output in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt", small_base, adapter.parent):
        with pytest.raises(UserError, match="exists and is no"):
            function(adapter, output)
    assert files_in(tmp_path / "mine") == ["thesis.txt"]


def test_merging_over_the_base_is_refused(report, tmp_path):
    # A merged model may be a base in turn; its adapters would lose it.
    first = report.folder
    second = write_adapter(first, tmp_path / "second")
    with pytest.raises(UserError, match="is the base model itself"):
        merge_adapter(second, first)
    with pytest.raises(UserError, match="merged model already"):
        merge_adapter(first, tmp_path / "third")
    with pytest.raises(UserError, match="float32 or bfloat16"):
        merge_adapter(second, tmp_path / "third", dtype="float16")


# ---- copies ---------------------------------------------------------------------------------------------------------


def test_copy_is_the_adapter(adapter, tmp_path):
    # Into an empty folder and over an adapter: the same files, byte for byte, and no others.
    target = tmp_path / "deep" / "copy"
    target.mkdir(parents=True)
    for _ in range(2):
        assert copy_adapter(adapter, target) == target
        assert files_in(target) == files_in(adapter)
    assert files_in(target.parent) == ["copy"]
    for file in adapter.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="another place"):
        copy_adapter(target, target)


# ---- the hub --------------------------------------------------------------------------------------------------------


def add(name: str, content: bytes = b"x"):
    return lambda folder: (folder / name).write_bytes(content)


def cut_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.fixture
def copied(adapter, tmp_path) -> Path:
    """An adapter folder that a test may damage."""
    return copy_adapter(adapter, tmp_path / "run" / "best")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("merged", [False, True])
def test_dry_run_uses_no_network(merged, adapter, report, no_network):
    # Files, sizes and the head of the card, for an adapter and a merged model; hidden files stay here.
    folder = report.folder if merged else adapter
    upload = push_adapter(folder, "me/gears", dry_run=True)
    assert upload.files == {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    assert upload.card_head.startswith("---\nlibrary_name: " + ("transformers" if merged else "peft"))
    assert (upload.private, upload.url) == (True, None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (add("training_args.bin"), "pickle"),
        (add("optimizer.PT"), "pickle"),
        (add("notes.txt", b""), "empty"),
        (cut_weights, "damaged"),
        (add("sam3lora.json", b"{"), "damaged"),
        (lambda folder: (folder / "README.md").unlink(), "no model card"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "neither a complete adapter folder"),
    ],
)
def test_unfit_folder_is_refused(copied, damage, message):
    # The run's folder instead of the adapter in it is the likeliest mistake.
    with pytest.raises(UserError, match=r"did you mean .*best\?"):
        push_adapter(copied.parent, "me/gears", dry_run=True)
    damage(copied)
    with pytest.raises(UserError, match=message):
        push_adapter(copied, "me/gears", dry_run=True)


class FakeHub:
    """Stands for `HfApi`: remembers what is asked of it."""

    is_private, error = True, None

    def __init__(self):
        self.calls = {}

    def __call__(self, token):
        self.calls["token"] = token
        return self

    def create_repo(self, repo_id, **options):
        if self.error:
            raise self.error
        self.calls["create"] = options
        return f"https://hub/{repo_id}"

    def model_info(self, repo_id):
        return types.SimpleNamespace(private=self.is_private)

    def upload_folder(self, **options):
        self.calls["upload"] = options


@pytest.fixture
def hub(monkeypatch, no_network):
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    return fake


def test_upload(copied, hub):
    # Private unless told otherwise, with the token that was given, and the listed files alone.
    add(".env")(copied)
    (copied / ".git").mkdir()
    add("a[1].txt")(copied)
    upload = push_adapter(copied, "me/gears", token="hf_mine")
    assert upload.url == "https://hub/me/gears"
    assert (hub.calls["token"], hub.calls["create"]) == ("hf_mine", {"private": True, "exist_ok": True})
    asked = hub.calls["upload"]
    chosen = filter_repo_objects(files_in(copied), allow_patterns=asked["allow_patterns"])
    assert list(chosen) == sorted(upload.files) == sorted(set(files_in(copied)) - {".env", ".git"})


def test_public_repository_is_not_filled_unasked(adapter, hub):
    # The hub ignores `private` for a repository that exists.
    hub.is_private = False
    with pytest.raises(UserError, match="exists and is public"):
        push_adapter(adapter, "me/gears", token="hf_mine")
    assert "upload" not in hub.calls
    push_adapter(adapter, "me/gears", token="hf_mine", private=False)
    assert hub.calls["create"]["private"] is False
    assert "upload" in hub.calls


def test_malformed_name_no_token_no_network_no_access(adapter, hub, monkeypatch):
    # Each says what to do, and nothing is uploaded.
    for malformed in ("gears", "me/gears/best", "me/ge ars"):
        with pytest.raises(UserError, match="hub name"):
            push_adapter(adapter, malformed, dry_run=True)
    with pytest.raises(UserError, match="hf auth login"):
        push_adapter(adapter, "me/gears")
    hub.error = ConnectionError("no route")
    with pytest.raises(UserError, match=r"could not reach the hub.*no route"):
        push_adapter(adapter, "me/gears", token="hf_mine")
    hub.error = HfHubHTTPError("403 Forbidden", response=types.SimpleNamespace(headers={}, request=None))
    with pytest.raises(UserError, match=r"write access.*403"):
        push_adapter(adapter, "me/gears", token="hf_mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        push_adapter(adapter, "me/gears", token="hf_mine")
    assert "upload" not in hub.calls
