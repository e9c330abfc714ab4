"""Images of tasks, read from Label Studio, from a local folder, or from a `data:` URI in the task.

Anyone who can write tasks chooses the addresses, and requests carry Label Studio's token. Therefore only Label Studio's
own host is asked, only below the paths that serve files, and redirects are not followed.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Generator
from pathlib import Path
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit

import httpx2 as httpx

FILE_PATHS = ("/data/", "/tasks/", "/projects/", "/storage-data/")
LOCAL_FILES_PATH = "/data/local-files/"
MAX_IMAGE_BYTES = 32 * 2**20


class ImageFault(Exception):
    """A task's image cannot be read; the message gives the reason, but not the address."""


class LabelStudioToken(httpx.Auth):
    """Both kinds of access token: a legacy one is sent as it is, a personal one is exchanged for short-lived tokens."""

    def __init__(self, url: str, token: str) -> None:
        self._refresh_url = f"{url.rstrip('/')}/api/token/refresh"
        self._token = token
        self._is_personal = token.count(".") == 2  # a JWT
        self._access = ""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if not self._is_personal:
            request.headers["Authorization"] = f"Token {self._token}"
            yield request
            return
        if self._access:
            request.headers["Authorization"] = f"Bearer {self._access}"
            response = yield request
            if response.status_code != 401:
                return
        refreshed = yield httpx.Request("POST", self._refresh_url, json={"refresh": self._token})
        refreshed.read()
        if refreshed.status_code == 200:
            self._access = refreshed.json()["access"]
            request.headers["Authorization"] = f"Bearer {self._access}"
        yield request


class TaskImages:
    """Reads the images of tasks.

    Args:
        label_studio_url: Address of Label Studio; without it nothing is fetched.
        token: Access token of a Label Studio account that may see the project.
        local_root: Folder that holds the files of local storage (`/data/local-files/?d=...`), if it is on this machine.
        transport: Sends the requests, for tests.
    """

    def __init__(
        self,
        label_studio_url: str | None = None,
        token: str | None = None,
        local_root: Path | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._host = httpx.URL(label_studio_url) if label_studio_url else None
        self._local_root = local_root.resolve() if local_root else None
        auth = LabelStudioToken(label_studio_url, token) if label_studio_url and token else None
        self._http = httpx.Client(auth=auth, transport=transport, timeout=30.0)

    def read(self, address: str) -> bytes:
        """The image file at a task's address: a URL or path of Label Studio, or a `data:` URI.

        Raises:
            ImageFault: It is elsewhere, too large, or cannot be read.
        """
        if address.startswith("data:"):
            return _read_data_uri(address)
        parts = urlsplit(address)
        if self._local_root and not parts.netloc and parts.path == LOCAL_FILES_PATH:
            return self._read_local(parse_qs(parts.query).get("d", [""])[0])
        return self._fetch(address)

    def _read_local(self, name: str) -> bytes:
        assert self._local_root is not None
        path = (self._local_root / name.lstrip("/")).resolve()
        if "\\" in name and not path.exists():  # Label Studio on Windows
            path = (self._local_root / name.replace("\\", "/").lstrip("/")).resolve()
        if not path.is_relative_to(self._local_root):
            raise ImageFault("the task's file lies outside the local root")
        try:
            if path.stat().st_size > MAX_IMAGE_BYTES:
                raise ImageFault(f"the task's file is larger than {MAX_IMAGE_BYTES} bytes")
            return path.read_bytes()
        except OSError as error:
            raise ImageFault(f"the task's file cannot be read: {error.strerror}") from None

    def _fetch(self, address: str) -> bytes:
        if self._host is None:
            raise ImageFault("the task's image is on a server: give Label Studio's address with --label-studio-url")
        try:
            url = self._host.join(address)
        except httpx.InvalidURL:
            raise ImageFault("the task's image has no usable address") from None
        if (url.scheme, url.host, url.port) != (self._host.scheme, self._host.host, self._host.port):
            raise ImageFault(
                "the task's image is not on Label Studio's host: import it, or serve it from local storage"
            )
        path = url.path.removeprefix(self._host.path.rstrip("/"))
        if not path.startswith(FILE_PATHS) or ".." in path.split("/"):
            raise ImageFault(f"Label Studio serves files below {', '.join(FILE_PATHS)}, not at the task's address")
        try:
            with self._http.stream("GET", url) as response:
                if response.status_code != 200:
                    raise ImageFault(f"Label Studio answered HTTP {response.status_code} for the task's image")
                content = bytearray()
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > MAX_IMAGE_BYTES:
                        raise ImageFault(f"the task's image is larger than {MAX_IMAGE_BYTES} bytes")
        except httpx.RequestError as error:
            raise ImageFault(f"Label Studio cannot be reached: {type(error).__name__}") from None
        return bytes(content)


def _read_data_uri(address: str) -> bytes:
    head, comma, data = address.partition(",")
    try:
        if not comma:
            raise ValueError
        return base64.b64decode(data, validate=True) if head.endswith(";base64") else unquote_to_bytes(data)
    except (binascii.Error, ValueError):
        raise ImageFault("the task's data: URI cannot be read") from None
