"""The listing of adapters: its query parameters and its response."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from sam3lora.config.post_processing import PostProcessing
from serve_app.http.body import query_value
from serve_app.http.errors import ServeError
from serve_app.http.schemas import AdaptersRequest, check
from serve_app.messages import AdapterPage, AdapterQuery


def check_listing(parameters: Sequence[tuple[str, str]]) -> AdapterQuery:
    """What the query parameters ask for.

    Raises:
        ServeError: A parameter is unknown, came twice, or is out of range.
    """
    fields = dict(parameters)
    if len(fields) < len(parameters):
        raise ServeError("invalid_request", "a query parameter came twice: give each once")
    given = {name: query_value(text) if name == "limit" else text for name, text in fields.items()}
    asked: AdaptersRequest = check(AdaptersRequest, given)
    return AdapterQuery(asked.search, asked.limit, asked.after, asked.task)


def adapters_json(page: AdapterPage, request_id: str) -> str:
    """An `AdaptersResponse`. Its rows are JSON already: with thousands of adapters nothing is parsed or built anew."""
    last = page.rows[-1].id if page.rows and page.has_more else None
    rows = ",".join(row.json for row in page.rows)
    return (
        f'{{"adapters":[{rows}],"total":{page.total},"next":{json.dumps(last)},'
        f'"base_post_processing":{_base_post_processing()},'
        f'"clicks":{json.dumps(page.clicks)},"request_id":{json.dumps(request_id)}}}'
    )


@cache
def _base_post_processing() -> str:
    return PostProcessing().model_dump_json()
