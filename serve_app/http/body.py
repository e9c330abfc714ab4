"""Request bodies, read within limits: multipart, JSON, or an image with its request in the query parameters."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serve_app.http.errors import ServeError
from serve_app.http.schemas import NOT_TEXT, field_at, shown_name

_MAX_FIELDS = 8  # parts that are parsed; an unknown one among them is refused by name
MAX_JSON_BYTES = 1 << 18  # of a request, without its image and run-length codes
MAX_CODES_BYTES = 8 << 20  # of a request's run-length codes: 32 of branched cracks in an image of 4000 x 3000
_MAX_PART_BYTES = MAX_JSON_BYTES + MAX_CODES_BYTES
_BIG_JSON = 1 << 14  # bytes from which parsing goes to a thread
# Up to the first quote, escaped or not: neither base64 nor a code holds one, and a byte set is searched at once
_IMAGE_BASE64, _CODE = (re.compile(rb'"%s"\s*+:\s*+"([^"]*+)' % name) for name in (b"image_base64", b"counts"))
_MEDIA_TYPE = re.compile(r"[a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,60}")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,300})(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LISTS = ("prompts", "boxes", "classes")
_ACCEPTED_BODIES = (
    "multipart/form-data with a file `image` and a field `request`, application/json with image_base64 or image_id, or "
    "the image itself as image/* with the request in query parameters"
)


@dataclass(frozen=True)
class Received:
    """A request before its fields are checked; `image` is the image file, if it is not among the fields."""

    fields: dict[str, Any]
    image: bytes | None = None


async def read_request(request: Request, max_bytes: int) -> Received:
    """Read a request of any accepted form.

    Raises:
        ServeError: The body is too large, is not what its header says, or has an unsupported content type.
        ClientDisconnect: The client disconnected.
    """
    _check_headers(request, max_bytes)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_raw = kind.startswith("image/") or kind == "application/octet-stream"
    if not is_raw and request.query_params:
        raise ServeError(
            "invalid_request", "query parameters are read only if the body is a raw image: put them into the request"
        )
    if kind == "multipart/form-data":
        return await _read_multipart(request, max_bytes)
    if kind == "application/json":
        return Received(await _parse(await _read_all(request, max_bytes)))
    if is_raw:
        fields = _query_fields(request)
        return Received(fields, image=await _read_all(request, max_bytes))
    found = f"got {kind}" if _MEDIA_TYPE.fullmatch(kind) else "its content-type is missing or broken"
    raise ServeError("unsupported_media_type", f"expected {_ACCEPTED_BODIES}; {found}")


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8 without repeated names, NaN or Infinity.

    Raises:
        ServeError: `malformed_body`, `body_too_large`, or `invalid_request` for a repeated name.
    """
    _check_json_size(body)
    encoding = json.detect_encoding(body)
    if encoding != "utf-8":
        found = "UTF-8 with a byte order mark" if encoding == "utf-8-sig" else encoding.upper()
        raise ServeError("malformed_body", f"the JSON is in {found}: expected UTF-8 without a byte order mark")
    try:
        parsed = json.loads(
            body.decode("utf-8"), object_pairs_hook=_once, parse_float=_number, parse_constant=_no_constant
        )
    except RecursionError:
        raise ServeError("malformed_body", "the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        message = f"the JSON cannot be read: {error.msg} at character {error.pos}"
        raise ServeError("malformed_body", message) from None
    except ValueError:  # no UTF-8, or a number of thousands of digits
        raise ServeError("malformed_body", "the JSON cannot be read: expected UTF-8 text and finite numbers") from None
    if not isinstance(parsed, dict):
        raise ServeError("invalid_request", "expected a JSON object {...}")
    return parsed


async def _parse(body: bytes) -> dict[str, Any]:
    return await asyncio.to_thread(parse_json, body) if len(body) > _BIG_JSON else parse_json(body)


def _check_json_size(body: bytes) -> None:
    """Limit the JSON besides long texts, which are cheap to parse: millions of small values are not."""
    if len(body) <= MAX_JSON_BYTES:
        return
    image = _IMAGE_BASE64.search(body)
    num_bytes_of_codes = sum(code.end(1) - code.start(1) for code in _CODE.finditer(body))
    if num_bytes_of_codes > MAX_CODES_BYTES:
        raise ServeError(
            "body_too_large",
            f"expected at most {MAX_CODES_BYTES} bytes of run-length codes, got {num_bytes_of_codes}: name kept masks "
            "by their mask_id, or ask for fewer objects",
        )
    if len(body) - num_bytes_of_codes - (len(image[1]) if image else 0) > MAX_JSON_BYTES:
        message = f"expected at most {MAX_JSON_BYTES} bytes of JSON besides image_base64 and counts: ask in parts"
        raise ServeError("body_too_large", message)


def _check_headers(request: Request, max_bytes: int) -> None:
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise ServeError("unsupported_media_type", "the body has a content-encoding: send it without")
    if request.headers.get("transfer-encoding", "").strip().lower() not in ("", "identity", "chunked"):
        raise ServeError(
            "unsupported_media_type", "the body is compressed by its transfer-encoding: send it chunked only"
        )


async def _chunks(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        yield chunk


async def _read_all(request: Request, max_bytes: int) -> bytes:
    return b"".join([chunk async for chunk in _chunks(request, max_bytes)])


class _LargePartError(MultiPartException):
    """A part that is no file is larger than a request may be."""


class _MultiPart(MultiPartParser):
    """Starlette's parser. Files stay in memory, and `is_whole` says whether the body was complete."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], max_bytes: int) -> None:
        limits = {"max_files": _MAX_FIELDS, "max_fields": _MAX_FIELDS, "max_part_size": _MAX_PART_BYTES}
        super().__init__(headers, stream, **limits)
        self.spool_max_size = max_bytes + 1
        self.is_whole = False

    def on_end(self) -> None:
        self.is_whole = True

    def on_headers_finished(self) -> None:
        part = self._current_part
        if part.content_disposition and b"filename=" not in part.content_disposition:
            # RFC 8187's form alone, which the parser does not know
            part.content_disposition = part.content_disposition.replace(b"filename*=", b"filename=")
        super().on_headers_finished()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None and len(self._current_part.data) + end - start > _MAX_PART_BYTES:
            raise _LargePartError("too large")
        super().on_part_data(data, start, end)

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is not None:
            super().on_part_end()
            return
        try:
            self.items.append((part.field_name, part.data.decode("utf-8")))
        except UnicodeDecodeError:
            raise MultiPartException("a part is no UTF-8 text") from None


async def _read_multipart(request: Request, max_bytes: int) -> Received:
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8")
    if charset.lower() not in (b"utf-8", b"us-ascii"):  # Python has slow codecs as well
        raise ServeError("malformed_body", "the multipart body has a charset: expected UTF-8")
    parser = _MultiPart(request.headers, _chunks(request, max_bytes), max_bytes)
    try:
        form = await parser.parse()
    except _LargePartError:
        raise _large_request() from None
    except MultiPartException as error:
        raise ServeError("malformed_body", f"the multipart body cannot be read: {error.message}") from None
    try:
        parts: dict[str, str | UploadFile] = {}
        for name, part in form.multi_items():
            if name not in ("image", "request"):
                raise ServeError(
                    "invalid_request", "expected only the parts `image` (file) and `request` (JSON), got another one"
                )
            if name in parts:
                raise ServeError("invalid_request", f"the part {name} came twice", field=name)
            parts[name] = part
        if not parser.is_whole:
            raise ServeError("malformed_body", "the multipart body breaks off before its end")
        image, fields = parts.get("image"), parts.get("request", "{}")
        if isinstance(image, str):
            raise ServeError("invalid_request", "the part image must be a file: give it a filename", field="image")
        if isinstance(fields, UploadFile):
            if (fields.size or 0) > _MAX_PART_BYTES:
                raise _large_request()
            parsed = await _parse(await fields.read())
        else:
            parsed = await _parse(fields.encode())
        return Received(parsed, image=None if image is None else await image.read())
    finally:
        await form.close()


def _query_fields(request: Request) -> dict[str, Any]:
    """Fields of the query parameters: repeatable ones as lists, `boxes=x0,y0,x1,y1,label` as an object."""
    fields: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        if "\ufffd" in text:
            raise ServeError("invalid_request", "a query parameter is no UTF-8 text")
        if name in _LISTS:
            values = fields.setdefault(name, [])
            values.append(_box(text, len(values)) if name == "boxes" else text)
        elif name in fields:
            shown = shown_name(name)
            raise ServeError("invalid_request", f"the query parameter {shown} came twice", field=field_at(shown))
        else:
            fields[name] = query_value(text) if name in NOT_TEXT else text
    return fields


def query_value(text: str) -> Any:
    """A number or a bool as JSON writes it; other text is left as it is, and refused by the checks."""
    if _NUMBER.fullmatch(text):
        return _number(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _box(text: str, number: int) -> dict[str, Any]:
    values = text.split(",")
    if len(values) not in (4, 5):
        message = "expected boxes=x0,y0,x1,y1,label with label 1 or 0"
        raise ServeError("invalid_box", message, field=f"boxes[{number}]")
    numbers = [query_value(value) for value in values]
    return {"xyxy": numbers[:4]} | ({"label": numbers[4]} if len(values) == 5 else {})


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                shown = shown_name(name)
                raise ServeError("invalid_request", f"{shown} is given twice", field=field_at(shown))
            seen.add(name)
    return found


def _number(text: str) -> float:
    """JSON has one type of numbers: 1.0 is an integer."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _no_constant(name: str) -> None:
    raise ServeError("invalid_request", f"{name} is no number in JSON")


def _large_request() -> ServeError:
    message = f"a part without an image has more than {_MAX_PART_BYTES} bytes: ask in parts, send the image as a file"
    return ServeError("body_too_large", message)


def _too_large(max_bytes: int) -> ServeError:
    return ServeError("body_too_large", f"the body is larger than {max_bytes} bytes: send a smaller image")
