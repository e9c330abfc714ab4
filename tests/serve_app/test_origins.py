"""What pages in browsers may do: names of the service, other sites, and preflight requests beside keys."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve_app.http.ingress import create_api

from .http_cases import KEY_VARIABLE, FakeBackend, as_json, make_settings

SITE = "https://example.org"
PREFLIGHT = {
    "origin": SITE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}
LOCAL = ("localhost", "127.0.0.1", "::1")


def client(**settings: Any) -> TestClient:
    return TestClient(create_api(make_settings().model_copy(update=settings), FakeBackend()))


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("localhost", True),
        ("localhost:8000", True),
        ("LOCALHOST.:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("localhost:", True),
        ("[localhost]", False),
        ("[::1", False),
        ("attacker.example:8000", False),
        ("localhost.attacker.example", False),
        ("attacker.example:localhost", False),
        ("localhost@attacker.example", False),
        ("127.0.0.1.nip.io", False),
        ("", False),
    ],
)
def test_names_of_the_service(host: str, is_ours: bool):
    local = client(allowed_hosts=LOCAL)
    for path in ("/v1/adapters", "/", "/docs", "/openapi.json", "/nowhere"):
        response = local.get(path, headers={"host": host})
        assert (response.status_code != 421) == is_ours, path
        if not is_ours:
            error = response.json()["error"]
            assert error["type"] == "unknown_host"
            assert "allowed_hosts" in error["message"]
            assert "attacker" not in error["message"]
    assert local.get("/healthz", headers={"host": host}).status_code == 200
    assert client().get("/v1/adapters", headers={"host": host}).status_code == 200


def test_two_names_at_once_are_none():
    answer = client(allowed_hosts=LOCAL).get(
        "/v1/adapters", headers=[("host", "localhost"), ("host", "attacker.example")]
    )
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "malformed_request")


def test_without_the_setting_no_other_site_may_call():
    asked = client().options("/v1/segment", headers=PREFLIGHT)
    assert asked.status_code == 405
    for response in (asked, client().get("/v1/adapters", headers={"origin": SITE})):
        assert not [name for name in response.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(("origins", "allowed"), [((SITE, "https://b.example"), SITE), (("*",), "*")])
def test_a_page_of_an_allowed_site(monkeypatch: pytest.MonkeyPatch, origins: tuple[str, ...], allowed: str):
    """The browser asks first, without the key, and the page can read errors as well."""
    monkeypatch.setenv(KEY_VARIABLE, "the-key")
    service = client(cors_origins=origins)
    asked = service.options("/v1/segment", headers=PREFLIGHT)
    assert (asked.status_code, asked.content) == (204, b"")
    assert asked.headers["access-control-allow-origin"] == allowed
    assert "POST" in asked.headers["access-control-allow-methods"]
    for name in ("authorization", "x-api-key", "content-type", "x-request-id"):
        assert name in asked.headers["access-control-allow-headers"].lower()
    assert asked.headers["x-request-id"]
    refused = service.post("/v1/segment", headers={"origin": SITE}, **as_json())
    answered = service.post("/v1/segment", headers={"origin": SITE, "x-api-key": "the-key"}, **as_json())
    assert (refused.status_code, answered.status_code) == (401, 200)
    for response in (refused, answered):
        assert response.headers["access-control-allow-origin"] == allowed
        assert "X-Request-ID" in response.headers["access-control-expose-headers"]
    assert service.options("/v1/segment", headers={"origin": SITE}).status_code == 401  # no preflight request


@pytest.mark.parametrize("origin", ["https://evil.example", "http://example.org", SITE + ".evil.example", "null", ""])
def test_a_page_of_another_site(origin: str):
    service = client(cors_origins=(SITE,))
    asked = service.options("/v1/segment", headers=PREFLIGHT | {"origin": origin})
    assert asked.status_code == 405
    for response in (asked, service.get("/v1/adapters", headers={"origin": origin})):
        assert "access-control-allow-origin" not in response.headers
        assert response.headers["vary"] == "Origin"
