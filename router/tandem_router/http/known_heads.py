"""What a request's head said when it was read before: clients send the same one again and again.

A head that differs from one already read in nothing but the digits of its `content-length`, with
exactly so much body behind it, is the same request with another body, and costs no second reading.
What is anything else (a new head, a body still on its way, a pipelined request) goes through the
parser. A head is kept once it has come twice, so that those with a value of their own in every
request push nothing out.
"""

from __future__ import annotations

from typing import Any

MOST_BYTES = 4096  # of a head
MOST_KEPT = 256
MOST_SEEN_ONCE = 4096
MOST_DIGITS = 9
_ENDS = b"\r\n\r\n"
# Heads that mean something for the connection, or that another application answers.
_NEVER = frozenset(
    {
        b"expect",
        b"http2-settings",
        b"transfer-encoding",
        b"upgrade",
        b"x-forwarded-for",
        b"x-forwarded-proto",
    }
)


class Head:
    """One head as it was read. reading: what the application made of it, the server's not."""

    __slots__ = (
        "_after",
        "_at",
        "_before",
        "_digits_at",
        "headers",
        "keep_alive",
        "names",
        "reading",
        "scope",
    )

    def __init__(
        self,
        scope: dict[str, Any],
        headers: list[tuple[bytes, bytes]],
        names: dict[bytes, bytes],
        keep_alive: bool,
        data: bytes,
    ) -> None:
        """data: a request with it."""
        end = data.find(_ENDS) + 4
        at = _length_at(data, end)
        self._before, self._after = data[:at], data[data.find(b"\r", at) : end]
        self._digits_at = at
        self.scope = scope  # without what belongs to one request or connection
        self.headers = headers
        self.names = names
        self.keep_alive = keep_alive
        self.reading: Any = None
        self._at = list(names).index(b"content-length")

    def body_in(self, data: bytes) -> bytes | None:
        """The body, where `data` is one whole request with this head."""
        if not data.startswith(self._before):
            return None
        after, at = self._after, self._digits_at
        stop = data.find(b"\r", at, at + MOST_DIGITS + 1)
        if stop < 0 or not data.startswith(after, stop):
            return None
        digits, body = data[at:stop], data[stop + len(after) :]
        return body if digits.isdigit() and int(digits) == len(body) else None

    def headers_with(self, num_bytes: int) -> list[tuple[bytes, bytes]]:
        """The headers of a request with so long a body."""
        headers = self.headers.copy()
        headers[self._at] = (b"content-length", b"%d" % num_bytes)
        return headers


class KnownHeads:
    """The heads that came at least twice to one listener; bounded."""

    def __init__(self) -> None:
        self._heads: dict[bytes, Head] = {}
        self._seen_once: set[int] = set()

    def __len__(self) -> int:
        return len(self._heads)

    def find(self, data: bytes) -> tuple[Head, bytes] | None:
        """(head, body) where `data` is one whole request whose head is known."""
        split = _split(data)
        if split is None:
            return None
        head = self._heads.get(split[0])
        return None if head is None else (head, data[split[1] :])

    def remember(
        self,
        data: bytes,
        scope: dict[str, Any],
        headers: list[tuple[bytes, bytes]],
        names: dict[bytes, bytes],
        keep_alive: bool,
    ) -> None:
        """Keep what was read of `data`, one whole request, where its like may come again."""
        split = _split(data)
        if split is None or len(names) != len(headers) or b"content-length" not in names:
            return
        if scope["http_version"] != "1.1" or not _NEVER.isdisjoint(names):
            return
        key = split[0]
        mark = hash(key)
        if mark not in self._seen_once:
            if len(self._seen_once) >= MOST_SEEN_ONCE:
                self._seen_once.clear()
            self._seen_once.add(mark)
            return
        heads = self._heads
        if len(heads) >= MOST_KEPT:
            del heads[next(iter(heads))]
        own = ("client", "extensions", "headers", "scheme", "server", "state")
        kept = {name: value for name, value in scope.items() if name not in own}
        heads[key] = Head(kept, headers, names, keep_alive, data)


def _length_at(data: bytes, end: int) -> int:
    """Where the digits of the length begin; less than 15 where there are none."""
    at = data.find(b"ontent-length: ", 0, end)
    if at < 0:
        at = data.find(b"ontent-Length: ", 0, end)
    return at + 15


def _split(data: bytes) -> tuple[bytes, int] | None:
    """(head without the length's digits, where its body begins); None for anything unusual.

    Only the first header whose name ends so is looked at: where it is another one than
    content-length the head is unusual, and of two lengths the parser refuses the request.
    """
    end = data.find(_ENDS, 0, MOST_BYTES)
    at = _length_at(data, end)
    if end < 0 or at < 18 or data[at - 18 : at - 15] not in (b"\r\nc", b"\r\nC"):
        return None
    stop = data.find(b"\r", at, end + 1)
    digits = data[at:stop]
    body_at = end + 4
    if not digits.isdigit() or len(digits) > MOST_DIGITS or int(digits) != len(data) - body_at:
        return None
    return data[:at] + data[stop:end], body_at
