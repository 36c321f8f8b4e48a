"""Describes the HTTP interface: schemas for OpenAPI, and a page of HTML that needs no script and no other host."""

import html
from typing import Any

from .requests import REQUEST

TYPES: dict[str, Any] = {
    "text": {"type": "string"},
    "texts": {"type": "object", "additionalProperties": {"type": "number"}},
    "images": {
        "type": "array",
        "items": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "string"},
                        "weight": {"type": "number"},
                        "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
                    },
                },
            ]
        },
    },
    "ids": {
        "anyOf": [
            {"type": "array", "items": {"type": "string"}},
            {"type": "object", "additionalProperties": {"type": "number"}},
        ]
    },
    "k": {"type": "integer", "minimum": 1, "default": 10},
    "offset": {"type": "integer", "minimum": 0, "default": 0},
    "filter": {"type": "string"},
    "min_score": {"type": "number"},
    "fold": {"type": "number"},
    "weights": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
    "exclude": {"type": "array", "items": {"type": "string"}},
}
"""JSON schemas of the keys of `REQUEST`."""

SEARCH: dict[str, Any] = {
    "type": "object",
    "properties": {key: {**TYPES[key], "description": about} for key, about in REQUEST.items()},
    "example": {"texts": {"red dress": 1, "stripes": -0.5}, "k": 5},
}

FORM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "reference images"},
        **{key: {"type": "string", "description": about} for key, about in REQUEST.items() if key != "images"},
    },
}

BATCH: dict[str, Any] = {
    "type": "object",
    "required": ["queries"],
    "properties": {"queries": {"type": "array", "items": SEARCH, "description": "searches"}},
    "example": {"queries": [{"text": "a red dress"}, {"text": "a green hat", "k": 3}]},
}

EMBEDDINGS: dict[str, Any] = {
    "type": "object",
    "required": ["input"],
    "properties": {
        "input": {"description": "a text, a data: URL or an object of a composed query; or a list of them"},
        "model": {"type": "string", "description": "the server's model"},
        "encoding_format": {"enum": ["float", "base64"], "description": "base64 of little-endian float32"},
        "dimensions": {"type": "integer", "description": "those of the model's embeddings"},
        "user": {"type": "string", "description": "not read"},
    },
    "example": {"input": ["a red dress", {"images": ["data:image/png;base64,..."], "text": "in green"}]},
}

CONTENTS: dict[str, dict[str, Any]] = {
    "/search": {"application/json": SEARCH, "multipart/form-data": FORM},
    "/search/batch": {"application/json": BATCH},
    "/v1/embeddings": {"application/json": EMBEDDINGS},
}

REFUSALS = {
    "400": "the request cannot be read",
    "413": "the request is too large",
    "415": "the content is of another type",
    "422": "a value is wrong; the error says which, and what to pass",
    "429": "too many requests a minute",
    "503": "too many queries wait; Retry-After says for how many seconds to wait",
}

STYLE = """
body {font: 16px/1.5 system-ui, sans-serif; max-width: 56em; margin: 2em auto; padding: 0 1em}
code, pre {font: 14px/1.5 ui-monospace, monospace; background: #f3f4f6} pre {padding: 1em; overflow-x: auto}
td {padding: 0 1em 0 0; vertical-align: top} p {white-space: pre-line}
"""


def described(path: str) -> dict[str, Any]:
    """Return what OpenAPI says about the requests and refusals of a path."""
    content = {kind: {"schema": schema} for kind, schema in CONTENTS[path].items()}
    error = {"type": "object", "properties": {"error": {"type": "string"}}}
    refusals = {
        status: {"description": about, "content": {"application/json": {"schema": error}}}
        for status, about in REFUSALS.items()
    }
    return {"requestBody": {"required": True, "content": content}, "responses": refusals}


def api_page(openapi: dict[str, Any]) -> str:
    """Render a description of an interface as HTML."""
    about = openapi["info"]
    parts = [f"<h1>{html.escape(about['title'])}</h1><p>{html.escape(about['description'])}</p>"]
    for path, methods in openapi["paths"].items():
        for method, one in methods.items():
            parts.append(f"<h2><code>{method.upper()} {path}</code></h2><p>{html.escape(one['description'])}</p>")
            for kind, content in one.get("requestBody", {}).get("content", {}).items():
                parts.append(_body(kind, content["schema"]))
    refusals = _table({status: f"{about}" for status, about in REFUSALS.items()})
    parts.append(f'<h2>Refusals</h2><p>Each comes with {{"error": "a sentence"}}.</p>{refusals}')
    parts.append('<p>The same for programs: <a href="/openapi.json">/openapi.json</a></p>')
    style = f"<meta charset=utf-8><title>{html.escape(about['title'])}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{style}</head><body>{''.join(parts)}</body></html>"


def _body(kind: str, schema: dict[str, Any]) -> str:
    keys = {key: one.get("description", "") for key, one in schema["properties"].items()}
    example = (
        f"<pre>{html.escape(str(schema['example']).replace(chr(39), chr(34)))}</pre>" if "example" in schema else ""
    )
    return f"<h3><code>{kind}</code></h3>{_table(keys)}{example}"


def _table(rows: dict[str, str]) -> str:
    cells = (f"<tr><td><code>{html.escape(key)}</code><td>{html.escape(text)}" for key, text in rows.items())
    return f"<table>{''.join(cells)}</table>"


__all__ = ["api_page", "described"]
