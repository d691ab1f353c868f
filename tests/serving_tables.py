"""The tables of docs/serving.md, from the server's own list: `python tests/serving_tables.py` writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tritium.server import openapi, protocol

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- fields: begin -->\n", "<!-- fields: end -->\n"


def documented(text: str) -> str:
    """The document with the tables as they must be."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}{tables()}\n{end}{after}"


def tables() -> str:
    """Every endpoint and field, as Markdown."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "| endpoint | |"
    yield "|---|---|"
    for endpoint in openapi.ENDPOINTS:
        yield f"| `{endpoint.method} {endpoint.path}` | {endpoint.about} |"
    components = openapi.document()["components"]["schemas"]
    for endpoint in openapi.ENDPOINTS:
        for model in endpoint.request:
            schema = components[model.__name__]
            yield f"\n**`{endpoint.path}`**" + (f" ({model.__name__})" if len(endpoint.request) > 1 else "") + "\n"
            yield "| field | type | |"
            yield "|---|---|---|"
            for name, field in schema["properties"].items():
                required = "required. " if name in schema.get("required", ()) else ""
                about = " ".join((required + field.get("description", "")).split())
                yield f"| `{name}` | {_type(field, components)} | {about} |".replace("|  |", "| |")
            if refused := sorted(protocol.UNSUPPORTED.get(model, ())):
                yield f"\nKnown, and refused unless null or harmless: {', '.join(f'`{name}`' for name in refused)}."


def _type(field: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        kinds = [_type(option, schemas) for option in field["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds)) or "null"
    if "$ref" in field:
        inner = schemas[field["$ref"].rpartition("/")[2]]
        return "{" + ", ".join(inner["properties"]) + "}"
    if "const" in field or "enum" in field:
        return " or ".join(f"`{value!r}`".replace("'", "\"") for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), schemas)}"
    return str(field.get("type", "any"))


if __name__ == "__main__":
    DOCUMENT.write_text(documented(DOCUMENT.read_text()))
