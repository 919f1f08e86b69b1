"""Cost of the cache's books alone, without a model: 256 sequences that decode, and one long prompt.

python benchmarks/cache_books.py [--sequences 256] [--block-size 16]
"""

from __future__ import annotations

import argparse
import random
import time

from qnext.engine.cache import CacheManager

PROMPT, STEPS, LONG = 1000, 320, 262_144


class NoTensors:
    """Moves nothing."""

    block_nbytes = slot_nbytes = 0

    def _nothing(self, *_):
        pass

    copy_block = copy_slot = reset_slot = zero_blocks = write_block = write_slot = _nothing


def cache(num_blocks, block_size):
    return CacheManager(
        NoTensors(),
        num_blocks=num_blocks,
        block_size=block_size,
        num_slots=1024,
        needs_state=True,
        enable_prefix_caching=True,
        fingerprint=b"",
    )


def decode(sequences, block_size):
    """Milliseconds of CPU per step; lengths differ, so that some cross a block in every step."""
    books = cache(sequences * (PROMPT + STEPS + 64) // block_size, block_size)
    tokens = [[n] * (PROMPT + n % block_size) for n in range(sequences)]
    for n, ids in enumerate(tokens):
        books.begin(n, ids)
        books.reserve(n, len(ids))
        books.commit(n, len(ids))
    found = []
    for step in range(STEPS):
        for ids in tokens:
            ids.append(step)
        lengths = [len(ids) for ids in tokens]
        began = time.process_time()
        for n, length in enumerate(lengths):
            books.reserve(n, length)
        for n, length in enumerate(lengths):
            books.commit(n, length)
        found.append(1e3 * (time.process_time() - began))
    positions = {n: len(ids) for n, ids in enumerate(tokens)}
    began = time.process_time()
    books.check(positions, full=False)
    print(f"cheap check: {1e3 * (time.process_time() - began):.2f} ms")
    began = time.process_time()
    books.check(positions)
    nodes = len(books.memory.index.nodes)
    print(f"full check: {1e3 * (time.process_time() - began):.1f} ms, {nodes} known blocks")
    return found


def long_prompt(block_size):
    books = cache(2 * LONG // block_size, block_size)
    ids = [random.randrange(150_000) for _ in range(LONG)]
    for seq in range(2):
        began = time.process_time()
        cached = books.begin(seq, ids)
        took = 1e3 * (time.process_time() - began)
        books.reserve(seq, LONG)
        began = time.process_time()
        for start in range(cached, LONG, 8192):
            books.plan_saves(seq, start, start + 8192)
            books.commit(seq, start + 8192)
        rest = 1e3 * (time.process_time() - began)
        print(f"{LONG} tokens, {cached} cached: begin {took:.1f} ms, pieces {rest:.1f} ms")


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--sequences", type=int, default=256)
    options.add_argument("--block-size", type=int, default=16)
    given = options.parse_args()
    found = sorted(decode(given.sequences, given.block_size))
    mean = sum(found) / len(found)
    print(f"{given.sequences} sequences, blocks of {given.block_size}, CPU ms of a decode step:")
    print(f"mean {mean:.3f}, median {found[len(found) // 2]:.3f}, worst {found[-1]:.3f}")
    long_prompt(given.block_size)


if __name__ == "__main__":
    main()
