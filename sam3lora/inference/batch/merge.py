"""What a finished batch run leaves: COCO results, the list of bad images, and a data set to train on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps

from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.data.ids import IdKey
from sam3lora.engine.mask_codes import rle_area_px, rle_box_xyxy
from sam3lora.files import replace_folder
from sam3lora.inference.batch.image_list import ImageSource
from sam3lora.inference.batch.output_folder import Finished, written_whole


def write_predictions(path: Path, sources: Sequence[ImageSource], finished: Finished) -> int:
    """COCO results at the original size, in the order of the images: a list of `image_id`, `category_id`,
    `segmentation` (compressed RLE), `bbox` (xywh in pixels) and `score`. Returns how many."""
    errors = finished.errors
    with written_whole(path) as handle:
        num_detections = 0
        for source in sources:
            if source.path in errors:
                continue
            for detection in finished.record(source.path)["detections"]:
                result = {"image_id": source.image_id, **detection}
                handle.write(f"{',' if num_detections else '['}\n{json.dumps(result)}")
                num_detections += 1
        handle.write("\n]\n" if num_detections else "[]\n")
    return num_detections


def write_bad_images(path: Path, sources: Sequence[ImageSource], finished: Finished) -> list[dict[str, Any]]:
    """A list of `file_name`, `path` and `reason`; empty if every image has a result."""
    errors = finished.errors
    bad = [
        {"file_name": source.name, "path": source.path, "reason": errors[source.path]}
        for source in sources
        if source.path in errors
    ]
    with written_whole(path) as handle:
        json.dump(bad, handle, indent=2)
    return bad


def write_dataset(
    folder: Path, sources: Sequence[ImageSource], finished: Finished, categories: Mapping[str, IdKey]
) -> None:
    """The results as labels: ``folder``/train with its annotation file, as `sam3lora train` reads it.

    Images are hard links to the originals (copies where the file system cannot link); bad ones are left out. Boxes and
    areas are those of the masks, detections without a pixel are left out, and each annotation keeps its `score`.
    The folder appears whole, in place of an earlier one.
    """
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    split = scratch / "train"
    split.mkdir(parents=True)
    good = [source for source in sources if source.path not in finished.errors]
    images, num_annotations = [], 0
    with written_whole(split / ANNOTATION_FILE) as handle:
        listed = [{"id": id_, "name": name} for name, id_ in categories.items()]
        handle.write(f'{{"categories": {json.dumps(listed)},\n"annotations": [')
        for source in good:
            record = finished.record(source.path)
            height, width = record["size_hw"]
            _place_image(source, split / source.name)
            images.append({"id": source.image_id, "file_name": source.name, "width": width, "height": height})
            for detection in record["detections"]:
                if annotation := _annotation(detection, source.image_id, num_annotations + 1):
                    handle.write(f"{',' if num_annotations else ''}\n{json.dumps(annotation)}")
                    num_annotations += 1
        handle.write(f'],\n"images": {json.dumps(images)}}}\n')
    replace_folder(scratch, folder)


def _annotation(detection: Mapping[str, Any], image_id: IdKey, annotation_id: int) -> dict[str, Any] | None:
    mask = detection["segmentation"]
    x0, y0, x1, y1 = rle_box_xyxy(mask)
    area_px = rle_area_px(mask)
    box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": area_px, "iscrowd": 0}
    return {"id": annotation_id, "image_id": image_id, **detection, **box} if area_px else None


def _place_image(source: ImageSource, target: Path) -> None:
    if target.exists():  # a file listed under two ids
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.size_hw is None and _is_mirrored_or_upside_down(source.path):
        with Image.open(source.path) as image:
            upright = ImageOps.exif_transpose(image)
            upright.save(target, format=image.format, quality=95)
        return
    original = os.path.realpath(source.path)
    try:
        os.link(original, target)
    except OSError:
        shutil.copyfile(original, target)


def _is_mirrored_or_upside_down(path: str) -> bool:
    """Whether the picture people see differs from the stored one, and its size does not tell.

    Training turns a picture only where the size in the annotation file is that of the turned one.
    """
    with contextlib.suppress(Exception), Image.open(path) as image:  # damaged EXIF data raises many kinds
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation in (2, 3, 4) or (orientation in (5, 6, 7, 8) and image.width == image.height)
    return False
