"""A model directory's tokenizer and chat template, without transformers.

Importing transformers costs seconds; ``tokenizers`` and a sandboxed jinja2 are what it uses here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from tandem_worker.errors import ModelError, RequestError
from tandem_worker.models.files import (
    MAX_TOKENIZER_BYTES,
    TOKENIZER,
    locate,
    read_json,
    read_text,
)


class Tokenizer:
    """Text to ids and back, and messages to a prompt.

    Args:
        directory: Holds ``tokenizer.json``, ``tokenizer_config.json`` and perhaps
            ``chat_template.jinja``.

    Raises:
        ModelError: the tokenizer is absent or unreadable.
    """

    def __init__(self, directory: Path) -> None:
        path = locate(directory, TOKENIZER)
        if path is None:
            raise ModelError(
                f"{directory / TOKENIZER} is missing; save the tokenizer in its fast form "
                "(transformers: tokenizer.save_pretrained)"
            )
        try:
            self._tokenizer = FastTokenizer.from_str(read_text(path, MAX_TOKENIZER_BYTES))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} cannot be loaded: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config_path = locate(directory, "tokenizer_config.json")
        config = {} if config_path is None else read_json(config_path)
        self._special = {
            name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")
        }
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        eos = self._special["eos_token"]
        eos_id = self._tokenizer.token_to_id(eos) if eos else None
        self.eos_token_ids = frozenset() if eos_id is None else frozenset([int(eos_id)])
        self._template = _compile(_template_source(directory, config))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            RequestError: the text is no Unicode (a lone surrogate).
        """
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise RequestError(
                "the text holds a lone surrogate such as \\ud800; send valid Unicode",
                param="prompt",
            ) from error
        ids: list[int] = encoded.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """One token's text on its own, special tokens included."""
        return self.decode([token_id], skip_special_tokens=False)

    def render_chat(self, messages: Sequence[dict[str, Any]], /, **variables: Any) -> str:
        """The prompt that the chat template makes of messages.

        Raises:
            RequestError: the model has no template, or the template refuses the messages.
        """
        if self._template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions instead",
                param="messages",
                code="no_chat_template",
            )
        values = {k: v for k, v in self._special.items() if v is not None}
        values |= {"add_generation_prompt": True, "tools": None, "documents": None} | variables
        try:
            return str(self._template.render(messages=list(messages), **values))
        except TemplateError as error:
            raise RequestError(
                f"the chat template refuses the messages: {error}", param="messages"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RequestError(
                f"the chat template fails on the messages: {type(error).__name__}: {error}",
                param="messages",
            ) from error


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_source(directory: Path, config: dict[str, Any]) -> str | None:
    path = locate(directory, "chat_template.jinja")
    if path is not None:
        return read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {item.get("name"): item.get("template") for item in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _compile(source: str | None) -> Any:
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ModelError(f"the chat template cannot be compiled: {error}") from error
