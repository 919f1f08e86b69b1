"""However a text is cut and packed, and whatever was drafted and rejected: the same numbers."""

from __future__ import annotations

from itertools import accumulate, pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import draw_ids, tiny_model, whole
from torch import Tensor

from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.layers.state import DeltaState, KVCache, ModelState

MODEL = tiny_model()
PLAIN = tiny_model(
    model_type="qwen3_moe", layer_types=None, num_nextn_predict_layers=0,
    shared_expert_intermediate_size=0, partial_rotary_factor=1.0,
)  # fmt: skip
by_model = pytest.mark.parametrize("model", [MODEL, PLAIN], ids=["hybrid", "attention only"])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def feed(model: CausalLM, state: ModelState, slot: int, ids: Tensor, past: int) -> Tensor:
    batch = state.batch([len(ids)], context_lens=[past], slots=[slot])
    return model.hidden_states(ids, batch, state)


def rows_of(state: ModelState, slot: int, cache: Tensor) -> Tensor:
    """The KV rows of a slot in ``ModelState.batch``'s layout."""
    share = state.num_blocks // state.num_slots
    return cache[slot * share : (slot + 1) * share].flatten(0, 1)


def assert_same_slots(a: ModelState, i: int, b: ModelState, j: int, tokens: int) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        if isinstance(x, DeltaState) and isinstance(y, DeltaState):
            close(x.recurrent_state[i], y.recurrent_state[j])
            close(x.conv_state[i], y.conv_state[j])
        else:
            assert isinstance(x, KVCache)
            assert isinstance(y, KVCache)
            for of in (lambda cache: cache.k, lambda cache: cache.v):
                close(rows_of(a, i, of(x))[:tokens], rows_of(b, j, of(y))[:tokens])


@by_model
@settings(max_examples=25)
@given(st.data())
def test_prefill_split_anywhere_equals_the_whole(model: CausalLM, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 150))
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=6)) | {0, length})
    ids = draw_ids(model, length)
    state, fresh = model.new_state(3, length), model.new_state(1, length)
    pieces = [feed(model, state, 1, ids[a:b], a) for a, b in pairwise(cuts)]
    close(torch.cat(pieces), whole(model, ids))
    feed(model, fresh, 0, ids, 0)
    assert_same_slots(state, 1, fresh, 0, length)


@by_model
@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5))
def test_a_ragged_batch_equals_its_sequences_alone(model: CausalLM, lengths: list[int]) -> None:
    ids = draw_ids(model, sum(lengths))
    parts = ids.split(lengths)
    alone = [whole(model, part) for part in parts]
    close(model.hidden_states(ids, PackedBatch.of(lengths)), torch.cat(alone))

    # Two ragged steps on slots in a shuffled order.
    slots = [(2 * n + 1) % len(lengths) if len(lengths) % 2 else n for n in range(len(lengths))]
    state, past = model.new_state(len(lengths), max(lengths)), [0] * len(lengths)
    found: list[list[Tensor]] = [[] for _ in lengths]
    for share in (2, 1):
        new = [-(-(n - p) // share) for n, p in zip(lengths, past, strict=True)]
        live = [n for n in range(len(lengths)) if new[n]]
        if not live:
            continue
        counts = [new[n] for n in live]
        batch = state.batch(counts, context_lens=[past[n] for n in live],
                            slots=[slots[n] for n in live])  # fmt: skip
        out = model.hidden_states(
            torch.cat([parts[n][past[n] : past[n] + new[n]] for n in live]), batch, state
        )
        for n, rows in zip(live, out.split(counts), strict=True):
            found[n].append(rows)
            past[n] += new[n]
    for rows, expected in zip(found, alone, strict=True):
        close(torch.cat(rows), expected)


def test_rows_of_a_padded_free_batch_equal_rows_alone() -> None:
    ids = draw_ids(MODEL, 60).view(3, 20)
    logits = MODEL(ids).logits
    assert logits.shape == (3, 20, MODEL.config.vocab_size)
    for row, expected in zip(ids, logits, strict=True):
        close(MODEL(row[None]).logits[0], expected)


@by_model
@pytest.mark.parametrize("accepted", list(product(range(4), range(3))))
def test_commit_after_a_provisional_batch_equals_the_plain_run(
    model: CausalLM, accepted: tuple[int, int]
) -> None:
    prefixes, drafts = (70, 2), (3, 2)
    texts = [draw_ids(model, p + 9, seed=p) for p in prefixes]
    state = model.new_state(3, 96)
    slots = [2, 0]
    for text, past, slot in zip(texts, prefixes, slots, strict=True):
        feed(model, state, slot, text[:past], 0)
    wrong = [
        torch.cat([t[p : p + a], (t[p + a : p + n] + 1) % model.config.vocab_size])
        for t, p, n, a in zip(texts, prefixes, drafts, accepted, strict=True)
    ]
    batch = state.batch(drafts, context_lens=prefixes, slots=slots, provisional=[True, True])
    out = model.hidden_states(torch.cat(wrong), batch, state)
    for rows, ids, text, past in zip(out.split(drafts), wrong, texts, prefixes, strict=True):
        close(rows, whole(model, torch.cat([text[:past], ids]))[past:])
    state.commit(batch, accepted)

    for slot, text, past, count in zip(slots, texts, prefixes, accepted, strict=True):
        plain = model.new_state(1, 96)
        feed(model, plain, 0, text[: past + count], 0)
        assert_same_slots(state, slot, plain, 0, past + count)
        after = feed(model, state, slot, text[past + count :], past + count)
        close(after, whole(model, text)[past + count :])


def test_a_provisional_batch_leaves_recurrent_states_alone_until_commit() -> None:
    state, ids = MODEL.new_state(1, 16), draw_ids(MODEL, 12)
    feed(MODEL, state, 0, ids[:8], 0)
    layer = state.layers[0]
    assert isinstance(layer, DeltaState)
    before = layer.recurrent_state.clone(), layer.conv_state.clone()
    batch = state.batch([4], context_lens=[8], slots=[0], provisional=[True])
    MODEL.hidden_states(ids[8:], batch, state)
    assert torch.equal(layer.recurrent_state, before[0])
    assert torch.equal(layer.conv_state, before[1])
    state.commit(batch, [4])
    assert not torch.equal(layer.recurrent_state, before[0])
    assert not layer.pending


def test_the_window_holds_the_last_inputs_of_the_convolution() -> None:
    taps = MODEL.config.linear_conv_kernel_dim
    for length in (1, 2, 3, 9):
        ids = draw_ids(MODEL, length)
        state = MODEL.new_state(1, length)
        feed(MODEL, state, 0, ids, 0)
        first = MODEL.model.layers[0]
        x = first.linear_attn.in_proj_qkv(first.input_layernorm(MODEL.model.embed_tokens(ids)))
        padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
        close(state.layers[0].conv_state[0], padded[-(taps - 1) :].T)


@by_model
def test_copied_slots_and_blocks_go_their_own_ways(model: CausalLM) -> None:
    state, ids = model.new_state(3, 40), draw_ids(model, 30)
    feed(model, state, 0, ids[:20], 0)
    state.copy_slot(0, 2)
    share = state.num_blocks // state.num_slots
    for block in range(share):
        state.copy_block(block, 2 * share + block)
    other = draw_ids(model, 10, seed=5)
    close(feed(model, state, 0, other, 20), whole(model, torch.cat([ids[:20], other]))[20:])
    close(feed(model, state, 2, ids[20:], 20), whole(model, ids)[20:])


@by_model
@settings(max_examples=25)
@given(st.data())
def test_blocks_in_any_order_and_snapshots_on_the_way(model: CausalLM, data: st.DataObject) -> None:
    """Two sequences step together over shuffled blocks; one goes on later from a snapshot."""
    lengths = [data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))]
    size = data.draw(st.sampled_from([1, 4, 16]))
    texts = [draw_ids(model, n + 8, seed=i) for i, n in enumerate(lengths)]
    needed = [-(-(n + 8) // size) for n in lengths]
    state = model.new_state(4, block_size=size, num_blocks=sum(needed) + 2)
    order = data.draw(st.permutations(range(state.num_blocks)))
    tables = np.zeros((2, max(needed)), np.int32)
    tables[0, : needed[0]] = order[: needed[0]]
    tables[1, : needed[1]] = order[needed[0] : sum(needed)]
    after = data.draw(st.integers(1, lengths[0]))
    batch = PackedBatch.cached(lengths, [0, 0], [1, 3], tables, size, saves=[(0, after, 2)])
    found = model.hidden_states(torch.cat([t[:-8] for t in texts]), batch, state)
    close(found, torch.cat([whole(model, t[:-8]) for t in texts]))

    batch = PackedBatch.cached([8, 8], lengths, [1, 3], tables, size)
    found = model.hidden_states(torch.cat([t[-8:] for t in texts]), batch, state)
    close(found, torch.cat([whole(model, t)[-8:] for t in texts]))

    # From the snapshot another text: rows of the blocks past it are overwritten.
    other = draw_ids(model, 5, seed=9)
    count = min(5, needed[0] * size - after)
    batch = PackedBatch.cached([count], [after], [2], tables[:1], size)
    found = model.hidden_states(other[:count], batch, state)
    close(found, whole(model, torch.cat([texts[0][:after], other[:count]]))[after:])


@by_model
def test_verification_prefill_and_decoding_in_one_batch(model: CausalLM) -> None:
    texts = [draw_ids(model, n, seed=n) for n in (40, 33, 60)]
    past, new, slots = [36, 30, 20], [4, 1, 40], [2, 0, 3]
    state = model.new_state(4, 64)
    for text, count, slot in zip(texts, past, slots, strict=True):
        feed(model, state, slot, text[:count], 0)
    batch = state.batch(
        new, context_lens=past, slots=slots, provisional=[True, False, False], saves=[(2, 15, 1)]
    )
    ids = torch.cat([t[p : p + n] for t, p, n in zip(texts, past, new, strict=True)])
    found = model.hidden_states(ids, batch, state)
    pairs = zip(texts, past, new, strict=True)
    close(found, torch.cat([whole(model, t[: p + n])[p:] for t, p, n in pairs]))
    state.commit(batch, [2, 1, 40])
    for slot, text, count in ((2, texts[0], 38), (0, texts[1], 31), (3, texts[2], 60)):
        plain = model.new_state(1, 64)
        feed(model, plain, 0, text[:count], 0)
        assert_same_slots(state, slot, plain, 0, count)
    for layer in state.delta_states:
        assert not layer.pending
    if state.delta_states:
        plain = model.new_state(1, 64)
        feed(model, plain, 0, texts[2][:35], 0)
        for x, y in zip(state.delta_states, plain.delta_states, strict=True):
            close(x.recurrent_state[1], y.recurrent_state[0])
            close(x.conv_state[1], y.conv_state[0])


@by_model
def test_a_reset_slot_starts_again(model: CausalLM) -> None:
    state, ids = model.new_state(2, 40), draw_ids(model, 30)
    feed(model, state, 0, ids, 0)
    feed(model, state, 1, ids, 0)
    state.reset(0)
    other = draw_ids(model, 25, seed=7)
    close(feed(model, state, 0, other, 0), whole(model, other))
    more = draw_ids(model, 5, seed=8)
    close(feed(model, state, 1, more, 30), whole(model, torch.cat([ids, more]))[30:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recurrent_states_are_fp32(dtype: torch.dtype) -> None:
    state = tiny_model(dtype).new_state(1, 4)
    delta = next(layer for layer in state.layers if isinstance(layer, DeltaState))
    kv = next(layer for layer in state.layers if isinstance(layer, KVCache))
    assert delta.recurrent_state.dtype == torch.float32
    assert delta.conv_state.dtype == kv.k.dtype == dtype


def test_bounds_and_positions() -> None:
    batch = PackedBatch.of([3, 0, 2], context_lens=[5, 1, 0])
    assert batch.positions.tolist() == [5, 6, 7, 0, 1]
    assert batch.cu_seqlens.tolist() == [*accumulate([3, 0, 2], initial=0)]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_length == 3
