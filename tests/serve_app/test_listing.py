"""The listing of adapters over HTTP: all, a search, page by page, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.http.backend import ServeBackend
from serve_app.http.listing import adapters_json
from serve_app.http.schemas import AdapterResponse, AdaptersResponse
from serve_app.messages import EVERY_ADAPTER, AdapterQuery
from serve_app.replica import adapter_store
from serve_app.replica.adapter_store import AdapterStore
from serve_app.settings import AdapterSettings, ServeSettings

from .adapter_folders import write_adapter
from .http_cases import FakeBackend, make_client, page_of
from .test_adapter_store import Counts, Model
from .test_backend import FakeHandle

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("", EVERY_ADAPTER),
        ("?search=Crack&limit=2&after=a", AdapterQuery("Crack", 2, "a")),
        ("?limit=1000", AdapterQuery(limit=1000)),
        ("?search=%C3%9F%20b", AdapterQuery("ß b")),
    ],
)
def test_what_is_asked_for(query: str, asked: AdapterQuery):
    backend = FakeBackend()
    assert make_client(backend).get(f"/v1/adapters{query}").status_code == 200
    assert backend.listed == [asked]


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("?limit=0", "limit"),
        ("?limit=1001", "limit"),
        ("?limit=-1", "limit"),
        ("?limit=", "limit"),
        ("?limit=1.5", "limit"),
        ("?limit=1_0", "limit"),
        ("?limit=many", "limit"),
        (f"?limit={'9' * 5000}", "limit"),
        (f"?search={'x' * 201}", "search"),
        (f"?after={'x' * 201}", "after"),
        ("?limit=1&limit=2", "twice"),
        ("?serch=x", "search"),  # the message names the nearest parameter
    ],
)
def test_refused_parameters(query: str, name: str):
    backend = FakeBackend()
    answer = make_client(backend).get(f"/v1/adapters{query}")
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid_request")
    assert name in answer.json()["error"]["message"]
    assert backend.listed == []


def test_the_json_of_a_page_is_that_of_its_model():
    shown = AdapterResponse(id='"a"', prompts=["Riß"], error="no\nweights")
    page = page_of(shown, AdapterResponse(id="b"), total=7, has_more=True)
    answer = AdaptersResponse.model_validate_json(adapters_json(page, "id-1"))
    assert answer.adapters == [shown, AdapterResponse(id="b")]
    assert (answer.total, answer.next, answer.request_id) == (7, "b", "id-1")
    assert set(json.loads(adapters_json(page, "id-1"))) == set(AdaptersResponse.model_fields)
    assert json.loads(adapters_json(page_of(), "id-1"))["next"] is None


@pytest.fixture
async def store(tmp_path: Path) -> Any:
    for number in range(12):
        write_adapter(tmp_path, f"Line-{number:02d}")
    write_adapter(tmp_path, "other")
    (tmp_path / "other" / "adapter_config.json").unlink()
    store = AdapterStore(Model(), None, AdapterSettings(root=tmp_path), num_slots=1, metrics=Counts())
    yield store
    store.close()


async def test_pages_follow_each_other(store: AdapterStore):
    whole = [row.id for row in (await store.list()).rows]
    assert len(whole) == 13
    seen: list[str] = []
    after = None
    while True:
        page = await store.list(AdapterQuery(limit=5, after=after))
        assert page.total == 13
        seen += [row.id for row in page.rows]
        if not page.has_more:
            break
        after = seen[-1]
    assert seen == whole
    assert (await store.list(AdapterQuery(after="zzz"))).rows == []
    assert not (await store.list(AdapterQuery(limit=13))).has_more


async def test_a_page_is_bounded_in_bytes(store: AdapterStore, monkeypatch: pytest.MonkeyPatch):
    first = (await store.list()).rows[0]
    monkeypatch.setattr(adapter_store, "MAX_PAGE_BYTES", 3 * len(first.json) + 10)
    page = await store.list(AdapterQuery(limit=13))
    assert (len(page.rows), page.total, page.has_more) == (3, 13, True)
    assert len((await store.list()).rows) == 13  # all of them, where no page was asked for
    monkeypatch.setattr(adapter_store, "MAX_PAGE_BYTES", 1)
    assert len((await store.list(AdapterQuery(limit=13))).rows) == 1


def test_a_listing_beyond_the_limit_is_refused():
    answer = make_client(FakeBackend(), max_answer_bytes=100).get("/v1/adapters")
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "answer_too_large")


async def test_a_search_looks_into_ids_and_prompts(store: AdapterStore):
    async def found(text: str) -> list[str]:
        return [row.id for row in (await store.list(AdapterQuery(search=text))).rows]

    assert await found("LINE-1") == ["Line-10", "Line-11"]
    assert await found("what line-03 FINDS") == ["Line-03"]  # the recorded prompt
    assert await found("other") == ["other"]  # a broken one too, by its id
    assert await found("line-03\nwhat") == []  # each text on its own
    assert await found("") == [row.id for row in (await store.list()).rows]
    assert await found("nothing") == []
    page = await store.list(AdapterQuery("line", limit=3))
    assert (len(page.rows), page.total, page.has_more) == (3, 12, True)


async def test_pages_of_several_replicas_are_one():
    a, b, c, d = (AdapterResponse(id=letter) for letter in "abcd")
    first, second = page_of(a, b, total=4, has_more=True), page_of(a, c.model_copy(update={"resident": True}), total=4)
    backend = ServeBackend(FakeHandle([first, second], [page_of(d), page_of(d)]), ServeSettings())
    page = await backend.list_adapters(AdapterQuery(limit=2))
    assert ([row.id for row in page.rows], page.total, page.has_more) == (["a", "b"], 4, True)
    page = await backend.list_adapters(AdapterQuery(limit=2, after="c"))
    assert ([row.id for row in page.rows], page.has_more) == (["d"], False)
