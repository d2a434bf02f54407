"""Small pools, a final state and the two sides of a transfer, for the tests beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tandem_worker.transfer import FinalState, KVLayout, KVPool
from tandem_worker.transfer.interface import KVReceiver, KVSender

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, block_size=64, head_dim=4, dtype="float32")
FINAL = FinalState(
    first_token=7,
    num_tokens=130,
    logprob=-0.5,
    top_logprobs=((7, -0.5), (9, -1.25)),
    sampler_state=b"\x01\x02",
)


def random_pool(num_blocks: int, layout: KVLayout = LAYOUT, seed: int = 0) -> KVPool:
    pool = KVPool.allocate(layout, num_blocks)
    generator = torch.Generator().manual_seed(seed)
    for layer in range(layout.num_layers):
        for block in range(num_blocks):
            data = torch.randint(0, 256, (layout.unit_bytes,), generator=generator)
            pool.put_bytes(layer, [block], bytes(data.tolist()))
    return pool


def soon(seconds: float = 20.0) -> float:
    """A deadline that only a hanging test reaches."""
    return time.monotonic() + seconds


@dataclass
class Pair:
    """A prefill worker's pool and sender, a decode worker's pool and receiver."""

    transport: str
    source: KVPool
    target: KVPool
    sender: KVSender
    receiver: KVReceiver
    make_sender: Callable[..., KVSender]

    async def push_all(self, push: object, local: list[int], remote: list[int]) -> None:
        for layer in reversed(range(LAYOUT.num_layers)):
            await push.layer_blocks(layer, local, remote)  # type: ignore[attr-defined]

    def same_bytes(self, local: list[int], remote: list[int]) -> bool:
        return all(
            self.source.get_bytes(layer, local) == self.target.get_bytes(layer, remote)
            for layer in range(LAYOUT.num_layers)
        )
