"""Runs of task clicks: the same whatever interrupts or divides them, and folders that give back what was trained."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from jobs.bench.pretend_gpu import DEVICE, pretend_gpu
from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.evaluation.ask.click_run import evaluate_clicks
from sam3lora.evaluation.clicks.settings import ClickEvaluation
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.model.clicks.adapter import load_click_adapter
from sam3lora.model.loading import load_base
from sam3lora.training import trainer
from sam3lora.training.clicks.asking import ask
from sam3lora.training.clicks.sampling import Prompts
from sam3lora.training.launch import train
from sam3lora.training.step import StepCounts

from ..run_folder import adapter_of, assert_equal, folder_of, lines_of, passes_of, without_measures
from ..two_workers import make_trainer


def logged(run: Config, kind: str) -> list[dict]:
    return [without_measures(line) for line in lines_of(run, kind)]


def gradients(worker, batches, world_size: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Of a step that takes these batches; its counts are always those of the whole step of 4 images."""
    worker.optimizer.zero_grad(set_to_none=True)
    terms: dict[str, float] = {}
    for batch in batches:
        _, found = worker.runner.backward(batch, worker.counts.normalizer(world_size))
        terms = {name: terms.get(name, 0.0) + value.item() for name, value in found.items()}
    return {name: one.grad.clone() for name, one in worker.model.named_parameters() if one.grad is not None}, terms


def test_resume_equals_the_straight_run(make, monkeypatch):
    dropout = ("lora.dropout=0.1", "data.horizontal_flip=0.5")
    straight = make(*dropout, output="straight")
    train(straight)
    config = make(*dropout, "training.save_steps=1")
    step = trainer.optimizer_step

    def killed_before_step_5(run, group):
        if run.state.step == 4:
            raise KeyboardInterrupt
        return step(run, group)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", killed_before_step_5)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config, resume=True)
    for kind in ("step", "epoch"):
        assert logged(config, kind) == logged(straight, kind)
    assert_equal(adapter_of(config), adapter_of(straight))
    assert any(value.any() for name, value in adapter_of(config).items() if ".lora_B." in name)


def test_a_step_does_not_depend_on_how_it_is_divided(make):
    # One batch of four images, four of one image, and two workers of two images each whose gradients are averaged.
    whole = make_trainer(make("training.batch_size=4", output="whole"))
    parts = make_trainer(make("training.batch_size=1", "training.images_per_step=4", output="parts"))
    [batch] = islice(whole.batches.training_batches(0, 0), 1)
    single = list(islice(parts.batches.training_batches(0, 0), 4))
    assert [number for one in single for number in one.image_ids] == batch.image_ids.tolist()
    for worker in (whole, parts):
        worker.counts = StepCounts.of([batch])
    expected, terms = gradients(whole, [batch])
    assert sum(one.abs().sum().item() for one in expected.values()) > 0
    accumulated, terms_of_parts = gradients(parts, single)
    first, second = (gradients(parts, half, world_size=2)[0] for half in (single[:2], single[2:]))
    # A worker alone may have no gradient of a mask that was the cheapest of none of its objects.
    halves = {
        name: (first.get(name, torch.zeros(())) + second.get(name, torch.zeros(()))) / 2 for name in first | second
    }
    assert terms_of_parts == pytest.approx(terms, rel=1e-4)
    for found in (accumulated, halves):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_step_runs_on_a_gpu_without_waiting_for_it(make, monkeypatch):
    worker = make_trainer(make("clicks.starts.mask_and_box=0.5"))
    [batch] = islice(worker.batches.training_batches(0, 0), 1)
    worker.counts = StepCounts.of([batch])
    expected, terms = gradients(worker, [batch])
    runner, on_host = worker.runner, torch.Generator
    with pretend_gpu() as launches:
        monkeypatch.setattr(torch, "Generator", lambda device=None: on_host())  # PyTorch has none for such a GPU
        for module in (worker.model, runner.head, runner.images.vision_trunk):
            module.to("cuda")
        runner.device = runner.images.device = DEVICE
        runner.images.trunk = None
        worker.optimizer.zero_grad(set_to_none=True)
        _, on_gpu = runner.backward(batch, worker.counts.normalizer(1))
        assert not launches.reads
        found = {name: one.grad.cpu() for name, one in worker.model.named_parameters() if one.grad is not None}
        assert {name: value.item() for name, value in on_gpu.items()} == pytest.approx(terms, rel=1e-4)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_every_image_passes_the_trunk_once_with_the_same_result(make):
    plain, cached = make("training.feature_cache=false", output="plain"), make(output="cached")
    for config in (plain, cached):
        train(config)
    assert passes_of(cached)[0] == 6 + 3
    assert passes_of(plain)[0] > 2 * passes_of(cached)[0]
    for kind, name in (("step", "loss"), ("epoch", "valid_loss"), ("epoch", "mean_iou_3")):
        ours, theirs = ([line[name] for line in logged(run, kind)] for run in (cached, plain))
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_folder_gives_back_what_was_trained(make, click_base, monkeypatch):
    runs, save = [], trainer.Trainer.save

    def saving(run):
        runs.append(run)
        save(run)

    monkeypatch.setattr(trainer.Trainer, "save", saving)
    config = make("training.batch_size=auto", "evaluation.num_samples=1")
    train(config)
    [*_, run] = runs
    assert run.best_metric == "mean_iou_3"
    base = load_base(str(click_base))
    adapted, plain = load_click_adapter(folder_of(config) / "last", base), run.runner.head.eval()
    pixels = torch.rand(1, 3, base.resolution, base.resolution, generator=torch.Generator().manual_seed(0))
    prompts = Prompts(torch.tensor([[[40.0, 60.0]]]), torch.ones(1, 1, dtype=torch.long))
    with torch.no_grad():
        features = adapted.embed(base.model.vision_encoder.backbone(pixels).last_hidden_state)
        expected = ask(plain, features, prompts)
        found = ask(adapted, run.runner.images.whole(pixels), prompts)
    assert expected.logits_NMmm.abs().max() > 0.1
    torch.testing.assert_close(found.logits_NMmm, expected.logits_NMmm, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.iou_NM, expected.iou_NM, rtol=1e-4, atol=1e-5)


def test_a_run_measures_what_validate_does(make):
    options = ("evaluation.best_metric=noc_85", "evaluation.num_samples=2", "training.num_epochs=1")
    config = make("model.name=tiny", *options)  # a trained head, whose objects take different numbers of clicks
    train(config)
    [line], [base_line] = logged(config, "epoch"), logged(config, "base")
    valid = Path(config.training.data_dir) / "valid"
    settings = ClickEvaluation(start_from=None, prompting=EvaluationSettings(num_samples=2))
    for logged_line, adapter in ((line, folder_of(config) / "best"), (base_line, None)):
        found = evaluate_clicks(valid, None, settings, click_adapter=adapter).alone
        measured = {name: value for name, value in logged_line.items() if name.startswith(("noc_", "mean_iou_"))}
        assert measured.keys() >= {"noc_80", "noc_85", "noc_90", "mean_iou_1", "mean_iou_20"}
        assert measured == pytest.approx({name: found[name].value for name in measured}, rel=1e-3)
        assert 1 < measured["noc_85"] < 20


def test_data_without_masks_and_bases_without_a_tracker_are_told(make, lively_base, scenes, tmp_path):
    with pytest.raises(UserError, match="has no tracker"):
        train(make(f"model.name={lively_base}"))
    boxes = shutil.copytree(scenes, tmp_path / "boxes")
    for file in boxes.glob("*/_annotations.coco.json"):
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            annotation["segmentation"] = []
        file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no object of a chosen category has a mask"):
        train(make(f"training.data_dir={boxes}"))
