"""What of a sequence's prefix is cached already, and what becomes known to the cache. Pure."""

from __future__ import annotations

from tandem_worker.scheduling.kv_blocks import ROOT, BlockManager, hash_block
from tandem_worker.scheduling.sequence import Sequence


def cached_blocks(blocks: BlockManager, sequence: Sequence) -> list[int]:
    """Cached blocks of the sequence's prefix; always leaves one token to compute."""
    if not sequence.reuse_prefix or not blocks.prefix_cache:
        return []
    _extend_hashes(sequence, len(sequence.token_ids), blocks.block_size)
    limit = (len(sequence.token_ids) - 1) // blocks.block_size
    return blocks.lookup(sequence.hashes[:limit])


def publish(blocks: BlockManager, sequence: Sequence) -> None:
    """Make blocks that became full known to the prefix cache."""
    if not blocks.prefix_cache:
        return
    num_full = sequence.num_computed_tokens // blocks.block_size
    if num_full <= sequence.num_published:
        return
    _extend_hashes(sequence, num_full * blocks.block_size, blocks.block_size)
    for index in range(sequence.num_published, num_full):
        parent = sequence.hashes[index - 1] if index else ROOT
        blocks.publish(sequence.block_ids[index], sequence.hashes[index], parent, sequence.tenant)
    sequence.num_published = num_full


def _extend_hashes(sequence: Sequence, num_tokens: int, size: int) -> None:
    while (len(sequence.hashes) + 1) * size <= num_tokens:
        index = len(sequence.hashes)
        parent = sequence.hashes[-1] if index else ROOT
        tokens = sequence.token_ids[index * size : (index + 1) * size]
        sequence.hashes.append(hash_block(parent, tokens, sequence.salt))
