"""Memory that remembers what was written, and a pretended model that checks all it reads.

A row of a block and the state in a slot are the whole prefix they depend on, so that any mix-up of
blocks, slots, positions, salts or sequences is a wrong value and not only a wrong number.
"""

from __future__ import annotations

import torch

from qnext.engine.cache import CacheManager

NAN = ("nan",)


class FakeTensors:
    """CacheTensors over Python tuples; host copies hold them as bytes in a tensor."""

    block_nbytes, slot_nbytes = 100, 1000

    def __init__(self, num_blocks, block_size, num_slots):
        self.rows = [[("never",)] * block_size for _ in range(num_blocks)]
        self.states = [("never",)] * num_slots

    def copy_block(self, src, dst):
        self.rows[dst] = list(self.rows[src])

    def copy_slot(self, src, dst):
        self.states[dst] = self.states[src]

    def reset_slot(self, slot):
        self.states[slot] = ()

    def zero_blocks(self, blocks):
        for block in blocks:
            self.rows[block] = [("zero",)] * len(self.rows[block])

    def read_block(self, block):
        return pack(self.rows[block])

    def write_block(self, block, tensors):
        self.rows[block] = unpack(tensors)

    def read_slot(self, slot):
        return pack(self.states[slot])

    def write_slot(self, slot, tensors):
        self.states[slot] = unpack(tensors)


def pack(value):
    return {"value": torch.frombuffer(bytearray(repr(value).encode()), dtype=torch.uint8)}


def unpack(tensors):
    return eval(bytes(tensors["value"].tolist()).decode())


class World:
    """A cache with the pretended model that uses it."""

    def __init__(self, num_blocks=16, block_size=4, num_slots=8, tensors=None, **options):
        options = {
            "needs_state": True,
            "enable_prefix_caching": True,
            "fingerprint": b"weights",
            **options,
        }
        self.size = block_size
        self.tensors = tensors or FakeTensors(num_blocks, block_size, num_slots)
        self.cache = CacheManager(
            self.tensors,
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=num_slots,
            **options,
        )
        self.tokens: dict[int, list[int]] = {}
        self.salts: dict[int, bytes] = {}
        self.poisoned: set[int] = set()
        self.next_id = 0

    def add(self, tokens, salt=b"", max_cached=None):
        """Seat a sequence; its id and cached tokens, or None."""
        seq = self.next_id
        tokens = list(tokens)
        cached = self.cache.begin(seq, tokens, salt=salt, max_cached=max_cached)
        if cached is None:
            return None
        self.next_id += 1
        self.tokens[seq], self.salts[seq] = tokens, salt
        limit = len(tokens) if max_cached is None else max_cached
        assert 0 <= cached <= limit
        table = self.cache.block_table(seq)
        rows = [self.tensors.rows[table[r // self.size]][r % self.size] for r in range(cached)]
        if NAN in (self.tensors.states[self.cache.slot(seq)], *rows):
            assert self.poisoned, "the values of a discarded sequence are back"
            self.poisoned.add(seq)
        self.look(seq)
        return seq, cached

    def prefix(self, seq, length):
        if seq in self.poisoned:
            return NAN
        return (self.salts[seq], *self.tokens[seq][:length]) if length else ()

    def look(self, seq):
        """Everything the sequence would read is what it thinks."""
        position = self.cache.position(seq)
        if seq in self.poisoned:
            return
        table = self.cache.block_table(seq)
        if self.cache.needs_state:
            assert self.tensors.states[self.cache.slot(seq)] == self.prefix(seq, position)
        for row in range(position):
            found = self.tensors.rows[table[row // self.size]][row % self.size]
            assert found == self.prefix(seq, row + 1), f"row {row} of sequence {seq}"

    def write(self, seq, start, stop, value=None):
        table = self.cache.block_table(seq)
        for row in range(start, stop):
            block = table[row // self.size]
            self.tensors.rows[block][row % self.size] = value or self.prefix(seq, row + 1)

    def piece(self, seq, stop):
        """Prefill up to ``stop``; False if there is no room."""
        start = self.cache.position(seq)
        if not self.cache.reserve(seq, stop):
            return False
        self.look(seq)
        saves = self.cache.plan_saves(seq, start, stop)
        assert saves == sorted(saves)
        self.write(seq, start, stop)
        for position, slot in saves:
            assert start < position <= stop
            self.tensors.states[slot] = self.prefix(seq, position)
        self.tensors.states[self.cache.slot(seq)] = self.prefix(seq, stop)
        self.cache.commit(seq, stop)
        return True

    def decode(self, seq, token, drafts=0, accepted=0):
        """Run the known last token and some drafts; ``token`` and accepted drafts are appended."""
        tokens = self.tokens[seq]
        start = self.cache.position(seq)
        assert start == len(tokens)
        if not self.cache.reserve(seq, start + 1 + drafts):
            return False
        self.look(seq)
        tokens += [token + i for i in range(accepted + 1)]
        stop = start + 1 + accepted
        self.write(seq, start, stop)
        self.write(seq, stop, start + 1 + drafts, value=("draft",))
        self.tensors.states[self.cache.slot(seq)] = self.prefix(seq, stop)
        self.cache.commit(seq, stop)
        return True

    def poison(self, seq):
        """The model's values for this sequence are no longer finite."""
        self.poisoned.add(seq)
        self.tensors.states[self.cache.slot(seq)] = NAN

    def finish(self, seq):
        self.cache.finish(seq, self.cache.position(seq))
        self.forget(seq)

    def discard(self, seq, poisoned=False):
        self.cache.discard(seq, poisoned=poisoned)
        self.forget(seq)

    def forget(self, seq):
        del self.tokens[seq], self.salts[seq]
        self.poisoned.discard(seq)

    def serve(self, tokens, answer=(), **options):
        """One request from begin to finish in one piece; cached tokens."""
        found = self.add(tokens, **options)
        assert found is not None
        seq, cached = found
        if cached < len(tokens):
            assert self.piece(seq, len(tokens))
        for token in answer:
            assert self.decode(seq, token)
        self.finish(seq)
        self.cache.check()
        return cached
