"""Clicks on a real Ray with two replicas: kept masks stay where their image is, and a lost replica costs no click."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from sam3lora.client import ClickSession, Client, NotFound
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.inference.predictor import Predictor

from .ray_service import RayService, start_service
from .test_on_ray import metric

pytestmark = pytest.mark.slow
PORT = 18830
CLICKS = [(48, 48, 1), (20, 70, 0), (60, 40, 1)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, num_train=1, num_valid=8, size=96, domain="base", seed=5, progress=False)
    return [path.read_bytes() for path in sorted((folder / "valid").glob("*.jpg"))]


@pytest.fixture(scope="module")
def expected(images: list[bytes]) -> list[list[np.ndarray]]:
    """The mask after each click, of each image."""
    predictor = Predictor("tiny", device="cpu")
    masks = []
    for data in images:
        session = predictor.interact(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        clicked = session.click(CLICKS[:1])
        masks.append([clicked.mask, *(clicked.add(*click).mask for click in CLICKS[1:])])
    assert sum(of_image[0].any() for of_image in masks) > 4  # the others are background
    return masks


@pytest.fixture
def service() -> Iterator[RayService]:
    with start_service(PORT) as service:
        service.deploy({"model": "tiny", "replicas": 2, "num_cpus": 0.5, "num_gpus": 0, "torch_threads": 1})
        service.wait_running(Segmenter=2, Ingress=1)
        yield service


def is_same(first: np.ndarray, second: np.ndarray) -> bool:
    return bool((first != second).mean() < 0.002)


def test_clicks_outlive_their_replica(
    service: RayService, images: list[bytes], expected: list[list[np.ndarray]]
) -> None:
    with Client(service.url) as client:
        sessions = [client.interact(data) for data in images]
        assert all(is_same(one.click(*CLICKS[0]).mask, masks[0]) for one, masks in zip(sessions, expected, strict=True))
        assert metric(service, "sam3lora_images_encoded_total") == len(images)

        # Each starts from the logits of its first mask: no other replica was asked, and no image was sent again.
        for one, masks in zip(sessions, expected, strict=True):
            assert is_same(one.click(*CLICKS[1]).mask, masks[1])
        assert metric(service, "sam3lora_images_encoded_total") == len(images)

        os.kill(service.pids()[0], signal.SIGKILL)
        lost = [third_click(client, one, masks[2]) for one, masks in zip(sessions, expected, strict=True)]
        assert 0 < sum(lost) < len(images)
        service.wait_running(Segmenter=2, Ingress=1)
        # Some images belong to the new replica now. The way back needs no service; then the click is asked again.
        for one, masks in zip(sessions, expected, strict=True):
            one.undo()
            third_click(client, one, masks[2])


def third_click(client: Client, session: ClickSession, expected: np.ndarray) -> bool:
    """Click where the replica may be lost; returns whether the kept mask was."""
    before = session.answer
    assert before is not None
    shown = {"clicks": CLICKS, "mask": before.mask_id}
    try:
        client.refine(session.image, shown)
        is_lost = False
    except NotFound as error:  # the client has sent the image again
        is_lost = error.type == "mask_not_found"
        if not is_lost:
            raise
    found = session.click(*CLICKS[2])
    if is_lost:  # from the outline, which says less
        (from_outline,) = client.refine(session.image, {"clicks": CLICKS, "mask": before.rle})
        assert is_same(found.mask, from_outline.mask)
    else:
        assert is_same(found.mask, expected)
    return is_lost
