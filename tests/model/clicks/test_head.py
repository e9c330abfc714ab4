"""The click head gives what the stock tracker gives on a first frame, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import Sam3TrackerModel
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import Sam3TrackerVideoInferenceSession

from sam3lora.model.clicks import MASK_LIMIT

POINTS = torch.tensor([[[60.0, 80.0]], [[150.0, 90.0]], [[33.0, 200.0]]])
BOXES = torch.tensor([[20.0, 30, 90, 120], [100, 100, 180, 150], [0, 0, 224, 224]])
IN = torch.ones(3, 1, dtype=torch.int)


@pytest.fixture(scope="module")
def first_frame(stock_tracker, pixels):
    """What the stock video tracker gives its mask decoder on a first frame, and what that answers."""
    seen = {}

    def note(module, args, kwargs, output):
        seen.update(kwargs, output=output)

    handle = stock_tracker.mask_decoder.register_forward_hook(note, with_kwargs=True)
    try:
        session = Sam3TrackerVideoInferenceSession(pixels[:1], 224, 224, dtype=torch.float32)
        session.obj_id_to_idx(1)
        session.add_point_inputs(0, 0, {"point_coords": POINTS[None, :1], "point_labels": IN[None, :1]})
        session.obj_with_new_inputs = [1]
        with torch.no_grad():
            stock_tracker(session, frame_idx=0)
    finally:
        handle.remove()
    return seen


def test_features_are_those_of_the_video_trackers_first_frame(features, first_frame):
    torch.testing.assert_close(features.coarse[:1], first_frame["image_embeddings"], atol=1e-5, rtol=0)
    for ours, theirs in zip(features.tensors()[:2], first_frame["high_resolution_features"], strict=True):
        torch.testing.assert_close(ours[:1], theirs, atol=1e-5, rtol=0)


def test_masks_are_those_of_the_video_trackers_first_frame(head, features, first_frame):
    with torch.no_grad():
        found = head.decode(
            features.of_objects(torch.tensor([0])), points_NK2=POINTS[:1], labels_NK=IN[:1], multimask=True
        )
    logits, iou, _, objects = first_frame["output"]
    torch.testing.assert_close(found.logits_NMmm, logits[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.iou_NM, iou[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.object_N, objects[:, 0, 0], atol=1e-5, rtol=0)


def test_stock_image_tracker_lacks_exactly_the_embedding_for_no_memory(base, head, features, stock_tracker, pixels):
    stock = Sam3TrackerModel(base_config(stock_tracker)).eval()
    weights = {name: one for name, one in stock_tracker.state_dict().items() if name in stock.state_dict()}
    stock.load_state_dict(weights)
    with torch.no_grad():
        coarse = stock.get_image_features(pixels).fpn_hidden_states[2].permute(1, 2, 0).unflatten(2, (16, 16))
        difference = features.coarse - coarse
    torch.testing.assert_close(
        difference, head.no_memory_embedding.view(1, -1, 1, 1).expand_as(difference), atol=1e-5, rtol=0
    )


def base_config(stock_tracker):
    from transformers import Sam3TrackerConfig

    config = stock_tracker.config
    plain = {
        name: {key: value for key, value in getattr(config, name).to_dict().items() if key != "model_type"}
        for name in ("prompt_encoder_config", "mask_decoder_config")
    }
    return Sam3TrackerConfig(vision_config=config.vision_config, **plain)


PROMPTS = {
    "a click": {"points_NK2": POINTS, "labels_NK": IN, "multimask": True},
    "clicks": {
        "points_NK2": torch.cat([POINTS, POINTS.flip(0)], 1),
        "labels_NK": torch.tensor([[1, 0], [0, 1], [1, 1]]),
        "multimask": False,
    },
    "a box": {"boxes_N4": BOXES, "multimask": False},
    "a box and a click": {"boxes_N4": BOXES, "points_NK2": POINTS, "labels_NK": IN, "multimask": False},
    "a mask": {"masks_Nmm": torch.linspace(-40, 40, 3 * 64 * 64).view(3, 64, 64), "multimask": False},
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_objects_of_several_images_at_once_are_as_one_by_one(head, features, prompt):
    image_N = torch.tensor([1, 0, 1])
    with torch.no_grad():
        together = head.decode(features.of_objects(image_N), **PROMPTS[prompt])
        for number in range(3):
            of_one = {
                name: value[number : number + 1] if isinstance(value, torch.Tensor) else value
                for name, value in PROMPTS[prompt].items()
            }
            alone = head.decode(features.of_objects(image_N[number : number + 1]), **of_one)
            torch.testing.assert_close(together.logits_NMmm[number], alone.logits_NMmm[0], atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(together.iou_NM[number], alone.iou_NM[0], atol=1e-6, rtol=0)
            torch.testing.assert_close(together.object_N[number], alone.object_N[0], atol=1e-5, rtol=0)


def test_objects_of_one_image_share_its_features(features):
    (one, _) = features.split()
    rows = one.of_objects(torch.zeros(5, dtype=torch.long))
    assert len(rows.coarse) == 5
    assert rows.fine.untyped_storage().data_ptr() == features.fine.untyped_storage().data_ptr()


def test_masks_as_prompts_are_cut_at_the_limit(head, features):
    mask = torch.linspace(-100, 100, 64 * 64).view(1, 64, 64)
    one = features.of_objects(torch.tensor([0]))
    with torch.no_grad():
        far, cut = (
            head.decode(one, masks_Nmm=m, multimask=False).logits_NMmm
            for m in (mask, mask.clamp(-MASK_LIMIT, MASK_LIMIT))
        )
    assert torch.equal(far, cut)


def test_order_of_clicks_does_not_matter(head, features):
    points, labels = torch.cat([POINTS, POINTS.flip(0)], 1), torch.tensor([[1, 0], [0, 1], [1, 1]])
    rows = features.of_objects(torch.tensor([0, 0, 1]))
    with torch.no_grad():
        one, other = (
            head.decode(rows, points_NK2=p, labels_NK=n, multimask=False).logits_NMmm
            for p, n in ((points, labels), (points.flip(1), labels.flip(1)))
        )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_nothing_that_says_where_is_an_error(head, features):
    with pytest.raises(ValueError, match="points, boxes or masks"):
        head.decode(features, multimask=True)
