# SPDX-License-Identifier: Apache-2.0
"""Chat messages to a prompt, through the model's own jinja2 template, with what transformers offers to templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.frontend.tensors import shown


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks an assistant's text for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

    def parse(self, parser: Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """A compiled template, or the reason why there is none, which a chat request gets as its error."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._template = None
        self._missing = "the model has no chat template; send text_input"
        if source is None:
            return
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            self._missing = f"the model's chat template does not compile: {error}"

    def render(self, messages: object) -> str:
        """The prompt up to where the assistant's answer begins. Raises MultiloraError that names `messages`."""
        checked = _checked(messages)
        if self._template is None:
            raise MultiloraError(ErrorCode.UNSUPPORTED, f"messages: {self._missing}")
        try:
            return self._template.render(
                messages=checked, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # the template is the model author's program: it may raise anything
            raise invalid("messages", f"the chat template refuses them: {error}") from error


def _checked(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", f"must be a list of one or more messages, got {shown(messages)}")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(i: int, message: object) -> dict[str, Any]:
    where = f"message {i}"
    if not isinstance(message, dict):
        raise invalid("messages", f"{where} must be an object with role and content, got {shown(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise invalid("messages", f"{where}: role must be a non-empty string, got {shown(role)}")
    if isinstance(content, list):
        # Most templates know strings only, so text parts are joined (by a newline, as vLLM does).
        return {**message, "content": "\n".join(_part(where, part) for part in content)}
    if not isinstance(content, str):
        raise invalid("messages", f"{where}: content must be a string or a list of text parts, got {shown(content)}")
    return message


def _part(where: str, part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
        raise MultiloraError(
            ErrorCode.UNSUPPORTED, f"messages: {where}: content of type {shown(part['type'])} is not supported"
        )
    raise invalid("messages", f'{where}: a content part must be {{"type": "text", "text": ...}}, got {shown(part)}')


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which would end up in prompts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
