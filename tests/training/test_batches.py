"""The plan of batches: complete, the same for any number of processes, and a function of the step alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.infra.errors import InputError
from sluice.training.batches import BatchPlan, plan_batches, plan_validation
from sluice.training.recipe_sections import DataSection, ScheduleSection

LONGEST = 64
STEPS = 30

LENGTHS = st.lists(st.integers(16, LONGEST), min_size=1, max_size=60)
DATA = st.builds(
    DataSection,
    max_length=st.just(LONGEST),
    packing=st.booleans(),
    bucket_batches=st.integers(1, 5),
)


def plan(lengths: list[int], data: DataSection, batch_size: int = 4, steps: int = STEPS, seed: int = 1) -> BatchPlan:
    return plan_batches(lengths, data, ScheduleSection(max_steps=steps, global_batch_size=batch_size), seed)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.sampled_from([1, 2, 4, 8]))
def test_every_epoch_takes_every_example_once(lengths: list[int], bucket_batches: int, batch_size: int) -> None:
    batches = plan(lengths, DataSection(max_length=LONGEST, bucket_batches=bucket_batches), batch_size)
    seen: Counter[int] = Counter()
    step = 0
    for epoch in range(1, 6):
        # Whole batches of so many epochs; what is left over is less than one, and nothing came too often.
        while (step + 1) * batch_size <= epoch * len(lengths):
            step += 1
            seen.update(example for row in batches.step(step) for example in row)
        missing = {example: epoch - seen[example] for example in range(len(lengths))}
        assert min(missing.values()) >= 0
        assert sum(missing.values()) == epoch * len(lengths) % batch_size


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_packs_take_every_example_once_an_epoch_but_for_one_open_pack(lengths: list[int], bucket_batches: int) -> None:
    data = DataSection(max_length=LONGEST, packing=True, bucket_batches=bucket_batches)
    batches = plan(lengths, data, batch_size=1)
    seen: Counter[int] = Counter()
    step = 1
    for epoch in range(1, 6):
        loads = []
        while batches.epoch_of(step) <= epoch:
            (row,) = batches.step(step)
            loads.append(sum(lengths[example] for example in row))
            seen.update(row)
            step += 1
        assert max(loads, default=0) <= LONGEST
        # No two packs of an epoch fit into one.
        assert len(loads) < 2 or sum(sorted(loads)[:2]) > LONGEST
        missing = {example: epoch - seen[example] for example in range(len(lengths))}
        assert min(missing.values()) >= 0
        assert sum(lengths[example] * count for example, count in missing.items()) <= LONGEST - min(lengths)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_fill_no_batch_lead_the_next_epoch(packing: bool) -> None:
    lengths = [40] * 10  # no two fit a row of 64, so rows are examples with packing too
    batches = plan(lengths, DataSection(max_length=LONGEST, packing=packing, bucket_batches=1))
    first = [row[0] for step in (1, 2) for row in batches.step(step)]
    left = set(range(10)) - set(first)
    assert len(left) == 2
    second = [row[0] for step in (3, 4, 5) for row in batches.step(step)]
    assert left < set(second[:4])
    assert Counter(first + second) == dict.fromkeys(range(10), 2)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, DATA, st.sampled_from([(1, 8), (1, 2), (2, 4), (2, 1), (4, 1), (4, 2), (8, 1)]), st.integers(1, STEPS))
def test_all_processes_together_see_the_step(
    lengths: list[int], data: DataSection, shape: tuple[int, int], step: int
) -> None:
    dp_size, micro_batch_size = shape
    batches = plan(lengths, data, batch_size=8)
    dealt = [batches.rank_rows(step, rank, dp_size, micro_batch_size) for rank in range(dp_size)]
    assert {len(one) for one in dealt} == {8 // (dp_size * micro_batch_size)}
    assert {len(rows) for one in dealt for rows in one} == {micro_batch_size}
    assert Counter(row for one in dealt for rows in one for row in rows) == Counter(batches.step(step))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, DATA, st.integers(1, STEPS))
def test_resuming_at_any_step_gives_the_rows_of_the_uninterrupted_run(
    lengths: list[int], data: DataSection, step: int
) -> None:
    whole = plan(lengths, data)
    expected = [whole.step(number) for number in range(1, STEPS + 1)]
    resumed = plan(lengths, data)
    assert [resumed.step(number) for number in range(step, STEPS + 1)] == expected[step - 1 :]
    assert [plan(lengths, data, steps=2 * STEPS).step(number) for number in (step, 1)] == [
        expected[step - 1],
        expected[0],
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 99), max_size=40), st.integers(1, 5), st.integers(1, 4))
def test_validation_takes_each_example_once_in_equally_many_passes(
    lengths: list[int], dp_size: int, micro_batch_size: int
) -> None:
    dealt = [plan_validation(lengths, rank, dp_size, micro_batch_size) for rank in range(dp_size)]
    assert len({len(one) for one in dealt}) == 1
    assert all(len(rows) == micro_batch_size for one in dealt for rows in one)
    found = [row for one in dealt for rows in one for row in rows]
    assert sorted(row[0] for row in found if row) == list(range(len(lengths)))
    assert sum(not row for row in found) < dp_size * micro_batch_size


def test_the_order_is_pinned() -> None:
    """A run that was begun with another version must go on with the same rows: this plan may not change silently."""
    lengths = [16 + 7 * (n % 7) for n in range(12)]
    padded = plan(lengths, DataSection(max_length=LONGEST, bucket_batches=2))
    packed = plan(lengths, DataSection(max_length=LONGEST, packing=True, bucket_batches=2), batch_size=2)
    assert [padded.step(step) for step in (1, 4)] == [((5,), (4,), (11,), (9,)), ((6,), (5,), (11,), (3,))]
    assert [packed.step(step) for step in (1, 4)] == [((10, 1), (9, 2)), ((6,), (5,))]


def test_epochs_differ_and_seeds_differ() -> None:
    data = DataSection(max_length=LONGEST, packing=True)
    lengths = [16 + n % 30 for n in range(64)]
    one, other = plan(lengths, data, batch_size=2), plan(lengths, data, batch_size=2, seed=2)
    per_epoch = sum(lengths) // (2 * LONGEST)
    assert one.step(1) != other.step(1)
    packs = [{frozenset(row) for step in range(at, at + 10) for row in one.step(step)} for at in (1, 1 + per_epoch)]
    assert len(packs[0] & packs[1]) < len(packs[0]) / 2


def test_what_processes_compute_at_one_moment_is_alike() -> None:
    random = np.random.RandomState(0)
    lengths = np.clip(np.exp(random.normal(5.0, 0.6, 4096)), 16, 512).astype(int)
    counts = lengths // 3
    shares = []
    for bucket_batches, packing in ((1, False), (16, False), (16, True)):
        data = DataSection(max_length=512, bucket_batches=bucket_batches, packing=packing)
        figures = plan(lengths.tolist(), data, batch_size=32).figures(20, 4, 2, counts)
        shares.append(figures.waiting_share)
        assert 0 <= figures.padding_share <= figures.waiting_share < 1
    assert shares[0] > 0.2
    assert shares[1] < 0.08
    assert shares[2] < 0.02


def test_figures_count_what_batches_hold() -> None:
    lengths = [16 + n % 40 for n in range(50)]
    counts = [n % 5 for n in range(50)]
    data = DataSection(max_length=LONGEST, packing=True)
    batches = plan(lengths, data)
    figures = batches.figures(25, 2, 2, counts)
    steps = [batches.step(step) for step in range(1, 26)]
    used = [example for rows in steps for row in rows for example in row]
    assert figures.epochs == len(used) / 50
    assert figures.label_tokens_per_step == sum(counts[example] for example in used) / 25
    assert figures.tokens_per_step == sum(lengths[example] for example in used) / 25
    computed = 0
    for step in range(1, 26):
        for rank in range(2):
            for rows in batches.rank_rows(step, rank, 2, 2):
                computed += len(rows) * max(sum(lengths[example] for example in row) for row in rows)
    assert figures.padding_share == pytest.approx(1 - figures.tokens_per_step * 25 / computed)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(InputError, match="65 tokens does not fit a row of 64"):
        plan([20, 65], DataSection(max_length=LONGEST))
    with pytest.raises(InputError, match="no example"):
        plan([], DataSection(max_length=LONGEST))
    with pytest.raises(ValueError, match="count from 1"):
        plan([20], DataSection(max_length=LONGEST)).step(0)
    with pytest.raises(ValueError, match="cannot be dealt"):
        plan([20], DataSection(max_length=LONGEST)).rank_rows(1, 0, 3, 1)
