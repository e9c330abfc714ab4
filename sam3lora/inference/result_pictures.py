"""Pictures of results: detections drawn over their image, and writing the picture to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sam3lora.engine.detections import Detections
from sam3lora.errors import UserError
from sam3lora.inference.drawing import PALETTE_RGB, Marked, draw_instances, encode_image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_LABELS = 20  # of a picture: more would hide the objects


def draw_results(
    results: Sequence[Detections], *, show_boxes: bool = False, show_masks: bool = True, show_labels: bool = True
) -> np.ndarray:
    """The image with what its prompts found; one colour a prompt, or one a detection if there is a single prompt.

    Labels show prompt and score of the best detections, equally many of each prompt and about 20 in all.

    Returns:
        uint8 (k H, k W, 3), RGB; small images are enlarged by a whole factor k, so that labels can be read.
    """
    num_images = len({id(result.image_HW3) for result in results})
    if num_images != 1 or results[0].image_HW3 is None:
        raise ValueError(f"expected the results of one image, got {len(results)} of {num_images} images")
    marked, colours = [], []
    num_labelled = max(1, MAX_LABELS // len(results))
    for number, result in enumerate(results):
        rles = result.rles if show_masks and result.rles is not None else [None] * result.num_detections
        for row, (score, box, rle) in enumerate(zip(result.scores, result.boxes_xyxy, rles, strict=True)):
            label = f"{result.prompt} {score:.2f}" if row < num_labelled else ""
            marked.append(Marked(label, rle, tuple(box.tolist())))
            colours.append(PALETTE_RGB[(number if len(results) > 1 else row) % len(PALETTE_RGB)])
    return draw_instances(
        results[0].image_HW3,
        marked,
        colours_rgb=colours or PALETTE_RGB,
        show_masks=show_masks,
        show_boxes=show_boxes,
        show_labels=show_labels,
    )


def check_picture_path(path: str | Path) -> None:
    """Raise UserError if the name's ending is that of no image format."""
    if Path(path).suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"cannot write a picture to {path}: its name must end in {', '.join(PICTURE_SUFFIXES)}")


def write_picture(path: str | Path, picture_HW3: np.ndarray) -> None:
    """Write RGB pixels in the format that the path's ending names; missing folders are made.

    Raises:
        UserError: It names no image format, or the file cannot be written.
    """
    check_picture_path(path)
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(picture_HW3, ".jpg" if suffix == ".jpeg" else suffix))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
