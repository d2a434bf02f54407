"""How many tokens a body's prompt may be, without a tokenizer: text by its bytes, images as images.

The estimate is replaced by the reply's usage; until then it prices and picks.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from typing import Any

BYTES_PER_TOKEN = 4.0
# Code and most scripts stay above this; what a ceiling has to reckon with.
FEWEST_BYTES_PER_TOKEN = 2.0
# An image is read as tiles of 512 pixels after it is scaled to 768 on its short side: the rule of
# the commonest provider (platform.openai.com, "Calculating costs").
IMAGE_BASE_TOKENS, IMAGE_TILE_TOKENS = 85, 170
UNKNOWN_IMAGE_TOKENS = IMAGE_BASE_TOKENS + 4 * IMAGE_TILE_TOKENS


def prompt_tokens(num_bytes: int, fields: Mapping[str, Any]) -> tuple[int, int]:
    """(expected, most) tokens of a prompt whose body has `num_bytes` bytes."""
    messages = fields.get("messages")
    if not messages and num_bytes > 0:
        return int(num_bytes / BYTES_PER_TOKEN) or 1, math.ceil(num_bytes / FEWEST_BYTES_PER_TOKEN)
    num_image_tokens = 0
    for url, detail in images_of(messages) if messages else ():
        num_bytes -= len(url)
        num_image_tokens += image_tokens(url, detail)
    text = max(0, num_bytes)
    return (
        max(1, int(text / BYTES_PER_TOKEN) + num_image_tokens),
        max(1, math.ceil(text / FEWEST_BYTES_PER_TOKEN) + num_image_tokens),
    )


def images_of(messages: Any) -> Iterator[tuple[str, Any]]:
    """(URL, detail) of each image of a chat."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            image = part.get("image_url") if isinstance(part, dict) else None
            if isinstance(image, dict) and isinstance(image.get("url"), str):
                yield image["url"], image.get("detail")
            elif isinstance(image, str):
                yield image, part.get("detail")


def image_tokens(url: str, detail: Any = None) -> int:
    """Tokens of one image: by its size where the URL holds the image, else of a large one."""
    if detail == "low":
        return IMAGE_BASE_TOKENS
    size = _size_of(url)
    if size is None:
        return UNKNOWN_IMAGE_TOKENS
    width, height = size
    shrink = min(1.0, 2048 / max(width, height))
    width, height = width * shrink, height * shrink
    shrink = min(1.0, 768 / min(width, height))
    tiles = math.ceil(width * shrink / 512) * math.ceil(height * shrink / 512)
    return IMAGE_BASE_TOKENS + tiles * IMAGE_TILE_TOKENS


def _size_of(url: str) -> tuple[float, float] | None:
    """Width and height in pixels of a PNG, GIF or JPEG in a data URL; None if it is not plain."""
    if not url.startswith("data:"):
        return None
    start = url.find(";base64,")
    if start < 0:
        return None
    encoded = url[start + 8 : start + 8 + 65_536]
    try:
        data = base64.b64decode(encoded[: len(encoded) // 4 * 4])
    except (binascii.Error, ValueError):
        return None
    size = None
    if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) >= 24:
        size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif data.startswith((b"GIF87a", b"GIF89a")) and len(data) >= 10:
        size = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    elif data.startswith(b"\xff\xd8"):
        size = _jpeg_size(data)
    return size if size is not None and min(size) > 0 else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Walks the segments up to the frame header (ITU T.81, B.2.2)."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            return int.from_bytes(data[at + 7 : at + 9], "big"), height
        at += 2 + length
    return None
