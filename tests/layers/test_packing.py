"""However a text is cut and packed, and whatever was drafted and rejected: the same numbers."""

from __future__ import annotations

from itertools import accumulate, pairwise, product

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
    batch = PackedBatch.of([len(ids)], context_lens=[past], slots=[slot])
    return model.hidden_states(ids, batch, state)


def assert_same_slots(a: ModelState, i: int, b: ModelState, j: int, tokens: int) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        if isinstance(x, DeltaState) and isinstance(y, DeltaState):
            close(x.recurrent_state[i], y.recurrent_state[j])
            close(x.conv_state[i], y.conv_state[j])
        else:
            assert isinstance(x, KVCache)
            assert isinstance(y, KVCache)
            close(x.k[i, :tokens], y.k[j, :tokens])
            close(x.v[i, :tokens], y.v[j, :tokens])


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
        batch = PackedBatch.of(counts, context_lens=[past[n] for n in live],
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
def test_commit_after_a_traced_batch_equals_the_plain_run(
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
    batch = PackedBatch.of(drafts, context_lens=prefixes, slots=slots, trace=True)
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


def test_a_traced_batch_leaves_recurrent_states_alone_until_commit() -> None:
    state, ids = MODEL.new_state(1, 16), draw_ids(MODEL, 12)
    feed(MODEL, state, 0, ids[:8], 0)
    layer = state.layers[0]
    assert isinstance(layer, DeltaState)
    before = layer.recurrent_state.clone(), layer.conv_state.clone()
    batch = PackedBatch.of([4], context_lens=[8], slots=[0], trace=True)
    MODEL.hidden_states(ids[8:], batch, state)
    assert torch.equal(layer.recurrent_state, before[0])
    assert torch.equal(layer.conv_state, before[1])
    state.commit(batch, [4])
    assert not torch.equal(layer.recurrent_state, before[0])
    assert layer.traced_states is None


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
def test_copied_slots_go_their_own_ways(model: CausalLM) -> None:
    state, ids = model.new_state(3, 40), draw_ids(model, 30)
    feed(model, state, 0, ids[:20], 0)
    state.copy_slot(0, 2)
    other = draw_ids(model, 10, seed=5)
    close(feed(model, state, 0, other, 20), whole(model, torch.cat([ids[:20], other]))[20:])
    close(feed(model, state, 2, ids[20:], 20), whole(model, ids)[20:])


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


@by_model
def test_capacity_grows_and_nothing_is_lost(model: CausalLM) -> None:
    state, ids, past = model.new_state(2, 4), draw_ids(model, 50), 0
    size = state.nbytes
    found = []
    for piece in ids.split([4, 1, 15, 30]):
        state.ensure_capacity(past + len(piece))
        assert state.capacity >= past + len(piece)
        found.append(feed(model, state, 1, piece, past))
        past += len(piece)
    close(torch.cat(found), whole(model, ids))
    assert state.nbytes > size
    kv = next(layer for layer in state.layers if isinstance(layer, KVCache))
    assert kv.k.shape[1] == state.capacity
    if state.mtp is not None:
        assert state.mtp.k.shape[1] == state.capacity


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
