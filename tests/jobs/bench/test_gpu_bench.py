"""The GPU benchmark as a program, tried on a CPU, and the counting behind its predictions."""

import json
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import Sam3Config

from jobs.bench import counting_sam3
from jobs.bench.counting import Device, OperationCounter
from jobs.bench.counting_sam3 import count_inference, count_training
from jobs.bench.gpu import GpuReport, main, measure_gpu
from jobs.bench.gpu_timing import Stopwatch
from jobs.bench.gpu_training import Case, Inputs, Preset, Training
from jobs.bench.models import CONFIGS, random_model
from sam3lora.config import load_config
from sam3lora.errors import UserError
from sam3lora.model.components import COMPONENTS
from sam3lora.model.staged.forward import StagedSam3

GRID = 18
"""324 tokens: no other size of the model below."""


def micro_config() -> Sam3Config:
    """Two layers of the vision tower and one of everything else, four prompt tokens and 20 object queries."""
    side, detector = GRID * 14, {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "dropout": 0.0}
    return Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": side,
                "pretrain_image_size": side,
                "patch_size": 14,
                "window_size": GRID // 2,
                "global_attn_indexes": [1],
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[GRID * 4] * 2, [GRID * 2] * 2, [GRID] * 2],
        },
        text_config={
            "vocab_size": 100,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        geometry_encoder_config=detector | {"num_layers": 1},
        detr_encoder_config=detector | {"num_layers": 2},
        detr_decoder_config=detector | {"num_layers": 2, "num_queries": 20},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4},
    )


@pytest.fixture
def micro(monkeypatch):
    monkeypatch.setitem(CONFIGS, "micro", micro_config)
    return "micro"


# ---- counting --------------------------------------------------------------------------------------------------------


def test_a_product_is_counted_by_hand():
    x, w = torch.zeros(3, 5), torch.zeros(5, 7, requires_grad=True)
    with OperationCounter() as counter:
        with counter.stage("product"):
            y = x @ w
        with counter.stage("sum"):
            total = y.sum()
        assert counter.live_by_stage == {"product": 3 * 7 * 4, "sum": 4}
        total.backward()
        del y, total
    product = counter.by_stage["product"]
    assert product.operations == 2 * 2 * 3 * 5 * 7  # the product itself and the gradient of w
    assert product.kernels[2 * 3 * 5 * 7, (3 * 5 + 5 * 7 + 3 * 7) * 4] == 1
    assert counter.live_bytes == 5 * 7 * 4  # the gradient
    assert counter.peak_bytes >= (3 * 7 + 5 * 7) * 4


def test_a_kernel_takes_the_longer_of_operations_bytes_and_launch():
    with OperationCounter() as counter:
        torch.zeros(3, 5) @ torch.zeros(5, 7)
    tally = counter.total
    assert tally.num_kernels == 3
    moved = (15 + 35 + 15 + 35 + 21) * 4
    slow = Device("", peak=1.0, bandwidth=1e9, memory_gb=1, share=0.5, bandwidth_share=1, launch_s=0)
    assert tally.seconds(slow) == pytest.approx(2 * 3 * 5 * 7 / 0.5, rel=1e-4)
    thin = Device("", peak=1e12, bandwidth=2.0, memory_gb=1, share=0.5, bandwidth_share=0.5, launch_s=0)
    assert tally.seconds(thin) == pytest.approx(moved)
    assert tally.seconds(Device("", peak=1e12, bandwidth=1e12, memory_gb=1, launch_s=2)) == 6


@pytest.mark.parametrize(
    "case",
    [
        Case("light", prompts=1, objects=1),
        pytest.param(Case("maximum", prompts=2, objects=2), marks=pytest.mark.slow, id="recomputed"),
        pytest.param(Case("maximum", prompts=9, objects=1, checkpointing=()), marks=pytest.mark.slow, id="two chunks"),
    ],
)
def test_fake_tensors_give_the_counts_of_real_ones_and_the_memory_of_the_allocator(micro, case):
    predicted = count_training(case, micro, gpu_types=False)
    real = count_training(case, micro, gpu_types=False, fake=False)
    operations = {name: tally.operations for name, tally in predicted.by_stage.items()}
    assert operations == {name: tally.operations for name, tally in real.by_stage.items()}
    assert predicted.weights == real.weights
    assert {name for name, number in operations.items() if number} >= {"ViT trunk", "neck", "DETR encoder", "masks"}
    model = random_model(micro)
    training = Training(model, case, counting_sam3.assumed_loss)
    inputs = Inputs.draw(model, case, "cpu")
    assert predicted.peak - counting_sam3.bytes_of(inputs) == pytest.approx(
        _allocated(lambda: training.gradients(inputs)), rel=0.15
    )


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["light", "full"])
def test_predicted_memory_of_the_small_model_is_that_of_the_allocator(preset):
    case = Case(preset, prompts=2, objects=2)
    predicted = count_training(case, "small", gpu_types=False)
    model = random_model("small")
    training = Training(model, case, counting_sam3.assumed_loss)
    inputs = Inputs.draw(model, case, "cpu")
    measured = _allocated(lambda: training.gradients(inputs))
    assert predicted.peak - counting_sam3.bytes_of(inputs) == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_recomputing_costs_operations_and_saves_what_is_kept(micro):
    kept, recomputed = (
        count_training(Case("maximum", prompts=2, checkpointing=components), micro) for components in ((), COMPONENTS)
    )
    assert recomputed.total.operations > 1.1 * kept.total.operations
    for stage in ("ViT trunk", "DETR encoder", "DETR decoder", "pixel decoder"):
        assert recomputed.kept[stage] < 0.7 * kept.kept[stage], stage


@pytest.mark.slow
def test_counting_leaves_no_fake_tensors_behind(micro):
    count_inference(1, micro)
    model = random_model(micro)
    maps = StagedSam3(model).encode_images(torch.zeros(1, 3, GRID * 14, GRID * 14)).maps_ICHW
    assert all(type(one) is torch.Tensor and one.isfinite().all() for one in maps)


@pytest.mark.slow
def test_operations_of_the_full_size_trunk_by_hand():
    """32 layers of 5184 tokens; four of them attend to all, the others within windows."""
    tokens, width, hidden, window = 72 * 72, 1024, 4736, 24 * 24
    products = 2 * tokens * (4 * width * width + 2 * width * hidden)
    attention = [2 * 2 * tokens * reach * width for reach in [window] * 28 + [tokens] * 4]
    patches = 2 * tokens * width * 3 * 14 * 14
    assert _trunk_operations() == 32 * products + sum(attention) + patches


def _trunk_operations() -> int:
    model = random_model("facebook/sam3", device="meta")
    with counting_sam3.fake_tensors():
        counting_sam3.fill_with_fakes(model.vision_encoder)
        with OperationCounter() as counter, torch.no_grad():
            model.vision_encoder.backbone(torch.zeros(1, 3, 1008, 1008))
    return counter.total.operations


def _allocated(run) -> int:
    """Most bytes that a call took from torch's allocator at a time, as its profiler tells."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


# ---- attention -------------------------------------------------------------------------------------------------------


class _WholeMatrices(TorchDispatchMode):
    """Operations that make a tensor of tokens x tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tokens = GRID * GRID
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor) and list(leaf.shape).count(tokens) >= 2:
                self.found.append(f"{func}: {tuple(leaf.shape)}")
        return out


@pytest.mark.parametrize("checkpointing", [pytest.param((), marks=pytest.mark.slow), COMPONENTS])
def test_no_tensor_of_tokens_by_tokens_in_training(micro, checkpointing):
    case = Case("full", images=2, prompts=2, objects=1, checkpointing=checkpointing)
    model = random_model(micro)
    training = Training(model, case)
    inputs = Inputs.draw(model, case, "cpu")
    with _WholeMatrices() as whole:
        training.step(inputs)
    assert not whole.found


def test_no_tensor_of_tokens_by_tokens_in_inference(micro):
    model = random_model(micro)
    assert not _found_in_inference(model)
    model.set_attn_implementation("eager")
    assert _found_in_inference(model)


def _found_in_inference(model) -> list[str]:
    staged = StagedSam3(model)
    with _WholeMatrices() as whole, torch.no_grad():
        vision = staged.encode_images(torch.zeros(1, 3, GRID * 14, GRID * 14))
        text = staged.encode_text(torch.ones(2, 32, dtype=torch.long), torch.ones(2, 32, dtype=torch.long))
        found = staged.detect(vision, text, torch.zeros(2, dtype=torch.long), torch.arange(2))
        head = staged.mask_head(found, torch.arange(2))
        head.instance_logits(torch.arange(2), torch.arange(2))
    return whole.found


# ---- the program -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_section_on_a_cpu(micro, tmp_path, capsys):
    arguments = ["--device", "cpu", "--repeats", "1", "--presets", "light", "full", "--batches", "1", "--prompts", "2"]
    assert main(["--model", micro, *arguments, "--json", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    sections = found["sections"]
    assert not [row for rows in sections.values() for row in rows if "failed" in row.get("note", "")]
    assert sections["attention"] == [{"inference": "fused everywhere", "training": "fused everywhere"}]
    eager, *compiled = sections["inference"]
    assert eager["prompts"] == 2
    assert {f"{name} ms" for name in ("vision", "text", "detector", "masks", "post-processing")} <= eager.keys()
    assert [row["note"] for row in compiled] == ["needs a GPU"] * 2
    assert [(row["preset"], row["way"]) for row in sections["adapters"]] == [
        (preset, way) for preset in ("balanced", "maximum") for way in ("bank", "PEFT")
    ]
    assert [(row["preset"], row["way"]) for row in sections["training"]] == [
        ("light", "sam3lora"),
        ("light", "sam3lora, trunk cached"),
        ("light", "transformers + PEFT"),
        ("full", "sam3lora"),
        ("full", "transformers + PEFT"),
    ]
    for row in sections["training"]:
        assert row["images/s"] > 0
        assert row["backward ms"] > 0
    assert found["goals"] == []
    assert "need a GPU" in capsys.readouterr().out


def test_goals_are_about_the_full_size_on_a_gpu():
    rows = [
        {"preset": "light", "images": 1, "way": "sam3lora", "peak GB": 3.5},
        {"preset": "light", "images": 1, "way": "transformers + PEFT", "peak GB": 30.0},
        {"preset": "balanced", "images": 1, "way": "sam3lora", "peak GB": 9.0},
        {"preset": "maximum", "images": 2, "way": "sam3lora", "note": "out of memory"},
    ]
    report = GpuReport({"gpu": "a GPU"}, {"model": "facebook/sam3"}, {"training": rows})
    assert [(row["goal"], row["met"]) for row in report.goals()] == [
        ("light, 1 image: GB", True),
        ("balanced r16, 1 image: GB", False),
    ]
    assert "out of memory" in report.text()
    assert not GpuReport({"gpu": "a GPU"}, {"model": "tiny"}, {"training": rows}).goals()
    assert not GpuReport({"gpu": None}, {"model": "facebook/sam3"}, {"training": rows}).goals()


def test_memory_that_runs_out_is_a_row(micro, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Training, "step", no_memory)
    report = measure_gpu(micro, "cpu", sections=["training"], repeats=1, presets=["balanced"], batches=[1])
    assert report.sections["training"] == [
        {"preset": "balanced", "images": 1, "way": "sam3lora", "note": "out of memory"}
    ]


def test_a_section_that_fails_is_a_row(micro, monkeypatch):
    monkeypatch.setattr("jobs.bench.gpu.check_attention", lambda *_: 1 / 0)
    report = measure_gpu(micro, "cpu", sections=["attention"])
    assert report.sections["attention"] == [{"note": "failed: ZeroDivisionError: division by zero"}]
    assert report.failed
    assert main(["--model", micro, "--device", "cpu", "--sections", "attention"]) == 1


@pytest.mark.parametrize("wrong", [{"model": "huge"}, {"sections": ["speed"]}])
def test_what_cannot_be_measured(wrong):
    with pytest.raises(UserError, match="must be"):
        measure_gpu(**{"model": "tiny", "device": "cpu"} | wrong)


@pytest.mark.parametrize("preset", ["light", "balanced", "full", "maximum"])
def test_presets_are_those_of_the_configuration(preset):
    config = load_config(preset)
    read = Preset.read(preset)
    assert read.lora == config.lora.settings
    wanted = config.training.gradient_checkpointing
    assert read.checkpointing == (COMPONENTS if wanted is True else tuple(wanted or ()))


def test_a_stopwatch_adds_up_parts_until_it_is_read():
    watch = Stopwatch(torch.device("cpu"))
    for name in ("a", "b", "a"):
        with watch.part(name):
            torch.zeros(1)
    assert watch.milliseconds().keys() == {"a", "b"}
    assert watch.milliseconds() == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [
        "inference",
        "training",
    ],
)
def test_it_runs_without_the_packages_that_a_bare_gpu_machine_lacks(section):
    command = [sys.executable, "-c", _BARE, section]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


_BARE = """
import sys

class Without:
    names = {"ray", "typer", "rich", "pyarrow", "optuna", "cv2", "pycocotools", "fastapi", "pandas"}
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from jobs.bench.gpu import main
arguments = "--model tiny --device cpu --repeats 1 --presets light --batches 1 --prompts 1"
sys.exit(main([*arguments.split(), "--sections", sys.argv[1]]))
"""
