"""The middleware: request ids, paths and methods, keys, security headers, errors."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from sam3lora.errors import UserError
from serve_app.http.errors import FIELD_OF, STATUS_OF, ServeError
from serve_app.http.ingress import create_api

from .http_cases import KEY_VARIABLE, FakeBackend, as_json, make_client, make_settings


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("my-id_1.2", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("<b>", False), ("", False)],
)
def test_request_id(sent: str, kept: bool):
    client = make_client()
    for path in ("/healthz", "/v1/segment", "/nowhere"):
        response = client.get(path, headers={"x-request-id": sent})
        got = response.headers["x-request-id"]
        assert (got == sent) == kept
        assert got
        if response.status_code >= 400:
            assert response.json()["error"]["request_id"] == got


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("<b> 'x' / 1", True), ("x" * 200, True), ("x" * 201, False), ("a\tb", False), (b"\xff", False), ("", False)],
)
def test_the_body_agrees_with_the_header_that_ray_serve_sends(sent: str | bytes, kept: bool):
    client = TestClient(create_api(make_settings(), FakeBackend(), sends_request_id=False))
    response = client.get("/v1/segment", headers={"x-request-id": sent})
    assert "x-request-id" not in response.headers
    got = response.json()["error"]["request_id"]
    assert (got == sent) == kept
    assert got


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1/nowhere", "/v1/segment/", "/docs/x", "//v1/segment", "/static/../ingress.py"]
)
def test_unknown_path(path: str):
    response = make_client().get(path)
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/segment", "POST"),
        ("HEAD", "/v1/images", "POST"),
        ("PUT", "/v1/segment", "POST"),
        ("POST", "/v1/adapters", "GET, HEAD"),
        ("DELETE", "/healthz", "GET, HEAD"),
    ],
)
def test_wrong_method(method: str, path: str, allow: str):
    response = make_client().request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allow)
    if method != "HEAD":
        assert response.json()["error"]["type"] == "method_not_allowed"


def test_head_is_get_without_a_body_and_every_answer_has_security_headers():
    client = make_client()
    for path in ("/healthz", "/v1/adapters", "/openapi.json"):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-length"] == got.headers["content-length"]
    for response in (client.get("/"), client.get("/nowhere"), client.post("/v1/segment", **as_json())):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' blob: data:;")
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/", "/labels", "/docs"])
def test_pages_load_nothing_from_elsewhere(path: str):
    response = make_client().get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "http://" not in response.text.replace("http://www.w3.org", "")
    assert "https://" not in response.text


# --- keys ---


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_VARIABLE, "first-key, zweiter-schlüssel")
    return make_client()


WRONG_KEYS: list[dict[str, Any]] = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "Bearer"},
    {"authorization": "Basic first-key"},
    {"authorization": "first-key"},
    {"authorization": "Bearer first-key, zweiter-schlüssel".encode()},
    {"x-api-key": "first-key2"},
    {"x-api-key": "ÿ".encode("latin-1")},
]
GUARDED_PATHS = ["/v1/segment", "/v1/images", "/v1/adapters", "/metrics", "/nowhere", "/docs/", "//v1/adapters"]


@pytest.mark.parametrize(
    ("path", "headers"),
    [*((path, {}) for path in GUARDED_PATHS), *(("/v1/adapters", headers) for headers in WRONG_KEYS)],
)
def test_a_request_without_a_right_key_is_refused(guarded: Any, path: str, headers: dict[str, Any]):
    method = "POST" if path in ("/v1/segment", "/v1/images") else "GET"
    response = guarded.request(method, path, headers=headers)
    assert (response.status_code, response.json()["error"]["type"]) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


def test_right_keys_and_open_paths(guarded: Any, monkeypatch: pytest.MonkeyPatch):
    for headers in (
        {"authorization": "bearer first-key"},
        {"x-api-key": "zweiter-schlüssel".encode()},
        {"authorization": "Bearer wrong", "x-api-key": "first-key"},
    ):
        assert guarded.get("/v1/adapters", headers=headers).status_code == 200
    for path in ("/healthz", "/readyz", "/", "/labels", "/docs", "/openapi.json"):
        assert guarded.get(path).status_code == 200, path
    monkeypatch.setenv(KEY_VARIABLE, " , ")
    with pytest.raises(UserError, match=KEY_VARIABLE):
        make_client()


def test_a_prefix_does_not_bypass_the_key(guarded: Any):
    """Ray Serve's `route_prefix` stands in the path and in `root_path`."""
    client = TestClient(guarded.app, root_path="/seg")
    key = {"x-api-key": "first-key"}
    for path in ("/v1/adapters", "/metrics", "/v1/nowhere"):
        assert client.get(f"/seg{path}").status_code == 401
        assert client.get(path).status_code == 401
    for path in ("/healthz", "/readyz", "/", "/labels", "/docs", "/openapi.json"):
        assert client.get(f"/seg{path}").status_code == 200
    assert client.get("/seg/static/nothing").status_code == 404
    assert client.get("/seg/v1/adapters", headers=key).status_code == 200
    text = client.get("/seg/metrics", headers=key).text
    assert 'route="/v1/adapters"' in text
    assert 'route="/healthz"' in text
    assert 'route="/static"' in text


# --- failures ---


@pytest.mark.parametrize("type", sorted(STATUS_OF))
def test_errors_of_replicas_are_passed_on(type: str):
    client = make_client(FakeBackend(answer=lambda call: ServeError(type, "words", 2.2)))
    response = client.post("/v1/segment", **as_json())
    assert response.status_code == STATUS_OF[type]
    assert response.json()["error"] == {
        "type": type,
        "message": "words",
        "request_id": response.headers["x-request-id"],
        "field": FIELD_OF.get(type),
    }
    assert response.headers.get("retry-after") == ("3" if response.status_code in (429, 503) else None)


def test_a_bug_is_logged_without_the_payload(caplog: pytest.LogCaptureFixture):
    def fail(call: Any) -> None:
        raise KeyError(call.prompts[0])

    client = make_client(FakeBackend(answer=fail))
    with caplog.at_level(logging.DEBUG):
        response = client.post("/v1/segment", **as_json(prompts=["secret words"]), headers={"x-request-id": "abc"})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "internal")
    assert "secret" not in response.text
    assert "abc" in caplog.text
    assert "KeyError" in caplog.text
    assert Path(__file__).name in caplog.text
    assert "secret" not in caplog.text


def test_valid_and_invalid_requests_are_not_logged(caplog: pytest.LogCaptureFixture):
    client = make_client()
    with caplog.at_level(logging.INFO, logger="serve_app"):
        client.post("/v1/segment", **as_json())
        client.post("/v1/segment", **as_json(threshold=3))
    assert not [record for record in caplog.records if record.name.startswith("serve_app")]
