"""Where the Label Studio backend gets images from, and where it does not."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "label_studio"))

from task_images import ImageFault, TaskImages

HOST = "http://label-studio.test:8080"


class LabelStudio:
    """Serves one file, and remembers who asked for what."""

    def __init__(self, *, access_tokens: tuple[str, ...] = ()) -> None:
        self.seen: list[tuple[str, str]] = []
        self.access_tokens = list(access_tokens)
        self.valid = ""

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.seen.append((request.url.path, request.headers.get("authorization", "")))
        if request.url.path.endswith("/api/token/refresh"):
            assert json.loads(request.content) == {"refresh": "a.b.c"}
            self.valid = self.access_tokens.pop(0)
            return httpx.Response(200, json={"access": self.valid})
        if self.valid and request.headers["authorization"] != f"Bearer {self.valid}":
            return httpx.Response(401)
        if request.url.path.endswith("moved.png"):
            return httpx.Response(302, headers={"location": "http://elsewhere.test/"})
        if request.url.path.endswith("large.png"):
            return httpx.Response(200, content=b"x" * (33 * 2**20))
        return httpx.Response(200, content=b"file")

    def images(self, token: str | None = "legacy", **options: Any) -> TaskImages:
        return TaskImages(HOST, token, transport=httpx.MockTransport(self.handle), **options)


@pytest.mark.parametrize(
    "address",
    [
        "/data/upload/3/a.png",
        f"{HOST}/data/upload/3/a.png",
        "/data/local-files/?d=a.png",
        "/tasks/1/resolve/?fileuri=YQ==",
    ],
)
def test_files_of_label_studio_are_fetched_with_the_token(address):
    host = LabelStudio()
    assert host.images().read(address) == b"file"
    assert [token for _, token in host.seen] == ["Token legacy"]


@pytest.mark.parametrize(
    "address",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://label-studio.test:9090/data/upload/a.png",
        "https://label-studio.test:8080/data/upload/a.png",
        "http://label-studio.test:8080@elsewhere.test/data/upload/a.png",
        "//elsewhere.test/data/upload/a.png",
        "s3://bucket/a.png",
        "file:///etc/passwd",
        "/api/users/",
        "/data/../api/users/",
        "/data/%2e%2e/api/users/",
        "",
    ],
)
def test_nothing_else_is_fetched(address):
    host = LabelStudio()
    with pytest.raises(ImageFault):
        host.images().read(address)
    assert host.seen == []


def test_redirects_and_large_files_are_refused():
    host = LabelStudio()
    with pytest.raises(ImageFault, match="HTTP 302"):
        host.images().read("/data/upload/moved.png")
    with pytest.raises(ImageFault, match="larger than"):
        host.images().read("/data/upload/large.png")
    assert len(host.seen) == 2


def test_a_personal_token_is_exchanged_and_renewed():
    host = LabelStudio(access_tokens=("first", "second"))
    images = host.images("a.b.c")
    assert images.read("/data/upload/a.png") == images.read("/data/upload/b.png") == b"file"
    host.valid = "expired meanwhile"
    assert images.read("/data/upload/c.png") == b"file"
    assert [token for path, token in host.seen if path != "/api/token/refresh"] == [
        "Bearer first",
        "Bearer first",
        "Bearer first",
        "Bearer second",
    ]


def test_label_studio_under_a_path():
    host = LabelStudio()
    images = TaskImages(f"{HOST}/ls", None, transport=httpx.MockTransport(host.handle))
    assert images.read(f"{HOST}/ls/data/upload/a.png") == images.read("/data/upload/a.png") == b"file"
    assert host.seen == [("/ls/data/upload/a.png", ""), ("/data/upload/a.png", "")]


def test_local_files_are_read_under_the_root_only(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a b.png").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (root / "link").symlink_to(tmp_path / "secret")
    host = LabelStudio()
    images = host.images(local_root=root)
    assert images.read("/data/local-files/?d=a%20b.png") == b"inside"
    # Label Studio on Windows separates folders by backslashes; elsewhere one may be part of a name
    (root / "images").mkdir()
    (root / "images" / "c.png").write_bytes(b"deep")
    for name in ("images%5Cc.png", "%5Cimages%5Cc.png", "images/c.png"):
        assert images.read(f"/data/local-files/?d={name}") == b"deep"
    (root / "images\\c.png").write_bytes(b"flat")
    assert images.read("/data/local-files/?d=images%5Cc.png") == b"flat"
    for name in ("../secret", "link", "/../secret", "nosuch.png", "", "..%5Csecret", "images%5C..%5C..%5Csecret"):
        with pytest.raises(ImageFault):
            images.read(f"/data/local-files/?d={name}")
    assert images.read("/data/upload/a.png") == b"file"
    assert len(host.seen) == 1


def test_data_uris():
    images = TaskImages()
    assert images.read("data:image/png;base64,aGk=") == b"hi"
    assert images.read("data:,a%20b") == b"a b"
    for broken in ("data:image/png;base64", "data:image/png;base64,???"):
        with pytest.raises(ImageFault, match=re.escape("data: URI")):
            images.read(broken)
    with pytest.raises(ImageFault, match="--label-studio-url"):
        images.read("/data/upload/a.png")
