from __future__ import annotations

import gc

import torch

from qnext.engine.penalties import PenaltyTable
from qnext.engine.sampler import Sampler
from qnext.engine.sampling_params import SamplingParams
from qnext.engine.sampling_state import Row, SamplingState

VOCAB = 10


def state_of(*output: int, prompt: tuple[int, ...] = ()) -> SamplingState:
    params = SamplingParams(presence_penalty=1.0, repetition_penalty=1.5, temperature=0)
    state = SamplingState(params, prompt_ids=prompt, vocab_size=VOCAB)
    state.output_ids += output
    return state


def counts_of(table: PenaltyTable, state: SamplingState) -> list[float]:
    table.update([state, state])
    return table.counts[table.rows([state])[0]].tolist()


def test_counts_follow_the_output_also_backwards() -> None:
    table = PenaltyTable(VOCAB, torch.device("cpu"))
    state = state_of(3, 3, 5, prompt=(1, 1, 2))
    assert counts_of(table, state) == [0, 0, 0, 2, 0, 1, 0, 0, 0, 0]
    state.append(5)
    assert counts_of(table, state) == [0, 0, 0, 2, 0, 2, 0, 0, 0, 0]
    del state.output_ids[1:]
    assert counts_of(table, state) == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert torch.nonzero(table.in_prompt[table.rows([state])[0]]).flatten().tolist() == [1, 2]


def test_rows_are_given_back_and_come_clean() -> None:
    table = PenaltyTable(VOCAB, torch.device("cpu"))
    states = [state_of(n, prompt=(n,)) for n in range(9)]
    table.update(states)
    assert sorted(table.rows(states)) == sorted(set(table.rows(states)))
    size = len(table.counts)
    del states[3:]
    gc.collect()
    assert table.num_used == 3
    new = [state_of(8) for _ in range(6)]
    table.update(new)
    assert len(table.counts) == size
    for state in new:
        assert counts_of(table, state) == [0.0] * 8 + [1.0, 0.0]
        assert not table.in_prompt[table.rows([state])[0]].any()
    assert counts_of(table, states[2])[2] == 1


def test_a_sampler_keeps_no_row_of_a_sequence_that_left() -> None:
    sampler = Sampler(VOCAB)
    for _ in range(50):
        states = [state_of(1), state_of(2)]
        sampler(torch.zeros(2, VOCAB), [Row(state) for state in states])
    assert sampler.penalties is not None
    assert len(sampler.penalties.counts) <= 8
