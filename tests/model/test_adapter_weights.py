"""The weights of adapter folders, and the damaged or unsupported folders that are refused."""

import json
import math
import os
import pickle
import struct
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from sam3lora.errors import UserError
from sam3lora.model.adapter import weights as adapter_weights
from sam3lora.model.adapter.folder import folder_signature, load_adapter, save_adapter
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.adapter.weights import read_adapter_weights
from sam3lora.model.components import adapted_modules
from sam3lora.model.fingerprint import fingerprint

from .conftest import make_sam3

CONFIG, WEIGHTS, METADATA = "adapter_config.json", "adapter_model.safetensors", "sam3lora.json"


def small_base(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def save(base, folder, metadata=None, seed=1, **config):
    """A folder with an adapter of random values on ``base``, which is copied; and the PEFT model."""
    generator = torch.Generator().manual_seed(seed)
    model = get_peft_model(deepcopy(base), LoraConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            factor = 1 + torch.rand(parameter.shape, generator=generator)
            parameter.data = parameter.data * factor + 0.1 * factor
    return save_adapter(model, folder, metadata), model


@pytest.fixture
def saved(tmp_path):
    """An adapter of rank 2 on both layers of the small base."""
    metadata = AdapterMetadata(base_model="small", base_fingerprint=fingerprint(small_base()), geometry_cls=False)
    return save(small_base(), tmp_path / "best", metadata, r=2, lora_alpha=6, target_modules=["0", "2"])[0]


def edit_config(folder, **values):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def update_of(weights):
    """The change of a Linear's weight."""
    return weights.up @ weights.down


def test_what_is_read(saved):
    # Drawn by hand from the file: A as it is, B times alpha / r = 3.
    tensors = load_file(saved / WEIGHTS)
    weights = read_adapter_weights(saved, small_base())
    assert list(weights.modules) == ["0", "2"]
    for name, module in weights.modules.items():
        assert torch.equal(module.down, tensors[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(module.up, 3 * tensors[f"base_model.model.{name}.lora_B.weight"])
        assert module.gain is None
    assert weights.rank == 2
    assert weights.size_bytes == 4 * (2 * 3 + 4 * 2 + 2 * 4 + 2 * 2)
    assert weights.components == frozenset()  # the base is no SAM 3
    assert not weights.geometry_cls
    assert weights.metadata.base_model == "small"
    # both readers of a folder agree
    model, metadata = load_adapter(small_base(), saved)
    assert (metadata, adapted_modules(model)) == (weights.metadata, tuple(weights.modules))


@pytest.mark.parametrize(
    ("config", "scalings"),
    [
        ({"r": 4, "lora_alpha": 8}, (2, 2)),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, (4, 4)),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"2": 1}}, (2, 8)),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^0$": 2}}, (0.5, 2)),
    ],
)
def test_scaling_of_each_module(tmp_path, config, scalings):
    # alpha / r, alpha / sqrt(r) with rsLoRA, and the patterns of single modules.
    folder, model = save(small_base(), tmp_path / "a", target_modules=["0", "2"], **config)
    weights = read_adapter_weights(folder, small_base())
    for (name, module), scaling in zip(weights.modules.items(), scalings, strict=True):
        layer = model.base_model.model.get_submodule(name)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(update_of(module), scaling * product)


def test_dora_is_the_merged_weight(tmp_path):
    # (gain - 1) W + up down is what merging adds to W, for Linear and Conv2d.
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(16, 2)).eval()
    folder, model = save(base, tmp_path / "a", r=2, use_dora=True, target_modules=["0", "2"])
    weights = read_adapter_weights(folder, base)
    merged = model.merge_and_unload()
    for name, module in weights.modules.items():
        before = base.get_submodule(name).weight
        assert (module.gain - 1).abs().max() > 0.1
        after = module.gain[:, None] * before.flatten(1) + module.up @ module.down.flatten(1)
        torch.testing.assert_close(after.view_as(before), merged.get_submodule(name).weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_files_of_any_precision(saved, dtype):
    # Half-precision files are served in float32; a float64 base keeps its digits.
    def cast(tensors):
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items()}

    edit_tensors(saved, cast)
    assert {w.down.dtype for w in read_adapter_weights(saved, small_base()).modules.values()} == {torch.float32}
    double = read_adapter_weights(saved, small_base().double(), check_base=False)
    assert {w.up.dtype for w in double.modules.values()} == {torch.float64}


def test_components_of_a_sam3(tmp_path):
    # Serving shares what an adapter leaves alone; without metadata the CLS token is on.
    base = make_sam3()
    folder, _ = save(
        base, tmp_path / "a", r=2, target_modules=["text_mlp.layer1", "query_proj", "neck.fpn_layers.0.proj1"]
    )
    weights = read_adapter_weights(folder, base)
    assert weights.components == {"scoring", "vision_encoder"}
    assert weights.geometry_cls
    assert weights.metadata is None


def test_targets_are_those_of_peft(tmp_path):
    # A regular expression, exclusions and layer indices select what PEFT would adapt.
    base = make_sam3()
    for number, config in enumerate(
        [
            {"target_modules": r".*detr_decoder\.layers\.\d\.mlp\.fc\d"},
            {"target_modules": ["q_proj"], "exclude_modules": ["detr_encoder.layers.0.self_attn.q_proj"]},
            {"target_modules": ["fc1"], "layers_to_transform": [1]},
        ]
    ):
        folder, model = save(base, tmp_path / str(number), r=2, **config)
        names = tuple(read_adapter_weights(folder, base).modules)
        assert names
        assert names == adapted_modules(model)


def test_version_follows_the_contents(saved, tmp_path):
    # Equal files are one version wherever they lie; any changed file is another.
    base = small_base()
    first = read_adapter_weights(saved, base).version
    copy = saved.rename(tmp_path / "elsewhere")
    assert read_adapter_weights(copy, base).version == first
    edit_tensors(copy, lambda tensors: tensors[min(tensors)].add_(1))
    second = read_adapter_weights(copy, base).version
    edit_config(copy, lora_alpha=7)
    third = read_adapter_weights(copy, base).version
    (copy / METADATA).unlink()
    assert len({first, second, third, read_adapter_weights(copy, base).version}) == 4


def test_nothing_of_the_file_stays_mapped(saved):
    # Somebody overwrites the file in place while the adapter is served.
    weights = read_adapter_weights(saved, small_base())
    before = weights.modules["0"].down.clone()
    size = (saved / WEIGHTS).stat().st_size
    with (saved / WEIGHTS).open("r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(weights.modules["0"].down, before)


# ---- refused ------------------------------------------------------------------------------------------------------


def refuse(folder, message, base=None, **options):
    """Reading raises a UserError and leaves the model untouched."""
    base = base or small_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(UserError, match=message):
        read_adapter_weights(folder, base, **options)
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_hooks for module in base.modules())


KEY = "base_model.model.0.lora_A.weight"
EXTRA, UP = "base_model.model.1.weight", "base_model.model.0.lora_B.weight"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (KEY, None, f"lacks 1 tensors, first {KEY}"),
        (KEY, torch.zeros(3, 3), r"of shape \(3, 3\), the model needs \(2, 3\)"),
        (KEY, torch.zeros(100_000, 3), r"of shape \(100000, 3\)"),
        (KEY, torch.full((2, 3), math.nan), "NaN or infinite"),
        (KEY, torch.ones(2, 3, dtype=torch.int64), "dtype I64"),
        (KEY, torch.ones(2, 3).to(torch.float8_e4m3fn), "dtype F8_E4M3"),
        # weights that the configuration does not mention would be dropped silently
        (EXTRA, torch.zeros(2), r"unexpected 1 tensors, first base_model\.model\.1\.weight"),
        # finite in the file, infinite once multiplied
        (UP, torch.full((4, 2), 3e38), "scaled by 3, has NaN or infinite"),
    ],
)
def test_wrong_tensors(saved, key, value, message):
    # Each is found without PEFT, mostly from the header alone.
    edit_tensors(saved, lambda tensors: tensors.pop(key) if value is None else tensors.update({key: value}))
    refuse(saved, message)


def test_dora_of_a_weight_that_vanishes(tmp_path):
    # The norm in the denominator is zero where the update cancels the base's weight.
    base = nn.Sequential(nn.Linear(2, 2, bias=False))
    folder, _ = save(base, tmp_path / "a", r=1, lora_alpha=1, use_dora=True, target_modules=["0"])
    nn.init.zeros_(base[0].weight)
    edit_tensors(folder, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name])
    refuse(folder, "DoRA magnitude of 0 has NaN", base)


def test_ranks_above_the_limit(saved):
    # From the configuration and the header: not a byte of the tensors is read.
    assert read_adapter_weights(saved, small_base(), max_rank=2)
    refuse(saved, "has rank 2, but at most 1", max_rank=1)
    edit_config(saved, r=10**9)
    refuse(saved, "has rank 1000000000, but at most 256", max_rank=256)
    edit_config(saved, r=2, rank_pattern={"0": 300})
    refuse(saved, "has rank 300", max_rank=256)


def test_truncated_files_and_headers_that_lie(saved):
    # Lengths, offsets and the header's own length are checked against the file before anything is allocated.
    contents = (saved / WEIGHTS).read_bytes()
    lies = [
        {"shape": [2, 4]},  # more values than bytes
        {"data_offsets": [0, 10**12]},  # beyond the end of the file
        {"data_offsets": [8, 32]},  # a hole at the start
        {"dtype": "F64"},
        {"dtype": "X99"},
        {"shape": [2**40, 2**40]},
    ]
    known = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    headers = [json.dumps({KEY: known | lie}).encode() for lie in lies]
    files = [struct.pack("<Q", len(header)) + header + bytes(24) for header in headers]
    files += [contents[:size] for size in (0, 4, 8, 60, len(contents) - 1)] + [struct.pack("<Q", 2**62) + b"{}"]
    for file in files:
        (saved / WEIGHTS).write_bytes(file)
        refuse(saved, "damaged or not a safetensors file|lacks")


class Bomb:
    """Sets a flag when unpickled."""

    exploded = False

    def __reduce__(self):
        return (setattr, (Bomb, "exploded", True))


def test_pickles_are_never_loaded(saved):
    # Neither under the name of the safetensors file nor beside it.
    bomb = pickle.dumps(Bomb())
    (saved / WEIGHTS).write_bytes(bomb)
    refuse(saved, "not a safetensors file")
    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(bomb)
    refuse(saved, r"adapter_model\.bin is a pickle")
    assert not Bomb.exploded
    pickle.loads(bomb)  # noqa: S301
    assert Bomb.exploded  # the bomb does work


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "expected LoRA"),
        ({"peft_type": "NOTHING"}, "expected LoRA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config, which is not supported"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["0"]}, "modules_to_save; it cannot share a batch.*--merge"),
        ({"lora_bias": True}, "lora_bias; it cannot share a batch"),
        ({"target_parameters": ["0.weight"]}, "target_parameters; it cannot share a batch"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens; it cannot share a batch"),
        ({"use_qalora": True}, "use_qalora; it cannot share a batch"),
        ({"target_modules": ["nowhere"]}, "match no module"),
        ({"target_modules": []}, "no target_modules|valid PEFT"),
        ({"target_modules": None}, "no target_modules"),
        ({"target_modules": ["0", "1"]}, "adapts 1, a ReLU"),
        ({"target_modules": "(("}, "no expression on module names"),
        ({"target_modules": ["0"]}, "unexpected 2 tensors"),
        ({"target_modules": 7}, "must be a list of"),
        ({"r": 3}, r"the model needs \(3, 3\)"),
        ({"r": 0}, "must be a positive integer"),
        ({"r": "2"}, "must be a positive integer"),
        ({"r": 10**400}, "must be a positive integer"),
        ({"lora_alpha": "much"}, "must be a number"),
        ({"lora_alpha": math.inf}, "must be a number"),
        ({"rank_pattern": {"((": 2}}, "no expression on module names"),
        ({"rank_pattern": [1]}, "must be an object of"),
        ({"use_dora": True}, "lacks 2 tensors.*lora_magnitude_vector"),
    ],
)
def test_configurations_that_cannot_be_served(saved, values, message):
    # What names code, changes the base or needs more than a product beside a layer.
    edit_config(saved, **values)
    refuse(saved, message)


def test_embeddings_and_special_convolutions(tmp_path):
    # PEFT takes them; their updates are no product beside the layer's output, or not exactly.
    embedding = nn.Sequential(nn.Embedding(5, 4))
    folder, _ = save(embedding, tmp_path / "embedding", r=1, target_modules=["0"])
    refuse(folder, "adapts 0, a Embedding and no Linear or Conv2d; it cannot share a batch", embedding)
    reflect = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    folder, _ = save(reflect, tmp_path / "reflect", r=1, target_modules=["0"])
    refuse(folder, "specially padded convolution", reflect)


def test_other_base(saved, monkeypatch):
    # Same shapes, other weights; the check can be switched off. A fingerprint reads every parameter: one for each base.
    taken = []
    monkeypatch.setattr(adapter_weights, "fingerprint", lambda model: taken.append(model) or fingerprint(model))
    base, other = small_base(), small_base(seed=9)
    for _ in range(3):
        read_adapter_weights(saved, base)
        refuse(saved, "was trained on the base 'small'.*use it with that base", other)
    assert taken == [base, other]
    assert read_adapter_weights(saved, other, check_base=False)
    refuse(saved, "of shape|lacks", nn.Sequential(nn.Linear(3, 5)), check_base=False)


def test_missing_and_damaged_files(saved, tmp_path, monkeypatch):
    # Also metadata that cannot be trusted, and what the system refuses.
    def fail(folder):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(adapter_weights, "read_metadata", fail)
        refuse(saved, "cannot be read: Permission denied")
    refuse(tmp_path / "nowhere", "does not exist")
    (saved / METADATA).write_text("{")
    refuse(saved, "damaged")
    (saved / METADATA).unlink()
    (saved / CONFIG).write_bytes(b"\xff\xfe")
    refuse(saved, "is damaged")
    (saved / CONFIG).unlink()
    refuse(saved, r"lacks adapter_config\.json")


def replaced_while_read(saved, tmp_path, monkeypatch, times):
    """The folder is replaced by an adapter of ten times the scaling after its configuration was read."""
    others = [
        save(small_base(), tmp_path / f"next {time}", r=2, lora_alpha=60, target_modules=["0", "2"])[0]
        for time in range(times)
    ]
    read = adapter_weights.read_config

    def replace_after(folder):
        config = read(folder)
        if others:
            other = others.pop()
            for file in (CONFIG, WEIGHTS):
                (other / file).rename(saved / file)
        return config

    monkeypatch.setattr(adapter_weights, "read_config", replace_after)


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again_until_it_is_refused(saved, tmp_path, monkeypatch):
    # The configuration of one adapter with the weights of the next would be wrong unnoticed.
    replaced_while_read(saved, tmp_path, monkeypatch, times=2)
    found = read_adapter_weights(saved, small_base())
    monkeypatch.undo()
    expected = read_adapter_weights(saved, small_base())
    tensors = load_file(saved / WEIGHTS)
    assert torch.equal(found.modules["0"].up, 30 * tensors["base_model.model.0.lora_B.weight"])
    assert found.version == expected.version
    replaced_while_read(saved, tmp_path, monkeypatch, times=10)
    refuse(saved, "changed while it was being read")


def test_a_file_that_goes_between_two_looks_is_a_change(saved, tmp_path, monkeypatch):
    # A folder is moved away, and a moment later another one takes its place.
    other, _ = save(small_base(), tmp_path / "next", r=1, target_modules=["0"])
    is_file = type(saved).is_file
    looks = []

    def goes_after(path):
        found = is_file(path)
        looks.append(path.name)
        if len(looks) == 1:
            saved.rename(tmp_path / "away")
        elif other.exists() and path.name == WEIGHTS:
            other.rename(saved)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(type(saved), "is_file", goes_after)
        weights = read_adapter_weights(saved, small_base())
    assert weights.rank == 1


def test_a_file_that_was_written_and_dated_back_is_a_change(saved):
    file = saved / WEIGHTS
    before, found = file.stat(), folder_signature(saved)
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of a file system has steps
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert folder_signature(saved) != found
