"""The API's description: complete, self-contained, and true."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from serve_app.http.errors import STATUS_OF

from .http_cases import make_client


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return make_client().get("/openapi.json").json()


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, found) for path, methods in document["paths"].items() for method, found in methods.items()]


def test_every_route_is_described(document: dict[str, Any]):
    described = [(path, method) for path, method, _ in operations(document)]
    assert described == [
        ("/v1/segment", "post"),
        ("/v1/dense", "post"),
        ("/v1/refine", "post"),
        ("/v1/images", "post"),
        ("/v1/adapters", "get"),
        ("/healthz", "get"),
        ("/readyz", "get"),
        ("/metrics", "get"),
    ]


def test_every_error_has_an_example(document: dict[str, Any]):
    shown = {
        example["value"]["error"]["type"]
        for _, _, operation in operations(document)
        for response in operation["responses"].values()
        for example in response.get("content", {}).get("application/json", {}).get("examples", {}).values()
    }
    assert shown == set(STATUS_OF) - {"not_found", "method_not_allowed"}  # these belong to no path


def test_examples_work_when_they_are_sent(document: dict[str, Any]):
    client = make_client()
    for path, method, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {})
        for example in content.get("application/json", {}).get("examples", {}).values():
            response = client.request(method, path, json=example["value"])
            assert response.status_code == 200, response.text
            if "image/png" not in content:
                continue
            image = base64.b64decode(example["value"]["image_base64"])
            raw = client.post(
                path,
                content=image,
                headers={"content-type": "image/png"},
                params={"/v1/segment": "prompts=a", "/v1/dense": "adapter=a"}.get(path, ""),
            )
            assert raw.status_code == 200, raw.text


def test_limits_in_force_are_described():
    properties = (
        make_client(max_prompts=3).get("/openapi.json").json()["components"]["schemas"]["SegmentRequest"]["properties"]
    )
    assert properties["prompts"]["maxItems"] == 3
    assert properties["prompts"]["items"] == {"type": "string", "minLength": 1, "maxLength": 40}
    schemas = make_client(max_objects=2, max_clicks=5).get("/openapi.json").json()["components"]["schemas"]
    assert schemas["RefineRequest"]["properties"]["objects"]["maxItems"] == 2
    assert schemas["ObjectRequest"]["properties"]["clicks"]["maxItems"] == 5
    assert properties["max_detections"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 200}
