"""How many sequences a worker takes in, and how many of them from one tenant. Pure."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from tandem_worker.errors import RequestError


class Places:
    """Sequences that are computed or wait, from a request's admission to its end.

    Args:
        slots: So many are computed at once.
        waiting: So many more may wait.
    """

    def __init__(self, slots: int, waiting: int) -> None:
        self._slots = slots
        self._waiting = waiting
        self.num_taken = 0
        self.of_tenant: Counter[str] = Counter()

    @contextmanager
    def hold(self, tenant: str, num_sequences: int) -> Iterator[None]:
        """Places for one request.

        Beside the slots a tenant may take as many places as it leaves free (a dynamic threshold,
        Choudhury and Hahne 1998): one that floods fills half of the queue and never all of it.

        Raises:
            RequestError: 429, there are not so many.
        """
        left = self._slots + self._waiting - self.num_taken - num_sequences
        waiting = max(0, self.num_taken - self._slots)
        if self.num_taken and left < 0:
            raise _full(f"{waiting} requests wait already, {self._waiting} may")
        own = self.of_tenant[tenant]
        if tenant and own and own + num_sequences - self._slots > left:
            raise _full(f"{own} of your requests are here already, and others need a place, too")
        self.num_taken += num_sequences
        self.of_tenant[tenant] += num_sequences
        try:
            yield
        finally:
            self.num_taken -= num_sequences
            self.of_tenant[tenant] -= num_sequences
            if not self.of_tenant[tenant]:
                del self.of_tenant[tenant]


def _full(why: str) -> RequestError:
    return RequestError(
        f"{why}; try again later",
        status=429,
        type="rate_limit_error",
        code="queue_full",
        headers={"retry-after": "1"},
    )


class FairGate:
    """Lets few pass at once, tenants in rounds: one that floods waits behind itself.

    Args:
        most: So many pass at once.
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for one's turn, and pass the gate on at the end."""
        if self._free and not self._lines:
            self._free -= 1
        else:
            ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._lines.setdefault(tenant, deque()).append(ticket)
            try:
                await ticket
            except asyncio.CancelledError:
                if ticket.done() and not ticket.cancelled():
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        """To the next tenant's first, who then goes behind the other tenants."""
        while self._lines:
            tenant, line = next(iter(self._lines.items()))
            ticket = line.popleft()
            del self._lines[tenant]
            if line:
                self._lines[tenant] = line
            if not ticket.done():
                ticket.set_result(None)
                return
        self._free += 1
