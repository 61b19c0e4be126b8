# SPDX-License-Identifier: Apache-2.0
"""The reference of the configuration, from the source of its dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

from multilora_backend.config import Config


def config_reference() -> str:
    """Every field of Config as a Markdown table, in Config's order; the field's docstring is its description."""
    documentation = _field_docs()
    types = get_type_hints(Config)
    rows = ["| name | type | default | what it does |", "|---|---|---|---|"]
    for field in dataclasses.fields(Config):
        text = documentation.get(field.name, "")
        rows.append(f"| `{field.name}` | {_type_name(types[field.name])} | {_value(field.default)} | {text} |")
    return "\n".join(rows)


def _field_docs() -> dict[str, str]:
    """The strings below Config's fields, as one line each: Python keeps them in the source only."""
    (definition,) = ast.parse(inspect.getsource(Config)).body
    assert isinstance(definition, ast.ClassDef)  # what getsource gives for a class
    docs = {}
    for field, following in zip(definition.body, definition.body[1:], strict=False):
        match field, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                docs[name] = " ".join(text.split()).replace("|", "\\|")
    return docs


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    return str(kind.__name__)


def _value(default: Any) -> str:
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return "empty" if default == "" else f"`{default}`"
