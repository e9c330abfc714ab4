"""Keys of `training` that decide what goes into a step, and how it is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.bench.recorded_graphs import RecordingCapturer
from sam3lora.errors import UserError
from sam3lora.model.loading import load_base
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.training import datasets, fit_batch, setup
from sam3lora.training.graphs import gradient_graphs
from sam3lora.training.graphs.graphed_sam3 import GraphedSam3
from sam3lora.training.metrics_log import METRICS_FILE, read_metrics

from ...training.run_folder import lines_of
from .coco_folder import write_data, write_split
from .conftest import acts, batches_of_an_epoch, first_batch, loss_terms, take_step


@acts("training.data_dir")
def test_data_dir_is_where_images_come_from(shared, tmp_path):
    other = write_data(tmp_path / "other")
    write_split(other / "train", [("hole",)] * 3)
    assert len(shared().data.train) == 4
    worker = shared(f"training.data_dir={other}")
    assert {Path(path).parent for path in first_batch(worker).paths} == {other / "train"}


@acts("training.batch_size")
def test_batch_size_counts_images(shared):
    for size in (1, 2):
        assert {batch.num_images for batch in batches_of_an_epoch(shared(f"training.batch_size={size}"))} == {size}


def test_batch_size_is_chosen_where_it_is_auto(build, monkeypatch):
    # Whatever fits, a step has the same images; the number is in the log.
    fits = {}
    monkeypatch.setattr(fit_batch, "_fitting_on_cpu", lambda backward, sizes, share: fits["sizes"])
    for fits["sizes"] in (1, 2):
        worker = build("training.batch_size=auto", "training.images_per_step=2")
        assert {batch.num_images for batch in batches_of_an_epoch(worker)} == {fits["sizes"]}
        assert worker.total_steps == 2
        [start] = [line for line in read_metrics(worker.output_dir / METRICS_FILE) if line["kind"] == "start"]
        assert (start["batch_size"], start["images_per_step"]) == (fits["sizes"], 2)


@acts("training.images_per_step")
def test_images_per_step_is_the_step_of_any_batch_size(build, settings):
    for batch_size in ("auto", 1, 2, 3):
        for images in (4, 3, 1):
            worker = build(f"training.batch_size={batch_size}", f"training.images_per_step={images}")
            assert worker.total_steps == -(-4 // images)
            sizes = [batch.num_images for batch in batches_of_an_epoch(worker)]
            assert sum(sizes) == worker.total_steps * images
            assert max(sizes) <= worker.config.training.batch_size
    with pytest.raises(UserError, match="gradient_accumulation_steps 2 has no effect beside images_per_step 4"):
        settings("training.images_per_step=4", "training.gradient_accumulation_steps=2")
    with pytest.raises(UserError, match="some workers would have no image: use at most 4 workers"):
        settings("training.images_per_step=4", "scaling.num_workers=[1, 5]")
    assert settings("training.images_per_step=4", "scaling.num_workers=[1, 4]").scaling.most_workers == 4


def test_without_images_per_step_it_is_what_a_batch_takes(build):
    assert build("training.batch_size=auto").total_steps == 2
    assert build("training.batch_size=auto", "training.gradient_accumulation_steps=2").total_steps == 1


@acts("training.gradient_accumulation_steps")
def test_accumulated_batches_make_one_step(build):
    # Two batches of 1 give the step of one batch of 2: as many steps, and the same loss.
    whole = build("training.batch_size=2")
    parts = build("training.batch_size=1", "training.gradient_accumulation_steps=2")
    assert build("training.batch_size=1").total_steps == 4
    assert whole.total_steps == parts.total_steps == 2
    assert take_step(parts)[0] == pytest.approx(take_step(whole)[0], rel=1e-4)


@acts("training.num_negatives")
def test_num_negatives_are_asked_of_each_image(shared):
    def negatives(count):
        batch = first_batch(shared(f"training.num_negatives={count}", "training.batch_size=4"))
        ids = batch.image_ids[batch.query_image_B][batch.num_B == 0].tolist()
        return [ids.count(image_id) for image_id in range(4)]

    # Image 0 shows two of the three categories, the others one each.
    assert negatives(0) == [0, 0, 0, 0]
    assert negatives(1) == [1, 1, 1, 1]
    assert negatives("null") == [1, 2, 2, 2]


@acts("training.seed")
def test_seed_decides_the_order_and_the_new_weights(build):
    def start(seed):
        worker = build(f"training.seed={seed}")
        order = [batch.image_ids.tolist() for batch in batches_of_an_epoch(worker)]
        weights = next(p for name, p in worker.model.named_parameters() if ".lora_A." in name)
        return order, weights.detach()

    (order, weights), (same_order, same_weights), (other_order, other_weights) = start(1), start(1), start(2)
    assert order == same_order
    assert torch.equal(weights, same_weights)
    assert order != other_order
    assert not torch.equal(weights, other_weights)


@acts("training.num_workers")
def test_num_workers_are_the_decoding_tasks(build, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "stream_batches", lambda *args, num_cpus, **options: asked.append(num_cpus) or [])
    for count in (1, 3):
        worker = build(f"training.num_workers={count}")
        source = datasets.BatchSource(worker.data, worker.config, images_per_step=2, use_ray=True)
        list(source.training_batches(0, 0))
    assert asked == [1, 3]


@acts("training.max_prompts_per_forward")
def test_max_prompts_per_forward_bounds_the_queries_at_a_time(build, monkeypatch):
    def sizes(*overrides):
        worker, seen = build(*overrides), []
        detect = worker.runner.staged.detect
        monkeypatch.setattr(
            worker.runner.staged, "detect", lambda *args, **kw: seen.append(len(args[2])) or detect(*args, **kw)
        )
        take_step(worker)
        return seen

    [everything] = sizes()  # auto
    assert everything > 2
    parts = sizes("training.max_prompts_per_forward=2")
    assert max(parts) == 2
    assert sum(parts) == everything


@acts("training.gradient_checkpointing")
@pytest.mark.parametrize(("value", "calls"), [("false", 1), ("true", 2), ("[detr_encoder]", 2), ("[mask_decoder]", 1)])
def test_checkpointed_layers_run_again_in_the_backward_pass(value, calls, build):
    worker = build(f"training.gradient_checkpointing={value}", "lora.apply_to_detr_encoder=true")
    seen = []
    worker.model.get_base_model().detr_encoder.layers[0].mlp.register_forward_pre_hook(lambda *args: seen.append(1))
    take_step(worker)
    assert len(seen) == calls


@acts("training.compile")
def test_compiled_layers_are_those_that_run_in_every_epoch(build, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *args, **options: compiled.append(module))
    adapted = "lora.apply_to_vision_encoder=true"
    build(adapted)
    assert not compiled
    layers = list(build(adapted, "training.compile=true").model.get_base_model().vision_encoder.backbone.layers)
    assert compiled == layers
    with pytest.raises(UserError, match="each image passes it once"):
        build("training.compile=true")


@acts("training.mixed_precision")
@pytest.mark.parametrize(("value", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_mixed_precision_is_the_type_of_the_arithmetic(value, dtype, build):
    worker = build(f"training.mixed_precision={value}")
    seen = set()
    layer = worker.model.get_base_model().detr_encoder.layers[0].mlp.fc1
    layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    take_step(worker)
    assert seen == {dtype}


@acts("training.model_dropout")
def test_model_dropout_is_off_unless_asked_for(build, shared):
    def first_terms(*overrides):
        worker = build(*overrides)
        for name, module in worker.model.named_modules():
            if isinstance(module, torch.nn.Dropout) and ".lora_dropout." not in name:
                module.p = 0.5
        return take_step(worker)[0]

    expected = loss_terms(shared())
    assert first_terms() == pytest.approx(expected, rel=1e-4)
    assert first_terms("training.model_dropout=true") != pytest.approx(expected, rel=1e-4)


@acts("training.one_to_many")
def test_one_to_many_trains_the_second_branch(shared):
    branch = {f"loss_{name}_o2m" for name in ("bbox", "giou", "ce", "mask", "dice")}
    with_branch, without = loss_terms(shared()), loss_terms(shared("training.one_to_many=false"))
    assert set(with_branch) - set(without) == branch
    # The first branch does not see the second one.
    assert without == pytest.approx({name: with_branch[name] for name in without}, rel=1e-4)


@acts("training.on_bad_image")
def test_on_bad_image_stops_or_names_it_in_the_log(run, tmp_path):
    folder = write_data(tmp_path / "broken")
    (folder / "train" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2\.png"):
        run(f"training.data_dir={folder}")
    result = run(f"training.data_dir={folder}", "training.on_bad_image=skip")
    assert result.steps == 2
    assert [line["image_id"] for line in lines_of(result, "skipped_image")] == [2]


@acts("training.cuda_graphs")
def test_stages_are_graphs_on_a_gpu_unless_told_otherwise(settings, monkeypatch):
    base, gpu = load_base("tiny").model, torch.device("cuda")
    monkeypatch.setattr(gradient_graphs, "CudaCapturer", lambda device: RecordingCapturer())

    def kind(device, *overrides):
        return type(setup.make_stages(base, (), settings(*overrides), device)[0])

    assert kind(gpu) is GraphedSam3
    assert kind(gpu, "training.cuda_graphs=false") is kind(torch.device("cpu")) is StagedSam3
    for off in ("false", "0"):
        monkeypatch.setenv("SAM3LORA_CUDA_GRAPHS", off)
        assert kind(gpu) is StagedSam3
    assert kind(gpu, "training.cuda_graphs=true") is GraphedSam3
