"""Which examples make each step: a plan that is the same on every machine and for every number of processes.

    plan = plan_batches(lengths, recipe.data, recipe.schedule, recipe.seed)
    plan.step(7)                                                # the rows of step 7, as tuples of example numbers
    plan.rank_rows(7, dp_rank, dp_size, micro_batch_size)       # of these, what one process sees, micro-batch by batch

An epoch takes every example once, in an order of its own. With packing, examples of one shuffled window share rows,
best fit first. Rows are then sorted by length within `bucket_batches` global batches, cut into global batches, and
these are shuffled. At an epoch's end, rows that do not fill a global batch lead the next epoch, and the examples of the
emptiest pack, if another would fit it, are packed with the next epoch's: so none is lost, and small data packs well.

Randomness is PCG64's raw 64-bit output, sorted on: numpy promises that stream for all its versions (NEP 19), which it
does not for `Generator.permutation`. Neither torch nor hash order has a part, and epochs follow from the seed alone:
a longer schedule begins with the steps of a shorter one.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sluice.infra.errors import InputError
from sluice.training.recipe_sections import DataSection, ScheduleSection

Integers = npt.NDArray[np.int64]
Row = tuple[int, ...]
"""Numbers of the examples in one row: one, several in a pack, none in a row that only fills up a batch."""

PACK_WINDOW = 16_384
"""Examples that are packed together. A window leaves about one row badly filled; a wider one mixes no better."""


@dataclass(frozen=True)
class BatchFigures:
    """What a plan comes to over its first `steps`, for one number of processes.

    `padding_share` is the share (0 to 1) of computed positions that hold no token, rows of a micro-batch being as long
    as its longest; `waiting_share` also counts what the other processes wait for the longest one. `row_share` is the
    mean length of a row against `row_length`: with packing, its efficiency.
    """

    steps: int
    epochs: float
    examples_per_step: float
    tokens_per_step: float
    label_tokens_per_step: float
    padding_share: float
    waiting_share: float
    row_share: float


@dataclass(frozen=True)
class _Epoch:
    """Global batches of one epoch: row after row in `examples`; row n is examples[starts[n]:starts[n + 1]]."""

    number: int
    first_batch: int
    batches: int
    examples: Integers
    starts: Integers
    lengths: Integers


class BatchPlan:
    """Rows of every step. Epochs are planned when a step first needs them (about two seconds for a million packed)."""

    def __init__(self, lengths: Sequence[int] | Integers, data: DataSection, batch_size: int, seed: int) -> None:
        self.lengths: Integers = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self._data = data
        self._seed = seed
        self._epochs: list[_Epoch] = []
        self._first_batches: list[int] = []
        self._unpacked: Integers = np.empty(0, np.int64)
        self._left: tuple[Integers, Integers] = (np.empty(0, np.int64), np.zeros(1, np.int64))
        self._numbers = 0

    def step(self, step: int) -> tuple[Row, ...]:
        """The rows of a step, counted from 1, longest first. There is no last step."""
        epoch, row = self._locate(step)
        bounds = epoch.starts[row : row + self.batch_size + 1].tolist()
        examples = epoch.examples[bounds[0] : bounds[-1]].tolist()
        return tuple(tuple(examples[begin - bounds[0] : end - bounds[0]]) for begin, end in itertools.pairwise(bounds))

    def epoch_of(self, step: int) -> int:
        """The epoch of a step, counted from 1. One that fills no global batch has no step."""
        return self._locate(step)[0].number

    def rank_rows(self, step: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[list[Row]]:
        """The micro-batches of one process in a step, each of `micro_batch_size` rows.

        Rows of neighbouring length are dealt out to the processes in turn, so that what they compute at one moment is
        alike and none waits. All processes together see `step(step)`. Raises `ValueError` if the batch does not divide.
        """
        share = dp_size * micro_batch_size
        if self.batch_size % share or not 0 <= dp_rank < dp_size:
            raise ValueError(f"{self.batch_size} rows cannot be dealt to process {dp_rank} of {dp_size} by {share}.")
        rows = self.step(step)
        return [list(rows[at + dp_rank : at + share : dp_size]) for at in range(0, len(rows), share)]

    def figures(
        self, steps: int, dp_size: int, micro_batch_size: int, label_counts: Sequence[int] | Integers
    ) -> BatchFigures:
        """Padding, tokens and epochs of the first `steps`; `label_counts`: each example's tokens with a loss."""
        self._locate(steps)
        counts = np.asarray(label_counts, dtype=np.int64)
        rows, examples, labels, left = [], 0, 0, steps
        for epoch in self._epochs:
            batches = min(epoch.batches, left)
            left -= batches
            rows.append(epoch.lengths[: batches * self.batch_size])
            used = epoch.examples[: epoch.starts[batches * self.batch_size]]
            examples += len(used)
            labels += int(counts[used].sum())
        lengths = np.concatenate(rows)
        tokens = int(lengths.sum())
        moments = lengths.reshape(-1, micro_batch_size, dp_size)
        longest = moments.max(axis=1)
        computed = int(longest.sum()) * micro_batch_size
        waited = int(longest.max(axis=1).sum()) * dp_size * micro_batch_size
        return BatchFigures(
            steps=steps,
            epochs=examples / len(self.lengths),
            examples_per_step=examples / steps,
            tokens_per_step=tokens / steps,
            label_tokens_per_step=labels / steps,
            padding_share=1 - tokens / computed,
            waiting_share=1 - tokens / waited,
            row_share=tokens / (len(lengths) * self._data.row_length),
        )

    def _locate(self, step: int) -> tuple[_Epoch, int]:
        """The epoch of a step and its first row there."""
        if step < 1:
            raise ValueError(f"Steps count from 1; {step} is none.")
        while not self._epochs or self._epochs[-1].first_batch + self._epochs[-1].batches < step:
            self._plan_epoch()
        epoch = self._epochs[bisect.bisect_right(self._first_batches, step - 1) - 1]
        return epoch, (step - 1 - epoch.first_batch) * self.batch_size

    def _plan_epoch(self) -> None:
        keys = np.random.PCG64([self._seed, self._numbers])
        self._numbers += 1
        examples = np.concatenate([self._unpacked, _shuffled(len(self.lengths), keys)])
        starts = np.arange(len(examples) + 1)
        if self._data.packing:
            examples, starts = _packed(examples, self.lengths, self._data.row_length)
            rows = _shuffled(len(starts) - 1, keys)
            loads = np.add.reduceat(self.lengths[examples], starts[:-1])[rows]
            emptiest = int(np.argmin(loads))
            self._unpacked = np.empty(0, np.int64)
            if loads[emptiest] + self.lengths.min() <= self._data.row_length:
                row = rows[emptiest]
                self._unpacked = examples[starts[row] : starts[row + 1]]
                rows = np.delete(rows, emptiest)
            examples, starts = _take(examples, starts, rows)
        carried, carried_starts = self._left
        examples = np.concatenate([carried, examples])
        starts = np.concatenate([carried_starts, starts[1:] + len(carried)])
        batches = (len(starts) - 1) // self.batch_size
        full = batches * self.batch_size
        self._left = examples[starts[full] :], starts[full:] - starts[full]
        if not batches:
            return
        examples, starts = examples[: starts[full]], starts[: full + 1]
        lengths = np.add.reduceat(self.lengths[examples], starts[:-1])
        rows = self._bucketed(lengths, batches, keys)
        examples, starts = _take(examples, starts, rows)
        first = self._epochs[-1].first_batch + self._epochs[-1].batches if self._epochs else 0
        self._epochs.append(_Epoch(self._numbers, first, batches, examples, starts, lengths[rows]))
        self._first_batches.append(first)

    def _bucketed(self, lengths: Integers, batches: int, keys: np.random.PCG64) -> Integers:
        """An order of the rows: windows sorted by length and cut into global batches, these shuffled, each longest
        first (which changes no sum over a batch, but puts its like rows side by side and its peak of memory early)."""
        window = np.arange(len(lengths)) // (self._data.bucket_batches * self.batch_size)
        by_length = np.lexsort((-lengths, window))
        # Batches stay in their window: the order within one changes, that of the windows does not.
        of_batch = np.arange(batches) // self._data.bucket_batches
        order = np.lexsort((keys.random_raw(batches), of_batch))
        return by_length.reshape(batches, self.batch_size)[order].reshape(-1)


def plan_batches(
    lengths: Sequence[int] | Integers, data: DataSection, schedule: ScheduleSection, seed: int
) -> BatchPlan:
    """Plan for examples of these lengths in tokens. Raises `InputError` for none, or one longer than a row."""
    longest = max(lengths, default=0)
    if not len(lengths):
        raise InputError("There is no example to train on.")
    if longest > data.row_length:
        raise InputError(
            f"An example of {longest} tokens does not fit a row of {data.row_length}.",
            hint="Raise data.max_length (with packing: data.pack_length).",
        )
    return BatchPlan(lengths, data, schedule.global_batch_size, seed)


def plan_validation(
    lengths: Sequence[int] | Integers, dp_rank: int, dp_size: int, micro_batch_size: int
) -> list[list[Row]]:
    """One pass over all examples: the micro-batches of one process, every process the same number of them.

    Each example comes once, alone in its row, longest first. Where examples run out, rows are empty tuples: FSDP
    gathers weights in every forward pass, so all processes must make equally many.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    share = dp_size * micro_batch_size
    rows: list[Row] = [(example,) for example in order]
    rows += [()] * (-len(rows) % share)
    return [rows[at + dp_rank : at + share : dp_size] for at in range(0, len(rows), share)]


def _shuffled(count: int, keys: np.random.PCG64) -> Integers:
    """A permutation: positions sorted by one raw number each, equal numbers in their order."""
    return np.argsort(keys.random_raw(count), kind="stable")


def _take(examples: Integers, starts: Integers, rows: Integers) -> tuple[Integers, Integers]:
    """The same rows in another order."""
    sizes = np.diff(starts)[rows]
    ends = np.cumsum(sizes)
    offsets = np.repeat(starts[:-1][rows] - (ends - sizes), sizes)
    return examples[offsets + np.arange(len(offsets))], np.concatenate([[0], ends])


def _packed(order: Integers, lengths: Integers, row_length: int) -> tuple[Integers, Integers]:
    """Rows of at most `row_length` tokens from each window of the order: best-fit decreasing (Johnson 1973)."""
    bins: list[list[int]] = []
    for at in range(0, len(order), PACK_WINDOW):
        bins += _best_fit(order[at : at + PACK_WINDOW], lengths, row_length)
    sizes = np.fromiter((len(one) for one in bins), np.int64, len(bins))
    examples = np.fromiter((example for one in bins for example in one), np.int64, len(order))
    return examples, np.concatenate([[0], np.cumsum(sizes)])


def _best_fit(window: Integers, lengths: Integers, row_length: int) -> list[list[int]]:
    """Each example, longest first, goes where it leaves least room. `open_rooms` has bit n set while a row has room
    for exactly n tokens, so the tightest fit is the lowest bit from the example's length on."""
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    open_rooms = 0
    sizes = lengths[window]
    decreasing = np.argsort(-sizes, kind="stable")
    for example, size in zip(window[decreasing].tolist(), sizes[decreasing].tolist(), strict=True):
        fitting = open_rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            rows = by_room[room]
            number = rows.pop()
            if not rows:
                open_rooms ^= 1 << room
            bins[number].append(example)
        else:
            room, number = row_length, len(bins)
            bins.append([example])
        left = room - size
        by_room.setdefault(left, []).append(number)
        open_rooms |= 1 << left
    return bins
