"""Requests made from the API's description: valid ones are accepted, others refused, and answers are as described."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.http.ingress import create_api
from serve_app.settings import ServeSettings

from .http_cases import PNG, PNG_BASE64, FakeBackend

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks as openapi  # noqa: E402

CHECKS = [
    not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
    openapi.response_headers_conformance,
    openapi.unsupported_method,
]
OF_MODE = {
    GenerationMode.POSITIVE: openapi.positive_data_acceptance,
    GenerationMode.NEGATIVE: openapi.negative_data_rejection,
}
BOX = {"xyxy": [1.0, 2.0, 9.5, 20.0], "label": 1}


def completed(case: Any) -> Any:
    """What a description cannot ask for: an image, prompts of letters, boxes inside, a query for raw images."""
    in_query = case.media_type not in ("application/json", "multipart/form-data")
    if not in_query:
        case.query.clear()
    if case.media_type == "application/json":
        case.body.pop("image_base64" if case.body.get("image_id") else "image_id", None)
        if "image_id" not in case.body:
            case.body["image_base64"] = PNG_BASE64
    elif case.media_type == "multipart/form-data":
        case.body["image"] = PNG
    else:
        case.body = PNG
    if case.operation.path in ("/v1/segment", "/v1/dense", "/v1/refine"):
        fields = case.query if in_query else case.body
        if case.media_type == "multipart/form-data":
            fields = case.body.setdefault("request", {})
            for name in ("image_base64", "image_id"):
                fields.pop(name, None)
    if case.operation.path == "/v1/dense":
        fields["adapter"] = fields.get("adapter") or "land-cover"
        if fields.get("classes"):
            fields["classes"] = [f"class {number}" for number in range(len(fields["classes"]))]
    if case.operation.path == "/v1/refine":
        for one in fields.setdefault("objects", [{}]):
            # one that belongs to the object, and others that do not
            one["clicks"] = [{"x": 3.5, "y": 40, "label": int(not n)} for n, _ in enumerate(one.get("clicks") or [0])]
            one["box"] = None if one.get("box") is None else BOX["xyxy"]
            one["mask"] = None if one.get("mask") is None else {"mask_id": "msk_" + 32 * "0"}
    if case.operation.path == "/v1/segment":
        prompts = fields.get("prompts") or ["crack"]
        fields["prompts"] = ["".join(filter(str.isalpha, prompt)) or "crack" for prompt in prompts]
        fields["boxes"] = ["1,2,9.5,20,1" if in_query else BOX for _ in fields.get("boxes", [])]
    return case


def statuses(operation: Any, mode: GenerationMode, number: int) -> set[int]:
    """Send what is made for an operation, check the answers, and return their statuses."""
    seen = set()
    quick = settings(
        max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate]
    )

    @seed(number)
    @quick
    @given(case=operation.as_strategy(generation_mode=mode))
    def probe(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and case.method != "GET":
            case = completed(case)
        response = case.call()
        seen.add(response.status_code)
        case.validate_response(response, checks=[*CHECKS, OF_MODE[mode]])

    probe()
    return seen


SEEDS = [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, 11))]


@pytest.mark.parametrize("number", SEEDS)
def test_requests_made_from_the_description(number: int):
    app = create_api(ServeSettings(api_keys_variable="SAM3LORA_TEST_KEYS"), FakeBackend())
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    for operation in (found.ok() for found in schema.get_all_operations()):
        seen = statuses(operation, GenerationMode.POSITIVE, number)
        assert 200 in seen
        if operation.method == "post":  # there is nothing to get wrong in the others
            seen = statuses(operation, GenerationMode.NEGATIVE, number)
            assert 422 in seen
