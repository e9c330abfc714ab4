"""The OpenAPI description: every body, response and error, with examples that work when they are sent."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

import cv2
import numpy as np
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import PlainTextResponse

from serve_app.http.auth import is_open
from serve_app.http.body import MAX_JSON_BYTES
from serve_app.http.dense_schemas import DenseRequest, DenseResponse
from serve_app.http.errors import FIELD_OF, STATUS_OF
from serve_app.http.openapi_examples import dense_example, refine_example, segment_example
from serve_app.http.refine_schemas import RefineRequest, RefineResponse
from serve_app.http.schemas import (
    AdaptersRequest,
    AdaptersResponse,
    ErrorResponse,
    ImageResponse,
    ImageUpload,
    SegmentRequest,
    SegmentResponse,
    StatusResponse,
)
from serve_app.settings import Limits

TITLE = "sam3lora"
_ABOUT = (
    "SAM 3 with many LoRA adapters over one base model: send an image and short phrases, get masks. "
    "Errors are JSON with a `type` for programs and a `message` for people; every response carries `X-Request-ID`."
)
_REF = "#/components/schemas/{}"
_COMMON = ("malformed_request", "unauthorized", "unknown_host", "headers_too_large", "internal")
_BODY = (
    "malformed_body",
    "slow_body",
    "body_too_large",
    "image_too_large",
    "unsupported_media_type",
    "unsupported_image",
    "invalid_request",
    "invalid_image",
    "too_many_requests",
    "overloaded",
    "out_of_memory",
    "replica_failed",
    "not_ready",
    "timeout",
)
_ADAPTER = ("adapter_not_found", "invalid_adapter", "wrong_task", "no_click_head")
_ANSWER = (*_BODY, "image_not_found", *_ADAPTER, "answer_too_large")
_SEGMENT = (*_ANSWER, "invalid_prompt", "invalid_box")
_REFINE = (*_ANSWER, "invalid_click", "invalid_box", "invalid_mask", "mask_not_found")
_BINARY = {"type": "string", "format": "binary"}
_NUMBER = r"-?[0-9]+(\.[0-9]+)?"
_BOX = f"^{_NUMBER}(,{_NUMBER}){{3}}(,[01])?$"
_RAW_TYPES = ("image/jpeg", "image/png", "application/octet-stream")


def operation(name: str) -> dict[str, Any]:
    """Keyword arguments of `add_api_route` that describe a route."""
    return {"operation_id": name, "response_model": None, **_operations()[name]}


def describe(api: FastAPI, limits: Limits) -> None:
    """Add the request models, the limits in force and the API key schemes to `/openapi.json`."""

    @cache
    def openapi() -> dict[str, Any]:
        document = get_openapi(title=api.title, version=api.version, description=_ABOUT, routes=api.routes)
        asked = (SegmentRequest, DenseRequest, RefineRequest, ImageUpload)
        models = [(model, "validation") for model in asked]
        _, schemas = models_json_schema(models, ref_template=_REF.replace("{}", "{model}"))  # type: ignore[arg-type]
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(schemas["$defs"])
        fields = components["schemas"]["SegmentRequest"]["properties"]
        _write_limits(components["schemas"], limits)
        document["paths"]["/v1/segment"]["post"]["parameters"] += _parameters(fields, boxes=_box_parameter(fields))
        of_dense = components["schemas"]["DenseRequest"]["properties"]
        document["paths"]["/v1/dense"]["post"]["parameters"] += _parameters(of_dense)
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        for path, methods in document["paths"].items():
            for method in methods.values():
                if not is_open(path):
                    method["security"] = [{"bearer": []}, {"key": []}, {}]
        return document

    api.openapi = openapi  # type: ignore[method-assign]


def sample_png() -> bytes:
    """A dark disc on a light ground, 64 x 64."""
    image = np.full((64, 64, 3), 200, np.uint8)
    cv2.circle(image, (36, 30), 14, (40, 40, 160), -1)
    return cv2.imencode(".png", image)[1].tobytes()


def _operations() -> dict[str, dict[str, Any]]:
    return {
        "segment": {
            "summary": "Segment what prompts or boxes describe",
            "description": "Multipart is the fastest form for files; an uploaded image (`image_id`) is cheaper still.",
            "responses": _responses(_SEGMENT, SegmentResponse, segment_example()),
            "openapi_extra": {"parameters": [_request_id_parameter()], "requestBody": _segment_body()},
        },
        "dense": {
            "summary": "Label each pixel",
            "description": "By an adapter whose task is dense: `GET /v1/adapters` has its classes.",
            "responses": _responses(_ANSWER, DenseResponse, dense_example()),
            "openapi_extra": {"parameters": [_request_id_parameter()], "requestBody": _dense_body()},
        },
        "refine": {
            "summary": "Outline what clicks and boxes show, or correct a mask",
            "description": "The base model needs a click head: `GET /v1/adapters` says `clicks`. An uploaded image is "
            "encoded once, so that each further click takes the head alone.",
            "responses": _responses(_REFINE, RefineResponse, refine_example()),
            "openapi_extra": {"parameters": [_request_id_parameter()], "requestBody": _refine_body()},
        },
        "images": {
            "summary": "Upload an image",
            "description": "For several requests about one image: it is sent and encoded once. Replicas keep the most "
            "recently used images; a request for an evicted one gets 404 `image_not_found`.",
            "responses": _responses(
                _BODY,
                ImageResponse,
                {
                    "request_id": "a1",
                    "image_id": "img_" + 64 * "0",
                    "width": 64,
                    "height": 64,
                    "timing_ms": {"total": 9.1},
                },
            ),
            "openapi_extra": {"parameters": [_request_id_parameter()], "requestBody": _image_body()},
        },
        "adapters": {
            "summary": "List the adapters",
            "description": "All of them; with `limit` page by page: `next` of one page is `after` of the next.",
            "responses": _responses(("invalid_request", "not_ready"), AdaptersResponse),
            "openapi_extra": {"parameters": _query_parameters(AdaptersRequest)},
        },
        "healthz": {"summary": "Liveness", "responses": _responses((), StatusResponse, {"status": "ok"})},
        "readyz": {
            "summary": "Readiness",
            "responses": _responses(("not_ready",), StatusResponse, {"status": "ready"}),
        },
        "metrics": {
            "summary": "Prometheus metrics of all replicas",
            "responses": _responses(()),
            "response_class": PlainTextResponse,
        },
    }


def _responses(types: tuple[str, ...], model: type[BaseModel] | None = None, example: Any = None) -> dict[Any, Any]:
    headers = {"X-Request-ID": {"schema": {"type": "string"}, "description": "The client's, or a generated one."}}
    good: dict[str, Any] = {"description": "Done", "headers": headers}
    if model is not None:
        good["model"] = model
    if example is not None:
        good["content"] = {"application/json": {"example": example}}
    found: dict[Any, Any] = {200: good}
    for type in (*types, *_COMMON):
        status = STATUS_OF[type]
        entry = found.setdefault(
            status,
            {"model": ErrorResponse, "headers": dict(headers), "content": {"application/json": {"examples": {}}}},
        )
        detail: dict[str, str | None] = {
            "type": type,
            "message": "what was expected, what came, what to do",
            "request_id": "a1",
            "field": FIELD_OF.get(type),
        }
        examples = entry["content"]["application/json"]["examples"]
        examples[type] = {"value": {"error": detail}}
        entry["description"] = " / ".join(examples)
        if status in (429, 503):
            entry["headers"]["Retry-After"] = {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}
    return found


def _segment_body() -> dict[str, Any]:
    ask = {"prompts": ["red disc"], "threshold": 0.3}
    boxes = {"boxes": [{"xyxy": [22, 16, 50, 44], "label": 1}], "masks": "polygon", "threshold": 0.3}
    return _asking_body("SegmentRequest", {"prompts": ("By name", ask), "boxes": ("By a box", boxes)})


def _dense_body() -> dict[str, Any]:
    labels = {"adapter": "land-cover"}
    masks = {"adapter": "land-cover", "output": "rle", "classes": ["water", "road"]}
    return _asking_body("DenseRequest", {"labels": ("All labels", labels), "masks": ("Masks of some classes", masks)})


def _refine_body() -> dict[str, Any]:
    click = {"objects": [{"clicks": [{"x": 36, "y": 30, "label": 1}]}]}
    box = {"objects": [{"box": [22, 16, 50, 44], "clicks": [{"x": 24, "y": 18, "label": 0}]}], "masks": "polygon"}
    return _asking_body("RefineRequest", {"click": ("One click", click), "box": ("A box and a click", box)}, raw=False)


def _asking_body(model: str, examples: dict[str, tuple[str, dict[str, Any]]], *, raw: bool = True) -> dict[str, Any]:
    """A body of any form; an example is its title and its fields, to which an image is added.

    `raw`: the image itself, with the request in query parameters, is one of the forms.
    """
    request = {"$ref": _REF.format(model)}
    forms = "Multipart, JSON, or a raw image with the request in query parameters" if raw else "Multipart or JSON"
    needed = () if raw else ("request",)
    encoded = base64.b64encode(sample_png()).decode()
    return {
        "required": True,
        "description": f"{forms}. JSON has at most {MAX_JSON_BYTES} bytes besides image_base64 and counts.",
        "content": {
            "application/json": {
                "schema": request,
                "examples": {
                    name: {"summary": title, "value": fields | {"image_base64": encoded}}
                    for name, (title, fields) in examples.items()
                },
            },
            "multipart/form-data": {
                "schema": _form({"image": _BINARY, "request": request}, *needed),
                "encoding": {"request": {"contentType": "application/json"}},
            },
            **{kind: {"schema": _BINARY} for kind in _RAW_TYPES if raw},
        },
    }


def _image_body() -> dict[str, Any]:
    encoded = base64.b64encode(sample_png()).decode()
    return {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": _REF.format("ImageUpload")},
                "examples": {"image": {"summary": "A small image", "value": {"image_base64": encoded}}},
            },
            "multipart/form-data": {"schema": _form({"image": _BINARY})},
            **{kind: {"schema": _BINARY} for kind in _RAW_TYPES},
        },
    }


def _form(fields: dict[str, Any], *needed: str) -> dict[str, Any]:
    return {"type": "object", "required": ["image", *needed], "properties": fields, "additionalProperties": False}


def _request_id_parameter() -> dict[str, Any]:
    return {
        "name": "X-Request-ID",
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "Returned with the response if it has up to 64 letters, digits, dots, hyphens and underscores; "
        "otherwise, and without it, an id is generated.",
    }


def _query_parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    """The fields of a model without nested ones; null, which a query cannot say, is left out."""
    found = []
    for name, field in model.model_json_schema()["properties"].items():
        schema = next(one for one in field["anyOf"] if one["type"] != "null")
        found.append({"name": name, "in": "query", "required": False, "description": field["description"]})
        found[-1]["schema"] = schema
    return found


def _box_parameter(fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "maxItems": fields["boxes"]["maxItems"], "items": {"type": "string", "pattern": _BOX}}


def _parameters(fields: dict[str, Any], **others: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of a request whose body is the image itself; `others` have another form in a query.

    They have no defaults: generated clients would send those beside other bodies, which is refused.
    """
    asked = {name: schema for name, schema in fields.items() if not name.startswith("image_")} | others
    without_null = {name: schema.get("anyOf", [schema])[0] for name, schema in asked.items()}
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": {key: value for key, value in schema.items() if key != "default"},
            "description": f"Beside a raw image only: {fields[name]['description']}",
        }
        for name, schema in without_null.items()
    ]


def _write_limits(schemas: dict[str, Any], limits: Limits) -> None:
    schemas["RefineRequest"]["properties"]["objects"]["maxItems"] = limits.max_objects
    schemas["ObjectRequest"]["properties"]["clicks"]["maxItems"] = limits.max_clicks
    properties = schemas["SegmentRequest"]["properties"]
    properties["prompts"]["maxItems"] = limits.max_prompts
    properties["prompts"]["items"] |= {"minLength": 1, "maxLength": limits.max_prompt_chars}
    properties["boxes"]["maxItems"] = limits.max_boxes
    properties["max_detections"]["anyOf"][0]["maximum"] = limits.max_detections
