"""A model directory's tokenizer and chat template, without transformers.

Importing transformers costs seconds; ``tokenizers`` and jinja2 are what it uses here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llguidance import LLTokenizer
from tokenizers import Tokenizer as FastTokenizer

from tandem_worker.dialects.formats import Dialect
from tandem_worker.errors import ModelError, RequestError
from tandem_worker.models.files import (
    MAX_TOKENIZER_BYTES,
    TOKENIZER,
    locate,
    read_json,
    read_text,
)
from tandem_worker.tokenization import bounds
from tandem_worker.tokenization.chat_template import ChatTemplate
from tandem_worker.tokenization.plain_text import MARK, PlainText, is_control

# A batch is one text here: no pool of threads for it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MAX_DEPTH = 200
"""Of messages and schemas; what walks through them calls itself."""


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
        text = read_text(path, MAX_TOKENIZER_BYTES)
        self.most_chars_per_token = bounds.check(text, path)
        """None where nothing bounds them."""
        try:
            self._tokenizer = FastTokenizer.from_str(text)
        except BaseException as error:  # the library raises bare Exception, and panics
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
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
        templates = _templates(directory, config)
        source = templates.get("tool_use", templates.get("default"))
        self._bytes: LLTokenizer | None = None
        self._templates = {name: ChatTemplate(text) for name, text in templates.items()}
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token.content: int(token_id) for token_id, token in added.items()}
        self.dialect = Dialect.of(source, self._added.get)
        control = {t.content for t in added.values() if is_control(t.content, special=t.special)}
        self._plain = PlainText(control)
        self._special_ids = frozenset(int(i) for i, token in added.items() if token.special)
        thought = self.dialect.thought
        tags = set() if thought is None else {thought.begin, thought.end}
        self._plain_answer = PlainText(control - tags)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: Any.
            add_special_tokens: Put those around it that the tokenizer puts around a text.
            parse_special_tokens: Take spellings of control tokens for these.

        Raises:
            RequestError: the text is no Unicode (a lone surrogate).
        """
        if not parse_special_tokens:
            text = self._plain.marked(text)
        return self.encode_marked(text, add_special_tokens=add_special_tokens)

    def encode_marked(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text whose marks break spellings that are no control tokens.

        Raises:
            RequestError: the text is no Unicode (a lone surrogate).
        """
        parts = text.split(MARK)
        try:
            # Of the library's ways the one for many texts alone lets other threads run meanwhile.
            (encoded,) = self._tokenizer.encode_batch_fast(
                [text if len(parts) == 1 else parts],
                is_pretokenized=len(parts) > 1,
                add_special_tokens=add_special_tokens,
            )
        except TypeError as error:
            raise RequestError(
                "the text holds a lone surrogate such as \\ud800; send valid Unicode",
                param="prompt",
            ) from error
        except BaseException as error:  # a pattern of the file that gives up on this text panics
            if not _is_panic(error):
                raise
            raise RequestError(
                "the model's tokenizer gives up on this text; send another one", param="prompt"
            ) from error
        ids: list[int] = encoded.ids
        return ids

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        keep: Mapping[int, str] = MappingProxyType({}),
    ) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            token_ids: Any.
            skip_special_tokens: Leave special tokens out.
            keep: Texts of special tokens that are not left out.
        """
        ids = list(token_ids)
        kept = [at for at, token in enumerate(ids) if token in keep] if skip_special_tokens else []
        texts, begin = [], 0
        for at in kept:
            texts += [self.decode(ids[begin:at]), keep[ids[at]]]
            begin = at + 1
        text: str = self._tokenizer.decode(ids[begin:], skip_special_tokens=skip_special_tokens)
        return "".join([*texts, text])

    def whole_text(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids without a character that they only begin: its rest comes next."""
        text = self.decode(token_ids, skip_special_tokens=skip_special_tokens)
        kept = text.rstrip("\ufffd")
        return text[: max(len(kept), len(text) - 3)]

    def added_token_id(self, text: str) -> int | None:
        """The token that an added text is, or None where it is spelled with others."""
        return self._added.get(text)

    def to_json(self) -> str:
        """The tokenizer as ``tokenizer.json`` holds it."""
        text: str = self._tokenizer.to_str()
        return text

    def token_text(self, token_id: int) -> str:
        """One token's text on its own, special tokens included; ``bytes:\\xf0`` of a part."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def is_special(self, token_id: int) -> bool:
        """Whether a text usually leaves this token out."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """One token's bytes, which may be a part of a character; its text where that is unknown."""
        if self._bytes is None:
            self._bytes = LLTokenizer(self.to_json())
        if token_id >= self.vocab_size:
            return b""
        return bytes(self._bytes.decode_bytes([token_id]))

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        /,
        *,
        parse_special_tokens: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt that the chat template makes of messages, for :meth:`encode_marked`.

        Raises:
            RequestError: the model has no template, the template refuses the messages, or they
                are nested too deeply.
        """
        if _is_deeper([*messages, variables], MAX_DEPTH):
            raise RequestError(
                f"messages and tools may be nested {MAX_DEPTH} deep; make them flatter",
                param="messages",
            )
        template = self._templates.get("default")
        if variables.get("tools"):
            template = self._templates.get("tool_use", template)
        if template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions instead",
                param="messages",
                code="no_chat_template",
            )
        if not parse_special_tokens:
            messages = [self._marked(message) for message in messages]
            variables = self._plain.marked_all(variables)
        values = {k: v for k, v in self._special.items() if v is not None}
        values |= {"add_generation_prompt": True, "tools": None, "documents": None} | variables
        return template.render({"messages": list(messages), **values})

    def _marked(self, message: dict[str, Any]) -> dict[str, Any]:
        # Templates look for the tags of a thought in earlier answers.
        plain = self._plain_answer if message.get("role") == "assistant" else self._plain
        marked: dict[str, Any] = plain.marked_all(message)
        return marked


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie more than so many deep in one another."""
    if not isinstance(value, list | dict):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name; ``tool_use``, where there is one, is for requests with tools."""
    path = locate(directory, "chat_template.jinja")
    template = read_text(path) if path is not None else config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {item.get("name"): item.get("template") for item in template}
        return {name: named[name] for name in ("default", "tool_use") if _is_text(named, name)}
    return {"default": template} if isinstance(template, str) else {}


def _is_panic(error: BaseException) -> bool:
    """Of the library's Rust, which is no Exception and has no class to import."""
    return type(error).__name__ == "PanicException"


def _is_text(named: Mapping[Any, Any], name: str) -> bool:
    return isinstance(named.get(name), str)
