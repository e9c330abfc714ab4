"""Metrics while training are those of `validate`; the features of prompts that both kinds of forward share."""

from __future__ import annotations

import pytest
import torch

from sam3lora.data.prompts import prompt_key
from sam3lora.evaluation.ask.run import evaluate
from sam3lora.training import validator as module
from sam3lora.training.features.encoder import ImageEncoder
from sam3lora.training.validator import LOGGED, evaluation_settings

from .changed_scenes import rewritten, without_objects
from .two_workers import make_trainer

BF16 = "training.mixed_precision=bf16"


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, list[str]]]:
    """Number of images and the prompts of each `ask_split` while training."""
    calls = []
    ask_split = module.ask_split

    def spy(engine, index, matcher, **options):
        calls.append((len(index), [category.prompt for category in matcher.categories]))
        return ask_split(engine, index, matcher, **options)

    monkeypatch.setattr(module, "ask_split", spy)
    return calls


def only_crowds_in_the_first_image(content: dict) -> None:
    first = content["images"][0]["id"]
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == first)


def test_numbers_are_those_of_validate(make_config, scenes, tmp_path):
    # The adapter in memory and the one on disk. The base has its own pixel mean, an image has no loss, one prompt is
    # negative, and another is for a name in another case.
    data_dir = rewritten(scenes, tmp_path / "data", only_crowds_in_the_first_image)
    words = ("data.prompts={GEAR: cog wheel}", "data.negative_prompts=[zebra]")
    config = make_config(*words, data_dir=str(data_dir), num_negatives=0)
    trainer = make_trainer(config)
    ours = trainer.validator.metrics()
    trainer.save()
    theirs = evaluate(data_dir, adapter=trainer.output_dir / "last", settings=evaluation_settings(config), device="cpu")
    assert ours == pytest.approx({name: getattr(theirs, name) for name in LOGGED}, rel=1e-6)
    assert 0 < ours["presence_accuracy"] < 1


def test_images_without_a_loss_are_measured(make_config, scenes, tmp_path, asked):
    # Absence is not known and nothing is listed as absent: an image without objects has no loss, but can be wrong.
    data_dir = rewritten(scenes, tmp_path / "data", without_objects(1))
    trainer = make_trainer(make_config("data.exhaustive=false", data_dir=str(data_dir), num_negatives=0))
    assert len(trainer.data.valid) == 2
    trainer.validator.metrics()
    assert [num_images for num_images, _ in asked] == [3]


def test_negative_prompts_are_measured(make_config, asked):
    # What must not be found is asked after the split's categories; a category's name in another case is no new prompt.
    make_trainer(make_config("data.negative_prompts=[zebra, Gear]")).validator.metrics()
    assert asked == [(3, ["gear", "arrow", "capsule", "zebra"])]


def test_split_without_objects_is_asked_what_training_asks(make_config, scenes, tmp_path, asked):
    # There are no names in it to ask for, but there are false alarms to count.
    data_dir = rewritten(scenes, tmp_path / "data", lambda content: content.update(annotations=[]))
    found = make_trainer(make_config(data_dir=str(data_dir))).validator.metrics()
    assert asked == [(3, ["gear", "arrow", "bolt", "capsule"])]
    assert found["map"] is None
    assert found["presence_accuracy"] is not None


@pytest.mark.parametrize("bf16", [False, True])
def test_precision_is_that_of_the_run(make_config, monkeypatch, bf16):
    # Images are encoded as in the run's forward; kept text features have the precision of the weights.
    trainer = make_trainer(make_config(*[BF16] * bf16))
    seen = set()
    of_records = ImageEncoder.of_records

    def spy(encoder, records):
        vision = of_records(encoder, records)
        seen.add(vision.maps_ICHW[0].dtype)
        return vision

    monkeypatch.setattr(ImageEncoder, "of_records", spy)
    trainer.validator.metrics()
    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert {text.embeds_PTC.dtype for text in trainer.runner.text.kept().values()} == {torch.float32}


def test_prompts_of_another_case_are_encoded_before_the_first_batch(make_config, monkeypatch):
    # The words for a category are found by whatever case its name is written in, so no batch waits for the text tower.
    trainer = make_trainer(make_config("data.prompts={GEAR: cog wheel}", num_negatives=-1))
    assert "cog wheel" in trainer.data.prompts
    assert "gear" not in map(prompt_key, trainer.data.prompts)
    assert trainer.metadata.prompts == list(trainer.data.prompts)
    batch = next(trainer.batches.training_batches(0, 0))
    assert {*batch.prompts_B} == {*trainer.runner.text.kept()}


def test_features_kept_under_autocast_have_the_precision_of_the_weights(make_config):
    # A prompt that is first seen in a bfloat16 forward is kept as one that was encoded before it.
    bank = make_trainer(make_config(BF16)).runner.text
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, _ = bank.features(["zebra"])
    assert features.embeds_PTC.dtype == torch.float32
    assert bank.kept()["zebra"].embeds_PTC.dtype == torch.float32


def test_metrics_take_the_complete_categories_of_training(make_config):
    settings = evaluation_settings(make_config("data.exhaustive=[gear]"))
    assert settings.exhaustive == ("gear",)
    metrics = make_trainer(make_config("data.exhaustive=false", "training.num_negatives=0")).validator.metrics()
    assert metrics["off_prompt_fpr"] is None
    assert metrics["map"] is not None
