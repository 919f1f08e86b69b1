"""The cache manager by example: what hits, what is kept, what is refused."""

from __future__ import annotations

import pytest
from fake_cache import World

from qnext.errors import ConfigError, EngineError

LONG = list(range(100, 140))


def world(**options):
    return World(**{"num_blocks": 64, "num_slots": 24, **options})


def test_the_second_request_hits_at_its_whole_length():
    w = world()
    assert w.serve(LONG) == 0
    assert w.serve(LONG) == len(LONG)


def test_a_short_prompt_hits():
    w = world(block_size=16)
    assert w.serve([1, 2, 3]) == 0
    assert w.serve([1, 2, 3]) == 3
    assert w.serve([1, 2, 3, 4]) == 3


def test_a_conversation_goes_on_where_the_answer_ended():
    w = world()
    first = [1, 2, 3, 4, 5, 6]
    assert w.serve(first, answer=[7, 8, 9]) == 0
    second = [*first, 7, 8, 9, 10, 11, 12]
    assert w.serve(second, answer=[13]) == 9
    assert w.serve([*second, 13, 14]) == 13


def test_any_differing_suffix_hits_the_back_off_snapshots():
    w = world(num_blocks=256, num_slots=32)
    prompt = list(range(200))
    w.serve(prompt)
    for shared in (199, 170, 150, 100, 90):
        found = w.add([*prompt[:shared], 999, 998])
        assert found is not None
        seq, cached = found
        assert shared - cached <= max(2 * (len(prompt) - shared) + 4, 36)
        w.discard(seq)
    w.cache.check()


def test_a_turn_end_is_a_place_to_branch():
    w = world(turn_end_ids=frozenset({0}))
    system = [5, 6, 7, 8, 9, 0]
    assert w.serve([*system, 1, 2, 3]) == 0
    assert w.serve([*system, 11, 12, 13]) == len(system)


def test_a_branch_that_was_seen_twice_hits_the_third_time():
    """No marker, no back-off: the second prompt finds the blocks and saves a state there."""
    w = world()
    shared = list(range(20))
    assert w.serve([*shared, 50, 51, 52]) == 0
    assert w.serve([*shared, 60, 61, 62]) == 0
    assert w.serve([*shared, 70, 71, 72]) == 20


def test_a_grid_when_asked_for():
    w = world(snapshot_interval=8)
    w.serve(range(30))
    assert w.serve([*range(19), 99]) == 16


@pytest.mark.parametrize("needs_state", [True, False])
def test_salts_and_fingerprints_are_apart(needs_state):
    w = world(needs_state=needs_state)
    w.serve(LONG, salt=b"one adapter")
    assert w.serve(LONG, salt=b"another") == 0
    assert w.serve(LONG) == 0
    assert w.serve(LONG, salt=b"one adapter") > 0
    other = World(num_blocks=64, num_slots=24, fingerprint=b"other weights")
    assert other.cache.memory.index.root(b"").key != w.cache.memory.index.root(b"").key


def test_without_recurrent_layers_blocks_alone_hit_but_one_token_is_run():
    w = world(needs_state=False)
    assert w.serve(LONG) == 0
    assert w.serve(LONG) == 36
    assert w.serve(LONG[:37]) == 36
    assert w.serve([*LONG[:18], 1]) == 16


def test_without_prefix_caching_nothing_outlives_a_sequence():
    w = world(enable_prefix_caching=False)
    assert w.serve(LONG) == w.serve(LONG) == 0
    stats = w.cache.stats
    assert (stats.blocks_free, stats.slots_free) == (64, 24)


def test_the_caller_can_limit_the_hit():
    w = world()
    w.serve(LONG, answer=[1, 2])
    assert w.serve(LONG, max_cached=len(LONG) - 1) < len(LONG)
    assert w.serve(LONG, max_cached=0) == 0


def test_running_siblings_share_blocks_and_copy_the_tail():
    w = world()
    seq, _ = w.add(LONG[:10])
    assert w.piece(seq, 10)
    siblings = [w.add(LONG[:10]) for _ in range(3)]
    assert [cached for _, cached in siblings] == [10] * 3
    tables = [w.cache.block_table(s) for s in (seq, *(s for s, _ in siblings))]
    assert len({tuple(t[:2]) for t in tables}) == 1
    assert len({t[2] for t in tables}) == 4
    for n, (sibling, _) in enumerate(siblings):
        assert w.decode(sibling, 50 + n, drafts=3, accepted=n % 3)
    w.cache.check()


def test_fork_needs_no_cache():
    w = world(enable_prefix_caching=False)
    seq, _ = w.add(LONG[:10])
    assert w.piece(seq, 10)
    child = w.next_id
    w.next_id += 1
    w.tokens[child], w.salts[child] = list(LONG[:10]), b""
    assert w.cache.fork(seq, child, w.tokens[child])
    assert w.decode(seq, 1, drafts=3)
    assert w.decode(child, 2)
    w.look(seq)
    w.look(child)
    w.cache.check()


def test_least_recently_used_goes_first():
    w = world(num_blocks=9, num_slots=16)
    a, b, c = ([n * 10 + i for i in range(8)] for n in (1, 2, 3))
    w.serve(a)
    w.serve(b)
    w.serve(c)
    assert w.serve(a) == 8
    w.serve([7] * 12)  # needs three blocks, of which one is free and b's are the oldest
    assert w.serve(b, max_cached=7) == 0
    assert w.serve(a) == 8


def test_blocks_go_by_last_use_and_from_the_end():
    w = world(num_blocks=6, needs_state=False)
    a, b, c = [1] * 9, [2] * 9, [3] * 9
    w.serve(a)
    w.serve(b)
    assert w.serve(a) == 8
    w.serve(c)  # three blocks, of which two are free
    seq, cached = w.add(b)
    assert cached == 4
    w.discard(seq)
    assert w.serve(a) == 8


def test_a_long_prompt_does_not_sweep_conversations_away():
    w = world(num_blocks=256, num_slots=5)
    ends = [[n] * 3 for n in range(4)]
    for prompt in ends:
        w.serve(prompt)
    w.serve(range(1000, 1700))
    kept = {s.position for s in w.cache.memory.states.owners if s is not None}
    assert 700 in kept
    assert [w.serve(prompt) for prompt in ends[1:]] == [3, 3, 3]


def test_a_back_off_snapshot_that_was_hit_once_is_kept_like_an_end():
    w = world(num_blocks=256, num_slots=8)
    w.serve(range(150))
    assert w.serve([*range(120), 999]) == 116
    for n in range(3, 7):
        w.serve([n] * 3)
    assert w.serve([*range(120), 998], max_cached=119) == 116


def test_a_state_that_was_used_outlives_a_younger_one():
    w = world(num_slots=4)
    a, b = [1, 1, 1], [2, 2, 2]
    w.serve(a)
    w.serve(b)
    for _ in range(3):
        assert w.serve(a) == 3
    for n in range(3, 5):
        w.serve([n] * 3)
    assert w.serve(a) == 3
    assert w.serve(b) == 0


def test_blocks_without_a_state_go_before_older_ones_with_one():
    w = world(num_blocks=10, num_slots=6)
    old, new = [1] * 8, [2] * 12
    w.serve(old)
    w.serve(new)
    w.cache.memory.index.evict_snapshot(
        next(s for s in w.cache.memory.states.owners if s is not None and s.position == 12)
    )
    w.serve([3] * 28)  # seven blocks: five are free, two more are needed
    assert w.serve(old) == 8


def test_no_room_is_known_before_anything_is_copied():
    w = world(num_blocks=8, num_slots=4)
    w.serve(LONG[:10])
    one, _ = w.add([9] * 5)
    assert w.piece(one, 5)
    assert w.cache.reserve(one, 20)
    before = list(w.tensors.states)
    tokens = list(LONG[:10])
    assert w.cache.begin(77, tokens, room=16) is None
    assert w.cache.begin(77, tokens, room=16) is None
    assert w.tensors.states == before
    w.cache.check({one: 5})
    assert w.cache.begin(77, tokens, room=12) == 10
    assert w.cache.reserve(77, 12)


def test_back_off_snapshots_make_room_for_ends_of_the_same_age():
    w = world(num_blocks=256, num_slots=6, block_size=4)
    w.serve(range(150), answer=[1])
    kept = {s.position for s in w.cache.memory.states.owners if s is not None}
    assert {150, 151} <= kept
    for n in range(2, 4):
        w.serve(range(n * 1000, n * 1000 + 4), answer=[1])
    kept = {s.position for s in w.cache.memory.states.owners if s is not None}
    assert {150, 151} <= kept, "four new ends displaced an old one before the back-off snapshots"


def test_running_sequences_are_never_evicted():
    w = world(num_blocks=4, num_slots=2)
    one, _ = w.add([1, 2, 3, 4, 5])
    assert w.piece(one, 5)
    two, _ = w.add([6, 7, 8, 9])
    assert w.add([1]) is None
    assert w.piece(two, 4)
    assert w.cache.reserve(two, 8)
    before = list(w.cache.block_table(one))
    assert not w.cache.reserve(one, 13)
    assert w.cache.block_table(one) == before
    w.finish(two)
    assert w.cache.reserve(one, 13)
    w.look(one)
    w.cache.check()


def test_one_sequence_can_have_the_whole_pool():
    w = world(num_blocks=8, num_slots=1)
    assert w.cache.can_ever_fit(32)
    assert not w.cache.can_ever_fit(33)
    for n in range(3):
        w.serve([n] * 31)
    assert w.serve([2] * 31, answer=[1]) == 31


def test_a_hit_takes_the_snapshots_slot_when_no_other_is_left():
    w = world(num_slots=1)
    w.serve(LONG)
    assert w.serve([*LONG, 1, 2]) == len(LONG)


def test_without_a_block_for_a_copy_the_snapshot_itself_is_taken():
    w = world(num_blocks=4, num_slots=8)
    w.serve(LONG[:6])
    other, _ = w.add([9] * 5)
    assert w.piece(other, 5)
    seq, cached = w.add(LONG[:6])
    assert cached == 6
    assert w.decode(seq, 1)
    w.cache.check()
    w.discard(seq)
    assert w.serve(LONG[:6], max_cached=5) == 0


def test_a_planned_state_that_was_not_written_is_never_published():
    w = world(turn_end_ids=frozenset({107, 111}))
    seq, _ = w.add(LONG)
    assert w.cache.reserve(seq, 40)
    saves = w.cache.plan_saves(seq, 0, 40)
    assert [position for position, _ in saves] == [8, 12, 40]
    free = w.cache.stats.slots_free
    assert w.piece(seq, 10)  # a shorter piece came instead
    assert w.cache.stats.slots_free == free + 2
    assert w.piece(seq, 40)
    w.finish(seq)
    for length in (8, 12, 40):
        assert w.serve([*LONG[:length], 1]) == length
    assert w.cache.saves.planned == {}


def test_two_readers_of_one_prompt_save_each_state_once():
    w = world()
    one, _ = w.add(LONG)
    two, _ = w.add(LONG)
    for seq in (one, two):
        assert w.cache.reserve(seq, 40)
    first = w.cache.plan_saves(one, 0, 40)
    assert len(first) == 2
    assert w.cache.plan_saves(two, 0, 40) == []
    w.discard(one)
    assert len(w.cache.plan_saves(two, 0, 40)) == 2
    w.cache.check()


def test_an_unused_twin_of_a_block_is_freed():
    w = world()
    w.serve(LONG[:16])
    assert w.cache.stats.blocks_cached == 4
    seq, _ = w.add(LONG[:16], max_cached=0)
    assert w.piece(seq, 16)
    stats = w.cache.stats
    assert (stats.blocks_used, stats.blocks_cached) == (4, 0)
    assert w.add(LONG[:16]) == (seq + 1, 16)
    w.cache.check()


def test_poison_leaves_nothing_behind():
    w = world()
    w.serve(LONG[:8])
    seq, cached = w.add(LONG)
    assert cached == 8
    assert w.piece(seq, 20)
    w.poison(seq)
    assert w.piece(seq, 40)
    heir, inherited = w.add(LONG)  # attaches before the poison is found
    assert inherited == 40
    assert heir in w.poisoned
    w.discard(seq, poisoned=True)
    w.cache.check()
    w.discard(heir, poisoned=True)
    w.cache.check()
    assert all(("nan",) not in rows for rows in w.tensors.rows)
    assert ("nan",) not in w.tensors.states
    assert w.serve(LONG) == 0


def test_poison_takes_what_others_built_on_it_along():
    w = world()
    seq, _ = w.add(LONG[:10])
    assert w.piece(seq, 10)
    assert w.serve([*LONG[:10], 5, 5, 5]) == 10
    w.poison(seq)
    w.discard(seq, poisoned=True)
    w.cache.check()
    assert w.serve([*LONG[:10], 5, 5, 5]) == 0


def test_an_abort_keeps_what_was_committed():
    w = world(turn_end_ids=frozenset({107}))
    seq, _ = w.add(LONG)
    assert w.piece(seq, 12)
    w.discard(seq)
    assert w.serve(LONG) == 8


def test_swap_is_exact():
    w = world(num_blocks=8)
    seq, _ = w.add(LONG[:14])
    assert w.piece(seq, 14)
    assert w.decode(seq, 1, drafts=2, accepted=1)
    swapped = w.cache.swap_out(seq)
    assert swapped.nbytes > 0
    w.serve([9] * 30)
    assert w.cache.swap_in(seq, swapped)
    w.look(seq)
    assert w.decode(seq, 5)
    w.cache.check()


def test_swap_in_reuses_what_is_still_there_and_changes_nothing_when_it_fails():
    w = world(num_blocks=6)
    seq, _ = w.add(LONG[:14])
    assert w.piece(seq, 14)
    swapped = w.cache.swap_out(seq)
    other, _ = w.add([9] * 13)
    assert w.cache.reserve(other, 13)
    w.cache.check()
    assert not w.cache.swap_in(seq, swapped)
    w.cache.check()
    w.discard(other)
    assert w.cache.swap_in(seq, swapped)
    w.look(seq)
    assert w.decode(seq, 1)
    table = list(w.cache.block_table(seq))
    swapped = w.cache.swap_out(seq)
    w.tensors.rows[table[-1]] = [("overwritten",)] * 4  # known blocks are not copied, others are
    assert w.cache.swap_in(seq, swapped)
    assert w.cache.block_table(seq)[:3] == table[:3]
    w.look(seq)
    w.cache.check()


def test_statistics():
    w = world()
    w.serve(LONG)
    w.serve(LONG)
    stats = w.cache.stats
    assert (stats.queries, stats.hits) == (2, 1)
    assert stats.hit_rate == 0.5
    assert stats.blocks_used == stats.slots_used == 0
    assert stats.blocks_cached + stats.blocks_free == 64
    assert stats.slots_cached + stats.slots_free == 24


def test_misuse_is_refused():
    w = world()
    with pytest.raises(ConfigError, match="none at all"):
        World(num_blocks=0)
    with pytest.raises(ConfigError, match="snapshot_interval"):
        World(snapshot_interval=0)
    with pytest.raises(EngineError, match="holds no cache"):
        w.cache.reserve(3, 1)
    with pytest.raises(EngineError, match="holds no cache"):
        w.cache.commit(3, 1)
    seq, _ = w.add(LONG)
    with pytest.raises(EngineError, match="has begun already"):
        w.cache.begin(seq, LONG)
    with pytest.raises(EngineError, match="room for 0"):
        w.cache.commit(seq, 1)
    assert w.cache.reserve(seq, 44)
    with pytest.raises(EngineError, match="it has 40 tokens"):
        w.cache.commit(seq, 41)
    w.cache.commit(seq, 8)
    with pytest.raises(EngineError, match="8 are committed"):
        w.cache.commit(seq, 7)
    with pytest.raises(EngineError, match="cannot follow"):
        w.cache.plan_saves(seq, 4, 12)


def test_the_books_notice_what_is_wrong():
    w = world()
    seq, _ = w.add(LONG)
    assert w.piece(seq, 20)
    w.cache.check({seq: 20})
    w.cache.check({seq: 20}, full=False)
    with pytest.raises(EngineError, match="computed 19"):
        w.cache.check({seq: 19}, full=False)
    with pytest.raises(EngineError, match="hold cache"):
        w.cache.check({seq: 20, 77: 1}, full=False)
    w.cache.memory.blocks.refs[w.cache.block_table(seq)[0]] += 1
    with pytest.raises(EngineError, match="users"):
        w.cache.check()
    w.cache.memory.blocks.refs[w.cache.block_table(seq)[0]] -= 1
    slot = w.cache.memory.states.free.pop()
    with pytest.raises(EngineError, match="accounted"):
        w.cache.check(full=False)
    w.cache.memory.states.free.append(slot)
    w.cache.check()
