"""The pages: their files, texts and questions to try, and the API reference, all without resources from other sites."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import Scope

from qadeploy.shipped import HANDBOOK, PAGE

# Ids of rows in data/handbook.jsonl: papers that were held out from training, three questions each.
_ROWS = (
    ("his-18-03", "his-18-07", "his-18-02"),
    ("saf-09-02", "saf-09-01", "saf-09-06"),
    ("eng-02-03", "eng-02-07", "eng-02-05"),
    ("ops-11-05", "ops-11-06", "ops-11-02"),
    ("pst-08-04", "pst-08-01", "pst-08-03"),
    ("ops-14-04", "ops-14-10", "ops-14-09"),
)
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The API of qadeploy</title>
<link rel="stylesheet" href="/static/reference.css">
</head>
<body>
<main>
"""


def add_page(app: FastAPI, name: str) -> None:
    """Serves a page at ``/``, and the files of all pages under ``/static``."""
    start = (PAGE / name).read_text(encoding="utf-8")
    app.mount("/static", Static(directory=PAGE), name="static")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(start)


class Static(StaticFiles):
    """Serves each file under exactly one path; Starlette also accepts a trailing slash, ``//`` and ``./``."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file. Raises HTTPException if the path is not exactly its own."""
        if scope["path"] != f"/static/{path}":
            raise HTTPException(404)
        return await super().get_response(path, scope)


def examples() -> list[dict[str, Any]]:
    """Six papers to try on the page, each ``{"title", "context", "questions": [...]}``, in the order of the page."""
    found = map(json.loads, HANDBOOK.read_text(encoding="utf-8").strip().split("\n"))
    rows = {row["id"]: row for row in found}
    return [
        {
            "title": rows[chosen[0]]["title"],
            "context": rows[chosen[0]]["context"],
            "questions": [rows[name]["question"] for name in chosen],
        }
        for chosen in _ROWS
    ]


def reference_page(document: dict[str, Any]) -> str:
    """The API reference from an OpenAPI document: routes, fields, examples and errors."""
    return "".join([_HEAD, *_body(document), "</main>\n</body>\n</html>\n"])


def _body(document: dict[str, Any]) -> Iterator[str]:
    about = document["info"]
    yield f"<h1>{escape(about['title'])} {escape(about['version'])}</h1>\n"
    yield f"<p>{_text(about['description'])}</p>\n"
    yield '<p>For programs: <a href="/openapi.json">openapi.json</a>.</p>\n'
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            yield f"<section>\n<h2><code>{method.upper()} {escape(path)}</code></h2>\n<p>{_text(route['summary'])}.</p>\n"
            yield f"<p>{_text(route.get('description', ''))}</p>\n"
            asked = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if asked:
                for schema in _forms(asked, document):
                    yield from _schema(schema, document)
            yield "<h3>Responses</h3>\n<dl>\n"
            for status, told in sorted(route["responses"].items()):
                yield f"<dt><code>{escape(status)}</code></dt><dd>{_text(told['description'])}</dd>\n"
            yield "</dl>\n</section>\n"


def _forms(schema: dict[str, Any], document: dict[str, Any]) -> list[dict[str, Any]]:
    """The forms that a body may have, with references resolved."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _forms(document["components"]["schemas"][name], document)
    several = schema.get("oneOf") or schema.get("anyOf")
    return [form for one in several for form in _forms(one, document)] if several else [schema]


def _schema(schema: dict[str, Any], document: dict[str, Any]) -> Iterator[str]:
    if schema.get("type") == "array":
        item = _forms(schema["items"], document)[0]
        yield f"<h3>A list of: {_text(item.get('description', item.get('title', '')))}</h3>\n"
        schema = item
    else:
        yield f"<h3>{_text(schema.get('description', schema.get('title', '')))}</h3>\n"
    for example in schema.get("examples", ()):
        yield f"<pre>{escape(json.dumps(example, indent=2, ensure_ascii=False))}</pre>\n"
    required = schema.get("required", ())
    yield "<dl>\n"
    for name, field in sorted(schema.get("properties", {}).items(), key=lambda entry: entry[0] not in required):
        of = "required" if name in required else f"default {json.dumps(field.get('default'))}"
        yield f"<dt><code>{escape(name)}</code> <small>{escape(of)}</small></dt><dd>{_text(field.get('description', ''))}</dd>\n"
    yield "</dl>\n"


def _text(text: str) -> str:
    """A text in which backticks mark code, as HTML."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
