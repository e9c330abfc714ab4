"""A session on one image: found objects corrected by clicks, new ones shown, steps taken back, labels exported."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sam3lora import Predictor
from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.masks import decode_mask
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.decoder import ClickedObject
from sam3lora.engine.clicks.interaction import Interaction
from sam3lora.engine.clicks.mask_cleaning import MaskCleaning
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.engine.mask_codes import encode_logits, rle_area_px
from sam3lora.errors import UserError
from sam3lora.inference.clicks.result import ClickResult
from sam3lora.inference.clicks.session import ClickSession

from ...engine.engine_cases import make_images, write_adapter_of
from ...model.dense.dense_cases import write_dense

IMAGE = make_images(1)[0]
HEIGHT, WIDTH = IMAGE.shape[:2]
FIRST, SECOND = (20, 30, 1), (WIDTH - 5, HEIGHT - 4, 0)


@pytest.fixture(scope="module")
def predictor(clickable_base: Path) -> Predictor:
    return Predictor(str(clickable_base), device="cpu", threshold=0.0, nms="none", max_detections=3)


@pytest.fixture
def session(predictor: Predictor) -> ClickSession:
    return predictor.interact(IMAGE)


def encoded(predictor: Predictor) -> int:
    return predictor._pool.engine.counters["images_encoded"]


def answer_of(predictor: Predictor, clicks, box=None, mask=None) -> ClickAnswer:
    """What the click head says of a prompt put together by hand."""
    engine = predictor._pool.engine
    image = engine.prepare_image(IMAGE, "by hand")
    prompt = ClickPrompt.of([Click(*one) for one in clicks], box, mask, size_hw=(HEIGHT, WIDTH), side=engine.resolution)
    (answer,) = engine.click([ClickedObject(image, prompt)])
    assert isinstance(answer, ClickAnswer)
    return answer


def shown(result: ClickResult) -> tuple:
    return result.rle, result.score, result.box_xyxy, result.clicks, result.object_score


def test_a_session_takes_one_vision_pass(predictor: Predictor):
    before = encoded(predictor)
    session = predictor.interact(IMAGE)
    session.detect("crack")
    found = session.detect("hole")
    session.refine(found[0], [FIRST, SECOND])
    session.click([FIRST]).add(*SECOND)
    assert encoded(predictor) == before + 1


def test_detect_finds_what_predict_finds(predictor: Predictor, session: ClickSession):
    (expected,) = predictor.predict(IMAGE, "crack")
    found = session.detect("crack")
    assert 0 < len(found) == len(expected)
    assert [one.rle for one in found] == expected.rles
    np.testing.assert_allclose([one.score for one in found], expected.scores, atol=1e-6)
    np.testing.assert_allclose([one.box_xyxy for one in found], expected.boxes_xyxy, atol=1e-3)
    assert {one.label for one in found} == {"crack"}
    assert all(one.object_score is None and not one.alternatives for one in found)
    # asked again it takes the place of what nobody corrected
    session.refine(found[1], [FIRST])
    (again,) = session.detect("crack", max_detections=1)
    assert session.objects == [found[1], again]
    session.detect("hole")
    assert session.objects[:2] == [found[1], again]


@pytest.mark.parametrize("start_from", ["mask", "box", "both"])
def test_the_first_click_starts_from_what_was_found_and_the_second_from_the_answer(
    predictor: Predictor, start_from: str
):
    session = predictor.interact(IMAGE, start_from=start_from)
    found = session.detect("crack")[0]
    logits, box = found._state.seed.mask_mm, found.box_xyxy
    first = answer_of(
        predictor, [FIRST], None if start_from == "mask" else box, None if start_from == "box" else logits
    )
    assert session.refine(found, [FIRST]) is found
    assert found.is_corrected
    assert found.score == pytest.approx(first.score, abs=1e-5)
    second = answer_of(predictor, [FIRST, SECOND], None if start_from == "mask" else box, first.mask_mm)
    found.add(*SECOND)
    assert found.score == pytest.approx(second.score, abs=1e-5)
    assert found.object_score == pytest.approx(second.object_score, abs=1e-5)
    torch.testing.assert_close(found._state.mask_mm, second.mask_mm, atol=1e-5, rtol=0)


def test_undo_goes_back_step_by_step(session: ClickSession):
    found = session.detect("crack")[0]
    states = [shown(found)]
    session.refine(found, [FIRST, SECOND])  # one step
    states.append(shown(found))
    found.add(5, 5, 0)
    states.append(shown(found))
    found.prompt(box_xyxy=(2, 3, 30, 33))
    assert len({str(state) for state in [*states, shown(found)]}) == 4
    for state in reversed(states):
        found.undo()
        assert shown(found) == state
    assert not found.is_corrected
    with pytest.raises(UserError, match="nothing to undo"):
        found.undo()


def test_a_new_object_has_three_masks_of_which_the_best_is_taken(predictor: Predictor, session: ClickSession):
    new = session.click([FIRST[:2]])  # without a label it belongs to the object
    expected = answer_of(predictor, [FIRST])
    assert [one.score for one in new.alternatives] == pytest.approx(expected.scores, abs=1e-5)
    assert new.score == max(one.score for one in new.alternatives)
    other = int(np.argmin(expected.scores))
    assert new.choose(other) is new
    assert new.rle == new.alternatives[other].rle
    # the next click starts from the chosen one
    then = answer_of(predictor, [FIRST, SECOND], None, expected.logits_Mmm[other])
    assert new.add(*SECOND).score == pytest.approx(then.score, abs=1e-5)
    assert len(new.alternatives) == 1
    new.undo().undo()
    assert (new.area_px, new.score, new.box_xyxy) == (0, 0.0, (0, 0, 0, 0))
    assert new.add(*FIRST).area_px > 0


def test_masks_have_the_size_of_the_image(session: ClickSession):
    new = session.box((5, 6, 40, 50))
    mask = new.mask
    assert (mask.shape, mask.dtype) == ((HEIGHT, WIDTH), bool)
    assert mask.sum() == new.area_px > 0
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert new.box_xyxy == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    large = cv2.resize(new._state.mask_mm.numpy(), (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
    assert (mask != (large > 0)).mean() < 0.01


def test_objects_are_exported(session: ClickSession, tmp_path: Path):
    found = session.detect("crack")
    session.remove(found[2])
    session.refine(found[0], [FIRST])
    new = session.click([SECOND[:2]])
    with pytest.raises(UserError, match="object 3 has no label"):
        session.to_coco()
    session.label(new, "patch")
    coco = json.loads(json.dumps(session.to_coco("photo.jpg")))
    assert coco["images"] == [{"id": 1, "file_name": "photo.jpg", "width": WIDTH, "height": HEIGHT}]
    assert [category["name"] for category in coco["categories"]] == ["crack", "patch"]
    assert [annotation["category_id"] for annotation in coco["annotations"]] == [1, 1, 2]
    assert [annotation.get("corrected") for annotation in coco["annotations"]] == [True, None, True]
    for annotation, one in zip(coco["annotations"], [found[0], found[1], new], strict=True):
        assert np.array_equal(decode_mask(annotation["segmentation"], (HEIGHT, WIDTH)), one.mask)
        assert annotation["area"] == one.mask.sum()
    # training reads it
    cv2.imwrite(str(tmp_path / "photo.jpg"), IMAGE)
    (tmp_path / ANNOTATION_FILE).write_text(json.dumps(coco))
    index = CocoIndex.from_folder(tmp_path)
    assert list(index.faults) == []
    assert index.names == ("crack", "patch")
    new.undo()
    with pytest.raises(UserError, match="empty mask"):
        session.to_coco()
    assert [(result.prompt, len(result)) for result in session.results()] == [("crack", 2), ("patch", 0)]
    picture = session.draw(tmp_path / "picture.png")
    assert cv2.imread(str(tmp_path / "picture.png")).shape == picture.shape


def test_what_has_no_mask_is_not_drawn(session: ClickSession):
    with pytest.raises(UserError, match="nothing to draw"):
        session.draw()
    session.click([FIRST], label="patch").undo()
    nothing = session.draw()
    session.click([FIRST])
    assert (session.draw() != nothing).any()


def test_a_file_gives_its_name(predictor: Predictor, tmp_path: Path):
    cv2.imwrite(str(tmp_path / "photo.png"), IMAGE)
    assert predictor.interact(tmp_path / "photo.png").to_coco()["images"][0]["file_name"] == "photo.png"


def test_clicks_see_the_trunk_of_the_adapter_or_of_the_base(predictor: Predictor, clickable_base: Path, tmp_path: Path):
    folder = write_adapter_of(tmp_path / "trunk", clickable_base, r"vision_encoder\.backbone.*(o_proj|fc2)")
    adapted = Predictor(str(clickable_base), adapter=folder, device="cpu")
    expected = shown(predictor.interact(IMAGE).click([FIRST]))
    assert shown(adapted.interact(IMAGE).click([FIRST])) != expected
    assert encoded(adapted) == 1
    over_base = adapted.interact(IMAGE, clicks_vision="base").click([FIRST])
    assert over_base.score == pytest.approx(expected[1], abs=1e-6)
    assert encoded(adapted) == 3


def test_a_click_adapter_answers_clicks(predictor: Predictor, clickable_base: Path, clickable_root: Path):
    """Over the base of its folder, where none is named, and beside an adapter of the trunk."""
    own = clickable_root / "edges"
    clicked = Predictor(click_adapter=own, device="cpu", threshold=0.0, nms="none", max_detections=3)
    assert clicked.settings["model"] == str(clickable_base)
    assert clicked.settings["click_adapter"] == str(own)
    found = clicked.interact(IMAGE).click([FIRST])
    assert shown(found) != shown(predictor.interact(IMAGE).click([FIRST]))
    (ours,), (theirs,) = (one.predict(IMAGE, "crack") for one in (clicked, predictor))
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
    wrong = Predictor(adapter=clickable_root / "towers", click_adapter=own, device="cpu")
    with pytest.raises(UserError, match="trained on the vision trunk of the base"):
        wrong.interact(IMAGE)
    assert wrong.interact(IMAGE, clicks_vision="base").click([FIRST]).score == pytest.approx(found.score, abs=1e-5)


def test_folders_of_other_tasks_are_told_before_the_base_is_loaded(
    clickable_base: Path, clickable_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dense, own = write_dense(clickable_base, tmp_path / "dense"), clickable_root / "edges"
    monkeypatch.setattr("sam3lora.engine.engine.load_base", lambda *args, **options: pytest.fail("loads"))
    for options, words in (
        ({"adapter": own}, "of task clicks.*click_adapter"),
        (
            {"click_adapter": clickable_root / "heads"},
            "no click adapter: expected one of task clicks, got task detection",
        ),
        ({"click_adapter": dense}, "got task dense"),
        ({"click_adapter": tmp_path / "none"}, "does not exist"),
        ({"adapter": dense, "click_adapter": own}, "click_adapter has no effect with"),
    ):
        with pytest.raises(UserError, match=words):
            Predictor(**options)


def test_mistakes_are_told_and_change_nothing(session: ClickSession, predictor: Predictor):
    found = session.detect("crack")[0]
    new = session.click([FIRST])
    before = [shown(one) for one in session.objects]
    stranger = predictor.interact(IMAGE).detect("crack")[0]
    mistakes = [
        ("x=999", lambda: new.add(999, 5)),
        ("label=2", lambda: new.add(5, 5, 2)),
        ("x=-1", lambda: session.click([(-1, 5, 1)])),
        ("expected \\(x, y\\)", lambda: session.click([(1,)])),
        ("expected \\(x, y\\)", lambda: session.click((30, 20))),
        ("list of clicks", lambda: session.click(5)),
        ("x='30'", lambda: new.add("30", 20)),
        ("label=None", lambda: new.add(30, 20, None)),
        ("nothing to add", lambda: session.click([])),
        ("expected x0 y0 x1 y1", lambda: session.box((30, 5, 10, 40))),
        ("nothing to undo", found.undo),
        ("there is no alternative 3: this object has 3", lambda: new.choose(3)),
        ("there is no alternative 0", lambda: found.choose(0)),
        ("there is no alternative 0.5", lambda: new.choose(0.5)),
        ("refine takes", lambda: session.refine(new, [FIRST])),
        ("refine takes", lambda: session.refine(stranger, [FIRST])),
        ("refine takes", lambda: session.refine(0, [FIRST])),
        ("no such object", lambda: session.remove(stranger)),
        ("got ' '", lambda: session.label(new, " ")),
        ("got None", lambda: session.label(new, None)),
        ("got ''", lambda: session.click([FIRST], label="")),
        ("prompt", lambda: session.detect("")),
        ("start_from", lambda: predictor.interact(IMAGE, start_from="text")),
        ("clicks_vision", lambda: predictor.interact(IMAGE, clicks_vision="both")),
        ("max_hole_area must be", lambda: predictor.interact(IMAGE, max_hole_area=-1)),
        ("max_sprinkle_area must be", lambda: predictor.interact(IMAGE, max_sprinkle_area="8")),
    ]
    for said, mistake in mistakes:
        with pytest.raises(UserError, match=said):
            mistake()
    assert [shown(one) for one in session.objects] == before


def test_a_base_without_clicks_is_refused(spread_base: Path):
    with pytest.raises(UserError, match="has no tracker"):
        Predictor(str(spread_base), device="cpu").interact(IMAGE)


def test_a_cleaned_object_shows_one_mask_and_goes_on_from_another():
    """A square with a hole of 4 pixels, a speck of 1, and a speck of 2 that the second click points at."""
    drawn = np.full((32, 32), -3.0, np.float32)
    drawn[4:16, 4:16] = 3
    with_hole = drawn.copy()
    with_hole[8:10, 8:10] = -3
    noisy = with_hole.copy()
    noisy[30, 2] = noisy[25, 25:27] = 3
    pointed_at = drawn.copy()
    pointed_at[25, 25:27] = 3
    asked: list[ClickPrompt] = []

    def ask(prompt: ClickPrompt) -> ClickAnswer:
        asked.append(prompt)
        return ClickAnswer.of(torch.from_numpy(noisy)[None], [0.9], 1.0)

    size_hw = (64, 64)
    state = Interaction(size_hw, side=112)
    as_it_is = ClickResult(state, ask).prompt([(12, 12, 1)])
    assert as_it_is.rle == encode_logits(noisy, size_hw)
    for cleaning, first, second in (
        (MaskCleaning(), noisy, noisy),
        (MaskCleaning(4, 4), drawn, pointed_at),
        (MaskCleaning(0, 4), with_hole, np.where(pointed_at != drawn, pointed_at, with_hole)),
    ):
        one = ClickResult(state, ask, cleaning=cleaning).prompt([(12, 12, 1)])
        assert one.rle == one.alternatives[0].rle == one.to_dict()["mask"] == encode_logits(first, size_hw)
        assert one.area_px == rle_area_px(encode_logits(first, size_hw))
        one.add(51, 50)
        assert asked[-1].mask_mm is not None
        assert torch.equal(asked[-1].mask_mm, torch.from_numpy(noisy))
        assert one.rle == encode_logits(second, size_hw)
        one.undo()
        assert one.rle == encode_logits(first, size_hw)


def test_what_a_prompt_found_is_not_cleaned(predictor: Predictor):
    areas = {"max_hole_area": 1000, "max_sprinkle_area": 1000}
    plain, cleaned = (predictor.interact(IMAGE, **given).detect("crack") for given in ({}, areas))
    assert [one.rle for one in plain] == [one.rle for one in cleaned]
