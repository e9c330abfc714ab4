"""`sam3lora infer` with clicks: a detection of a prompt corrected, or a new object of one image."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sam3lora.cli.infer_output import check_writable, print_table, table_of
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.engine.clicks.click import Click, ClicksVision
    from sam3lora.inference.clicks.result import ClickResult
    from sam3lora.inference.clicks.session import ClickSession

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class ClickOptions:
    """What `--click` and `--click-box` say, in pixels; false if neither was given.

    Attributes:
        clicks: (x, y, label) of each, label 1 for what belongs to the object and 0 for what does not.
        box_xyxy: Around the object.
    """

    clicks: tuple[Numbers, ...]
    box_xyxy: Numbers | None

    @classmethod
    def read(cls, clicks: Sequence[str] | None, boxes: Sequence[str] | None) -> ClickOptions:
        """From the words of the options.

        Raises:
            UserError: One is not made of numbers, or has too few or too many; there is more than one box.
        """
        if boxes and len(boxes) > 1:
            raise UserError(f"--click-box takes one box around one object, got {len(boxes)}: {' '.join(boxes)}")
        point = "x,y,label with label 1 (in the object) or 0 (not)"
        read = [_numbers("--click", word, point, (2, 3)) for word in clicks or ()]
        box = [_numbers("--click-box", word, "x0,y0,x1,y1", (4,)) for word in boxes or ()]
        return cls(tuple(one if len(one) == 3 else (*one, 1.0) for one in read), box[0] if box else None)

    def __bool__(self) -> bool:
        return bool(self.clicks) or self.box_xyxy is not None

    def check(self, prompts: Sequence[str], useless: Mapping[str, Any], without_prompt: Mapping[str, Any]) -> None:
        """Refuse what does not go with clicks.

        Args:
            useless: Options that have no effect with clicks; None and False were not given.
            without_prompt: Options that have none without a prompt.

        Raises:
            UserError: There is more than one prompt, nothing says what belongs to a new object, or an option has no
                effect.
        """
        for option, value in useless.items():
            if value:
                raise UserError(f"{option} has no effect with --click and --click-box: leave it out")
        if len(prompts) > 1:
            raise UserError(f"clicks correct a detection of one prompt, got {len(prompts)}: {', '.join(prompts)}")
        if prompts:
            return
        for option, value in without_prompt.items():
            if value is not None:
                raise UserError(f"{option} has no effect without --prompt: leave it out")
        if self.box_xyxy is None and not any(label for *_, label in self.clicks):
            raise UserError("all clicks say what does not belong to the object: add one with label 1, or --click-box")


def adapters_by_task(folders: Sequence[Path]) -> tuple[Path | None, Path | None]:
    """Of `--weights` the adapter that finds objects or labels pixels, and that of task clicks.

    Raises:
        UserError: There are several of a kind.
    """
    from sam3lora.model.adapter.metadata import CLICKS, read_metadata

    of_clicks = [folder for folder in folders if getattr(read_metadata(folder), "task", None) == CLICKS]
    others = [folder for folder in folders if folder not in of_clicks]
    if max(len(of_clicks), len(others)) > 1:
        raise UserError(
            "--weights takes one value here, and with --click one of task clicks beside it, got "
            f"{len(folders)}: {' '.join(map(str, folders))}"
        )
    return next(iter(others), None), next(iter(of_clicks), None)


def infer_clicks(
    image: Path,
    prompt: str | None,
    given: ClickOptions,
    output: Path,
    json: Path | None,
    settings: Mapping[str, Any],
    *,
    show_boxes: bool,
    clicks_vision: ClicksVision,
    cleaning: Mapping[str, int],
) -> None:
    """Correct the detection that clicks lie on, or show a new object; write the picture, and JSON if asked for.

    Clicks beside all detections of the prompt correct the best one.

    Args:
        settings: Arguments of `Predictor`.
        cleaning: Fields of `MaskCleaning`.

    Raises:
        UserError: A click or the box is outside of the image, a field is out of range, a file cannot be read or
            written, or the base has no click head.
    """
    from sam3lora.data.images import read_first_frame
    from sam3lora.engine.clicks.click import checked_box, checked_clicks
    from sam3lora.engine.clicks.mask_cleaning import MaskCleaning
    from sam3lora.inference.image_folder import FolderResults, detections_of
    from sam3lora.inference.predictor import Predictor
    from sam3lora.inference.result_pictures import check_picture_path

    # What is wrong is said before the model is loaded.
    areas = MaskCleaning(**cleaning)
    pixels_HW3, _ = read_first_frame(image)
    clicks = checked_clicks(given.clicks, pixels_HW3.shape[:2])
    if given.box_xyxy is not None:
        checked_box(given.box_xyxy, pixels_HW3.shape[:2])
    check_picture_path(output)
    for path in (output, json):
        if path is not None:
            check_writable(path, image)

    predictor = Predictor(**settings)
    started = time.perf_counter()
    session = predictor.interact(
        image,
        clicks_vision=clicks_vision,
        max_hole_area=areas.max_hole_area,
        max_sprinkle_area=areas.max_sprinkle_area,
    )
    found = session.detect(prompt) if prompt is not None else []
    if found:
        clicked: ClickResult = session.refine(meant_by(found, clicks), clicks, given.box_xyxy)
    else:
        clicked = session.click(clicks, box_xyxy=given.box_xyxy, label=prompt)
    seconds = time.perf_counter() - started

    results = session.results()
    session.draw(output, show_boxes=show_boxes)
    prompts = [] if prompt is None else [prompt]
    written = FolderResults({**predictor.settings, "prompts": prompts, "clicks_vision": clicks_vision, **asdict(areas)})
    written.add(image.name, session.size_hw, {**detections_of(results), "clicked": clicked.to_dict()})
    if json is not None:
        written.write(json)
    _print_objects(session, clicked, written.settings)
    if prompt is not None and not found:
        threshold = predictor.post.threshold_of(prompt)
        typer.echo(f"nothing scored {threshold:g} or more for {prompt!r}: the clicks show a new object")
    if not clicked.area_px:
        typer.echo("the clicked object has no pixel: try other clicks, or --click-box")
    typer.echo(f"{seconds:.2f} s; picture: {output}" + (f"; objects: {json}" if json else ""))


def meant_by(found: Sequence[ClickResult], clicks: Sequence[Click]) -> ClickResult:
    """Of the objects of a prompt, by descending score, the one with the most clicks in its mask."""
    return max(found, key=lambda one: sum(bool(one.mask[int(click.y), int(click.x)]) for click in clicks))


def _print_objects(session: ClickSession, clicked: Any, settings: dict[str, Any]) -> None:
    from rich.text import Text

    table = table_of(settings, "object", "score", "area in pixels", "")
    for one in session.objects:
        mark = "clicked" if one is clicked else ""
        table.add_row(Text(one.label or "object"), f"{one.score:.2f}", str(one.area_px), mark)
    print_table(table)


def _numbers(option: str, word: str, expected: str, counts: tuple[int, ...]) -> Numbers:
    try:
        numbers = tuple(float(part) for part in word.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in counts:
        raise UserError(f"{option} takes {expected} in pixels, without spaces, got {word!r}")
    return numbers
