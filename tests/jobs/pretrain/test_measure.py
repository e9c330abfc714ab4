"""The measures of a base model tell one that listens to the prompt from one that returns everything it sees."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.pretrain import measure as measuring
from jobs.pretrain.bank import build_bank
from jobs.pretrain.measure import MASK_SIZE, Answer, measure
from sam3lora.data.synth.scenes import ALL_CONCEPTS

CONCEPTS = {concept.prompt: concept for concept in ALL_CONCEPTS}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return build_bank(tmp_path_factory.mktemp("bank"), 12, seed=7, workers=1)


def _model(bank, *, listens: bool):
    """Stands in for ``answer``: a model that sees perfectly and, unless it listens, scores every object alike."""
    by_image = {np.asarray(bank.images[row]).tobytes(): bank.objects(row) for row in range(len(bank))}

    def answer(staged, tokenize, image, prompts):
        objects = by_image[image.tobytes()]
        masks = np.stack([thing.mask_HW[1::2, 1::2] for thing in objects])
        answers = []
        for prompt in prompts:
            concept = CONCEPTS.get(prompt)
            named = np.array([bool(concept and concept.matches(thing)) for thing in objects])
            scores = np.where(named, 0.9, 0.1) if listens else np.full(len(objects), 0.8)
            answers.append(Answer(scores, masks, 0.9 if named.any() or not listens else 0.1))
        return answers

    assert masks_fit(by_image)
    return answer


def masks_fit(by_image) -> bool:
    return all(thing.mask_HW.shape == (2 * MASK_SIZE,) * 2 for things in by_image.values() for thing in things)


def test_a_model_that_listens_scores_full_marks(bank, monkeypatch):
    monkeypatch.setattr(measuring, "answer", _model(bank, listens=True))
    report = measure(None, None, bank, num_images=12)
    assert report.map_50 == pytest.approx(1.0)
    assert report.presence_accuracy == 1.0
    assert report.unknown_absent == 1.0
    assert all(above == below == 1.0 for _, above, below in report.pairs.values())


def test_a_model_that_returns_everything_fails_the_pair_table(bank, monkeypatch):
    # Its mAP is far from zero, which is why mAP alone is not enough.
    monkeypatch.setattr(measuring, "answer", _model(bank, listens=False))
    report = measure(None, None, bank, num_images=12)
    assert report.map_50 > 0.1
    assert report.presence_accuracy < 0.7
    assert report.unknown_absent == 0.0
    assert all(above == below == 0.0 for _, above, below in report.pairs.values())
