"""The calls of the HTTP API: the request of each, and its parsed response."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, cast

from sam3lora.client.dense_results import DenseLabels
from sam3lora.client.errors import NotFound, Overloaded
from sam3lora.client.exchange import Budget, Call, Reply, Steps, exchange, read_answer
from sam3lora.client.image_files import UploadedImage
from sam3lora.client.refine_results import RefineResults
from sam3lora.client.segment_results import AdapterInfo, Rle, SegmentResults

ADAPTERS_AT_ONCE = 500  # in one response

LabelledBox = tuple[Iterable[float], int]
"""`((x0, y0, x1, y1), label)` in pixels; label 1: find such things, 0: not these."""


class SegmentOptions(TypedDict, total=False):
    """Options of `segment`. The adapter's recorded values hold for post-processing that is missing or None.

    Attributes:
        boxes: Examples for every prompt; without prompts the boxes alone say what is meant.
        adapter: Id of an adapter; None asks the base model.
        threshold: Lowest score in [0, 1], for all prompts.
        nms: Overlap of masks ("mask") or boxes ("box") that makes two detections one object; "none" keeps both.
        nms_iou: Of two detections that overlap more only the better one stays.
        merge: Join overlapping detections into one instead.
        merge_iou: Mask IoU from which detections are joined; needs `merge`.
        max_detections: Most detections of a prompt.
        masks: Form of the masks: "rle", "polygon", "png", or "none" for boxes only.
        keep_masks: Keep the masks in the service, and answer `mask_ids`, for `refine`.
    """

    boxes: Iterable[LabelledBox]
    adapter: str | None
    threshold: float | None
    nms: Literal["mask", "box", "none"] | None
    nms_iou: float | None
    merge: bool | None
    merge_iou: float | None
    max_detections: int | None
    masks: Literal["rle", "polygon", "png", "none"]
    keep_masks: bool


class DenseOptions(TypedDict, total=False):
    """Options of `dense`.

    Attributes:
        output: "label_png", or for each class "rle" or "probability_png", or "none" for areas alone; None is a label
            map, or a mask of each class where classes may overlap.
        classes: Only these; None is all.
        threshold: Lowest probability in (0, 1) of a class that is found by itself; None is the adapter's own.
    """

    output: Literal["label_png", "rle", "probability_png", "none"] | None
    classes: Iterable[str] | None
    threshold: float | None


class ShownObject(TypedDict, total=False):
    """What shows an object to `refine`: a click or a box at least.

    Attributes:
        clicks: (x, y) or (x, y, label) in pixels; label 1: belongs to the object, the default, 0: does not.
        box: x0, y0, x1, y1 in pixels: the object is in it.
        mask: What to correct: a `mask_id` of an answer about the same image, or a COCO RLE.
    """

    clicks: Iterable[Sequence[float]]
    box: Iterable[float] | None
    mask: str | Rle | None


class RefineOptions(TypedDict, total=False):
    """Options of `refine`.

    Attributes:
        adapter: Id of an adapter whose vision trunk shall be seen; None is the base model's.
        clicks_vision: "base" leaves the adapter out of the trunk.
        click_adapter: Id of an adapter of task "clicks" whose click head shall answer; None is the base model's.
        multimask: "always", "never", or "auto": three masks for a single click alone.
        masks: Form of the masks: "rle", "polygon", "png", or "none".
        max_hole_area: Up to which area holes are filled, in pixels of the model's low-resolution mask; 0 fills none.
        max_sprinkle_area: Up to which area stray parts are left out, in the same pixels; 0 leaves out none.
    """

    adapter: str | None
    clicks_vision: Literal["adapter", "base"]
    click_adapter: str | None
    multimask: Literal["auto", "always", "never"]
    masks: Literal["rle", "polygon", "png", "none"]
    max_hole_area: int
    max_sprinkle_area: int


def segment(
    image: bytes | UploadedImage, prompts: str | Iterable[str], options: SegmentOptions, budget: Budget
) -> Steps[SegmentResults]:
    reply = yield from _ask("v1/segment", image, segment_request(prompts, options), budget)
    masks = options.get("masks", "rle")
    return read_answer(reply, lambda answer: SegmentResults.from_json(answer, masks), budget.request_id)


def dense(image: bytes | UploadedImage, adapter: str, options: DenseOptions, budget: Budget) -> Steps[DenseLabels]:
    _refuse_unknown("dense", options, DenseOptions)
    request: dict[str, Any] = {"adapter": adapter, **options}
    if (classes := options.get("classes")) is not None:
        request["classes"] = [classes] if isinstance(classes, str) else list(classes)
    reply = yield from _ask("v1/dense", image, request, budget)
    return read_answer(reply, DenseLabels.from_json, budget.request_id)


def refine(
    image: bytes | UploadedImage, objects: Iterable[ShownObject], options: RefineOptions, budget: Budget
) -> Steps[RefineResults]:
    _refuse_unknown("refine", options, RefineOptions)
    request = {"objects": [_object(one) for one in objects], **options}
    reply = yield from _ask("v1/refine", image, request, budget)
    masks = options.get("masks", "rle")
    return read_answer(reply, lambda answer: RefineResults.from_json(answer, masks), budget.request_id)


def listed(objects: ShownObject | Iterable[ShownObject]) -> list[ShownObject]:
    """One object or several as a list."""
    return [cast(ShownObject, objects)] if isinstance(objects, Mapping) else list(objects)


def _ask(path: str, image: bytes | UploadedImage, request: Mapping[str, Any], budget: Budget) -> Steps[Reply]:
    """Ask about an image; an uploaded one that the service has evicted is sent again."""
    if isinstance(image, UploadedImage):
        call = Call("POST", path, {"json": {"image_id": image.image_id, **request}})
        try:
            return (yield from exchange(call, budget))
        except NotFound as error:
            if error.type != "image_not_found" or image.data is None:
                raise
            yield from upload(image.data, budget)
            return (yield from exchange(call, budget))
    text = json.dumps(request, ensure_ascii=False, allow_nan=False)
    body = {"files": {"image": ("image", image, "application/octet-stream")}, "data": {"request": text}}
    return (yield from exchange(Call("POST", path, body), budget))


def upload(data: bytes, budget: Budget) -> Steps[UploadedImage]:
    files = {"image": ("image", data, "application/octet-stream")}
    reply = yield from exchange(Call("POST", "v1/images", {"files": files}), budget)

    def parse(answer: Mapping[str, Any]) -> UploadedImage:
        return UploadedImage(answer["image_id"], (int(answer["height"]), int(answer["width"])), data)

    return read_answer(reply, parse, budget.request_id)


def adapters(search: str | None, limit: int | None, budget: Budget) -> Steps[list[AdapterInfo]]:
    """Page by page; a service of an earlier version answers with all at once."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    found: list[AdapterInfo] = []
    after: str | None = None

    def parse(answer: Mapping[str, Any]) -> tuple[list[AdapterInfo], str | None]:
        return [AdapterInfo.from_json(adapter) for adapter in answer["adapters"]], answer.get("next")

    while True:
        size = ADAPTERS_AT_ONCE if limit is None else min(ADAPTERS_AT_ONCE, limit - len(found))
        asked = {"search": search, "limit": size, "after": after}
        parameters = {name: value for name, value in asked.items() if value is not None}
        reply = yield from exchange(Call("GET", "v1/adapters", {"params": parameters}), budget)
        page, after = read_answer(reply, parse, budget.request_id)
        found += page
        if after is None or not page or len(found) == limit:
            return found[:limit]


def answers_clicks(budget: Budget) -> Steps[bool]:
    """A service of an earlier version says nothing of it."""
    reply = yield from exchange(Call("GET", "v1/adapters", {"params": {"limit": 1}}), budget)
    return read_answer(reply, lambda answer: bool(answer.get("clicks")), budget.request_id)


def ready(budget: Budget) -> Steps[bool]:
    try:
        yield from exchange(Call("GET", "readyz"), budget)
    except Overloaded:
        return False
    return True


def segment_request(prompts: str | Iterable[str], options: SegmentOptions) -> dict[str, Any]:
    """The JSON of a request.

    Raises:
        TypeError: An unknown option.
        ValueError: A box is not four numbers and a label.
    """
    _refuse_unknown("segment", options, SegmentOptions)
    request: dict[str, Any] = {"prompts": [prompts] if isinstance(prompts, str) else list(prompts), **options}
    if "boxes" in options:
        request["boxes"] = [_box(box) for box in options["boxes"]]
    return request


def _refuse_unknown(name: str, options: Mapping[str, Any], known: type) -> None:
    if unknown := options.keys() - known.__annotations__.keys():
        arguments = ", ".join(known.__annotations__)
        raise TypeError(f"{name}() takes no argument {', '.join(sorted(unknown))}; there are {arguments}")


def _object(shown: ShownObject) -> dict[str, Any]:
    if unknown := shown.keys() - ShownObject.__annotations__.keys():
        raise TypeError(f"an object takes no {', '.join(sorted(unknown))}; it has clicks, box and mask")
    asked: dict[str, Any] = {"clicks": [_click(click) for click in shown.get("clicks", ())]}
    if (box := shown.get("box")) is not None:
        try:
            x0, y0, x1, y1 = map(_finite, box)
        except (TypeError, ValueError):
            raise ValueError(f"expected a box as (x0, y0, x1, y1), got {box!r}") from None
        asked["box"] = [x0, y0, x1, y1]
    if (mask := shown.get("mask")) is not None:
        asked["mask"] = {"mask_id": mask} if isinstance(mask, str) else _rle(mask)
    return asked


def _click(click: Sequence[float]) -> dict[str, Any]:
    try:
        x, y, label = click if len(click) == 3 else (*click, 1)
        return {"x": _finite(x), "y": _finite(y), "label": _label(label)}
    except (TypeError, ValueError):
        raise ValueError(f"expected clicks as (x, y) or (x, y, 1 or 0), got {click!r}") from None


def _box(box: LabelledBox) -> dict[str, Any]:
    try:
        corners, label = box
        x0, y0, x1, y1 = map(_finite, corners)
        return {"xyxy": [x0, y0, x1, y1], "label": _label(label)}
    except (TypeError, ValueError):
        raise ValueError(f"expected boxes as ((x0, y0, x1, y1), 1 or 0), got {box!r}") from None


def _rle(mask: Any) -> dict[str, Any]:
    try:
        size, counts = mask["size"], mask["counts"]
    except (TypeError, KeyError, IndexError):
        raise ValueError(f"expected a mask as a mask_id or a COCO RLE, got {str(mask)[:60]}") from None
    # pycocotools makes bytes
    return {"size": [int(side) for side in size], "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _label(value: Any) -> int:
    if value not in (0, 1):
        raise ValueError(value)
    return int(value)
