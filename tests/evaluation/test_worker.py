"""A worker asks several models about the same images."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.coco import CocoIndex
from sam3lora.data.images import ImageError, read_annotated_image
from sam3lora.errors import UserError
from sam3lora.evaluation.ask.run import recorded_data
from sam3lora.evaluation.ask.worker import EvaluationWorker, Models
from sam3lora.evaluation.metrics.ground_truth import prompted_categories
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.model.staged.forward import StagedSam3

from .adapters import write_adapter
from .splits import HEIGHT, WIDTH, write_split

EVERY = EvaluationSettings({"threshold": 0.0, "nms": "none"})


@pytest.fixture(scope="module")
def adapters(small_base, tmp_path_factory):
    """Label -> folder; "eyes" changes the vision tower, the others leave it as it is."""
    root = tmp_path_factory.mktemp("adapters")
    changed = {"one": ("detr_decoder",), "two": ("detr_encoder",), "eyes": ("vision_encoder",)}
    return {
        label: str(write_adapter(root / label, small_base, seed=seed, components=components))
        for seed, (label, components) in enumerate(changed.items())
    }


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = write_split(tmp_path_factory.mktemp("split") / "valid", [(0, 1, 10), (1, 2, 40)], {1: "crack", 2: "hole"})
    return CocoIndex.from_folder(folder)


@pytest.fixture
def make_worker(index, small_base):
    def make(adapters, *, with_base=True, settings=EVERY) -> EvaluationWorker:
        models = Models(adapters, with_base=with_base, options={"model": str(small_base), "device": "cpu"})
        return EvaluationWorker(models, prompted_categories(index), settings)

    return make


@pytest.fixture
def records(index):
    return [index.record(row) for row in range(len(index))]


@pytest.fixture
def num_seen(monkeypatch):
    """Images that went through the vision tower, pass by pass."""
    seen = []
    encode = StagedSam3.encode_images

    def counted(self, pixel_values_ICHW):
        seen.append(len(pixel_values_ICHW))
        return encode(self, pixel_values_ICHW)

    monkeypatch.setattr(StagedSam3, "encode_images", counted)
    return seen


def scores(results) -> np.ndarray:
    return np.array([prediction["score"] for prediction in results.predictions])


def test_images_are_seen_once_by_all_models_that_share_a_vision_tower(make_worker, adapters, records, num_seen):
    both = {"two": adapters["two"], "one": adapters["one"]}
    assert list(make_worker(both).ask(records).answers) == ["base", "two", "one"]
    assert num_seen == [2]
    nothing = make_worker(both, with_base=False).ask([]).answers
    assert [(label, found.matches.num_predictions) for label, found in nothing.items()] == [("two", 0), ("one", 0)]
    # an adapter of the vision tower sees for itself, and only once
    num_seen.clear()
    make_worker(adapters).ask(records)
    assert sum(num_seen) == 4


def test_answers_together_are_those_of_each_model_alone(make_worker, adapters, records):
    images = [read_annotated_image(record) for record in records]
    together = make_worker(adapters).results(records, images)
    for label, of_label in together.items():
        alone = {} if label == "base" else {label: adapters[label]}
        expected = make_worker(alone, with_base=label == "base").results(records, images)[label]
        np.testing.assert_allclose(scores(of_label), scores(expected), atol=2e-6)
        assert of_label.presence == pytest.approx(expected.presence, abs=2e-6)
        assert [p["segmentation"]["counts"] for p in of_label.predictions] == [
            p["segmentation"]["counts"] for p in expected.predictions
        ]
    # which would prove nothing if the models agreed
    presence = [np.array(list(answers.presence.values())) for answers in together.values()]
    for number, of_one in enumerate(presence):
        assert all(np.abs(of_one - of_other).max() > 5e-5 for of_other in presence[:number])


def test_results_are_at_the_size_that_annotations_refer_to(tmp_path, make_worker):
    """A file of half the listed size is a smaller copy of the annotated image."""
    objects, names = [(0, 1, 10), (1, 2, 40)], {1: "crack", 2: "hole"}
    index = CocoIndex.from_folder(write_split(tmp_path / "valid", objects, names))
    cv2.imwrite(str(tmp_path / "valid" / "0.png"), np.full((HEIGHT // 2, WIDTH // 2, 3), 90, np.uint8))
    records = [index.record(row) for row in range(2)]
    worker = make_worker({})
    predictions = worker.results(records, list(map(read_annotated_image, records)))["base"].predictions
    assert {p["image_id"] for p in predictions} == {0, 1}
    assert {tuple(p["segmentation"]["size"]) for p in predictions} == {(HEIGHT, WIDTH)}
    assert worker.ask(records).answers["base"].matches.num_predictions == len(predictions)


def test_an_unreadable_image_is_named_with_what_to_do(tmp_path, make_worker):
    index = CocoIndex.from_folder(write_split(tmp_path / "valid", [(0, 1, 10)], {1: "crack"}, num_images=1))
    (tmp_path / "valid" / "0.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"0\.png.*Repair such images.*--on-bad-image skip"):
        make_worker({}).ask([index.record(0)])


def test_facts_are_those_of_the_model(make_worker, adapters, small_base):
    facts = make_worker({"one": adapters["one"]}).facts()
    assert (facts["base_model"], facts["resolution"], facts["num_queries"]) == (str(small_base), 112, 8)
    assert facts["geometry_cls"] == {"base": True, "one": True}


def test_paths_become_absolute_for_workers_in_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    models = Models({"a": "run/best"}, options={"model": "mine"}).with_absolute_paths()
    assert (models.adapters, models.options["model"]) == ({"a": f"{tmp_path}/run/best"}, f"{tmp_path}/mine")
    # a name is no path, even beside a folder of that name
    (tmp_path / "tiny").mkdir()
    for name in ("tiny", "facebook/sam3", None):
        assert Models(options={"model": name}).with_absolute_paths().options["model"] == name


def test_adapter_of_another_base_is_refused(make_worker, tmp_path, small_base):
    folder = write_adapter(tmp_path / "other", small_base)
    (folder / "sam3lora.json").write_text('{"base_fingerprint": "0123456789abcdef"}')
    with pytest.raises(UserError, match="was trained on the base"):
        make_worker({"other": str(folder)})


def test_each_adapter_is_measured_as_it_is_served(make_worker, small_base, tmp_path):
    def write(label, threshold, prompts):
        post = PostProcessing(threshold=threshold, nms_iou=0.6)
        data = {"prompt_of_category": prompts}
        return str(write_adapter(tmp_path / label, small_base, post_processing=post, data=data))

    a, b, c = (write(*of) for of in (("a", 0.3, {"D40": "pothole"}), ("b", 0.5, {"D40": "pothole"}), ("c", 0.3, {})))
    # post-processing is each model's own, except where it is given for all
    posts = make_worker({"a": a, "b": b}, settings=EvaluationSettings()).facts()["post"]
    own = {"base": PostProcessing(), "a": PostProcessing(threshold=0.3, nms_iou=0.6), "b": PostProcessing(nms_iou=0.6)}
    assert posts == own
    posts = make_worker({"a": a, "b": b}, settings=EvaluationSettings({"threshold": 0.4})).facts()["post"]
    assert posts == {label: post.changed(threshold=0.4) for label, post in own.items()}
    # prompts must be the same
    assert recorded_data({"a": a, "b": b}) == {"prompts": {"D40": "pothole"}, "exhaustive": True}
    with pytest.raises(UserError, match=r"a, c were trained with different data\.prompts"):
        recorded_data({"a": a, "c": c})


def test_complete_categories_are_those_that_the_adapter_records(small_base, tmp_path):
    def write(label, **data):
        return str(write_adapter(tmp_path / label, small_base, data=data))

    a, b, old = write("a", exhaustive=["crack"]), write("b", exhaustive=False), write("old")
    assert [recorded_data({"one": folder})["exhaustive"] for folder in (a, b, old)] == [("crack",), False, True]
    assert recorded_data({}) == {}
    with pytest.raises(UserError, match=r"data\.exhaustive"):
        recorded_data({"a": a, "old": old})
