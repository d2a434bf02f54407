"""How many requests under way begin alike, and what another copy of their beginning then costs.

A prefix that one request loses is computed again for that request alone. One that many have in
common is computed once on another worker and serves all of them there, so that each pays a part:
tokens / (1 + requests under way per copy). The busier the workers that hold it, the cheaper one
more copy, and each copy that has begun makes the next one dearer: a hot prefix spreads over as
many workers as its requests need, not at once over all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Of a chain every so many blocks are counted: at 256 bytes a block, every 512 tokens.
STRIDE = 8


class SharedPrefixes:
    """The beginnings of the requests under way at one tier; pure, and bounded by their number."""

    def __init__(self) -> None:
        self._under_way: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def began(self, chain: Sequence[int]) -> None:
        under_way = self._under_way
        for block in chain[STRIDE - 1 :: STRIDE]:
            under_way[block] = under_way.get(block, 0) + 1

    def ended(self, chain: Sequence[int]) -> None:
        under_way = self._under_way
        for block in chain[STRIDE - 1 :: STRIDE]:
            left = under_way.get(block, 0) - 1
            if left > 0:
                under_way[block] = left
            else:
                under_way.pop(block, None)

    def worth(
        self, chain: Sequence[int], num_blocks: int, num_copies: Callable[[int], int]
    ) -> Callable[[int], float]:
        """What the first n blocks of a chain are worth to one request, in blocks, by n.

        num_blocks: the most that is asked for. num_copies: how many workers hold a block.
        """
        under_way = self._under_way
        if num_blocks < STRIDE or chain[STRIDE - 1] not in under_way:
            return float
        shares, sums = [], [0.0]
        before, share = 0, 1.0
        for place in range(STRIDE - 1, num_blocks, STRIDE):
            number = under_way.get(chain[place], 0)
            if number != before:
                before, share = number, 1.0 / (1.0 + number / max(1, num_copies(chain[place])))
            shares.append(share)
            sums.append(sums[-1] + STRIDE * share)
        shares.append(1.0)  # blocks after the last one that is counted

        def of(covered: int) -> float:
            whole, rest = divmod(min(covered, num_blocks), STRIDE)
            return sums[whole] + rest * shares[whole]

        return of
