"""Examples as tensors: what the training and validation loops of one process go through.

    rows = AnswerRows.read(path, base_dir)
    plan = plan_batches(rows.lengths, recipe.data, recipe.schedule, recipe.seed)
    collate = Collation(rows, pad_token)                          # or with `packing=` the model's packing contract
    loader = StepLoader(plan, collate, schedule, dp_rank=0, dp_size=2)
    loader.start(first_step=41)                                   # AutoModel's StepScheduler iterates it
    validation = ValidationLoader(rows.lengths, collate, schedule.micro_batch_size, dp_rank=0, dp_size=2)

Labels are shifted against the inputs, as AutoModel's losses expect: the label at a position is the next token, if the
assistant says it, and -100 if not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sluice.infra.errors import InputError
from sluice.training.answer_columns import IGNORED
from sluice.training.batches import BatchPlan, Integers, Row, plan_validation
from sluice.training.chat_template import ChatTemplate
from sluice.training.examples import read_chats
from sluice.training.recipe_sections import ScheduleSection

Batch = dict[str, Any]
"""Tensors by the names that AutoModel and transformers give them, each [rows, columns] unless said otherwise."""


@dataclass(frozen=True)
class AnswerRows:
    """All examples of a split, one after another: `tokens` and `said` [all tokens]; example n is starts[n]:starts[n+1].

    Five bytes a token, so a million examples of 400 tokens take 2 GB in each process.
    """

    tokens: npt.NDArray[np.int32]
    said: npt.NDArray[np.bool_]
    starts: Integers

    @classmethod
    def read(cls, path: Path, base_dir: Path, tokenizer: Any = None) -> AnswerRows:
        """Tokenize a file of JSON lines with `messages`. Raises `InputError` for what is no answered chat.

        With a transformers tokenizer (AutoModel's), `IntegrityError` if it makes other tokens of the first chat.
        """
        chats = read_chats(path)
        if not chats:
            raise InputError(f"{path.name} holds no example.")
        template = ChatTemplate(base_dir)
        if tokenizer is not None:
            template.check_against(tokenizer, chats[0])
        encoded = template.encode(chats, path.name)
        return cls(
            np.concatenate([chat.tokens for chat in encoded]),
            np.concatenate([chat.said for chat in encoded]),
            np.concatenate([[0], np.cumsum([len(chat.tokens) for chat in encoded])]),
        )

    @property
    def lengths(self) -> Integers:
        """Inputs of each example: its tokens but the last, which is only a label."""
        return np.diff(self.starts) - 1

    def length(self, number: int) -> int:
        """Inputs of one example."""
        return int(self.starts[number + 1] - self.starts[number]) - 1

    @property
    def label_counts(self) -> Integers:
        """Tokens with a loss of each example."""
        return np.add.reduceat(self.said, self.starts[:-1], dtype=np.int64)

    def example(self, number: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Inputs and labels of one example, both [length]."""
        tokens = self.tokens[self.starts[number] : self.starts[number + 1]]
        said = self.said[self.starts[number] : self.starts[number + 1]]
        return tokens[:-1], np.where(said[1:], tokens[1:], IGNORED)


@dataclass(frozen=True)
class Collation:
    """Rows of examples to a batch, filled up to the longest row (or a multiple of `multiple_of` columns).

    `multiple_of` serves what cuts or compiles columns: 2 x cp for context parallelism, tp for sequence parallelism, the
    whole row length where every batch should have one shape.

    Without `packing` each row is one example. Such a batch has no attention mask: causal attention never looks at the
    padding behind a row, and without a mask the fast attention kernels are used. `padding_mask` is for layers that
    mix tokens otherwise (experts); others ignore it.

    `packing` says which form of mask keeps the examples of a row apart; AutoModel derives it from the model
    (`configure_packing_for_models`): block-diagonal for SDPA, lengths for flash attention. Positions restart with each
    example, and padding counts as an example of its own, so that no position is left without anything to look at.
    """

    rows: AnswerRows
    pad_token: int
    packing: Any = None
    multiple_of: int = 1

    def __call__(self, micro_batch: Sequence[Row]) -> Batch:
        longest = max(sum(self.rows.length(number) for number in row) for row in micro_batch)
        columns = max(1, -(-longest // self.multiple_of)) * self.multiple_of
        samples = [self._sample(row, columns) for row in micro_batch]
        if self.packing is None:
            batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}
            return batch | {"padding_mask": torch.stack([sample["padding"] for sample in samples])}
        from nemo_automodel.components.datasets.utils import neat_packed_collater

        return dict(neat_packed_collater(samples, packing=self.packing))

    def _sample(self, row: Row, columns: int) -> dict[str, torch.Tensor]:
        """One row, [columns] each, with the names that AutoModel's collater for packs reads."""
        inputs = np.full(columns, self.pad_token, np.int64)
        labels = np.full(columns, IGNORED, np.int64)
        positions = np.zeros(columns, np.int64)
        documents = np.full(columns, len(row) + 1, np.int64)
        at = 0
        for document, number in enumerate(row, start=1):
            tokens, wanted = self.rows.example(number)
            here = slice(at, at + len(tokens))
            inputs[here], labels[here] = tokens, wanted
            positions[here], documents[here] = np.arange(len(tokens)), document
            at += len(tokens)
        positions[at:] = np.arange(columns - at)
        named = {"input_ids": inputs, "labels": labels, "position_ids": positions, "attention_mask": documents}
        return {name: torch.from_numpy(values) for name, values in (named | {"padding": documents > len(row)}).items()}


class StepLoader:
    """The micro-batches of one process, step after step, for AutoModel's StepScheduler in place of its dataloader.

    It is one single epoch to the scheduler: `len` is that of all steps, wherever iteration starts. A thread prepares
    `ahead` micro-batches while the model computes.
    """

    def __init__(
        self,
        plan: BatchPlan,
        collate: Callable[[Sequence[Row]], Batch],
        schedule: ScheduleSection,
        *,
        dp_rank: int,
        dp_size: int,
        ahead: int = 2,
    ) -> None:
        self.plan = plan
        self.collate = collate
        self.batch_size = schedule.micro_batch_size
        self._dp_rank, self._dp_size, self._ahead = dp_rank, dp_size, ahead
        self._steps = schedule.max_steps
        self._accumulation = schedule.global_batch_size // (schedule.micro_batch_size * dp_size)
        self._first_step = 1

    def __len__(self) -> int:
        return self._steps * self._accumulation

    def start(self, first_step: int) -> None:
        """The step, counted from 1, that the next iteration begins with."""
        self._first_step = first_step

    def __iter__(self) -> Iterator[Batch]:
        return _prepared(self.collate, self._micro_batches(), self._ahead)

    def _micro_batches(self) -> Iterator[list[Row]]:
        for step in range(self._first_step, self._steps + 1):
            yield from self.plan.rank_rows(step, self._dp_rank, self._dp_size, self.batch_size)


class ValidationLoader:
    """One pass over the validation examples: each once over all processes, and equally many batches in each."""

    def __init__(
        self,
        lengths: Integers,
        collate: Callable[[Sequence[Row]], Batch],
        batch_size: int,
        *,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self.collate = collate
        self.micro_batches = plan_validation(lengths, dp_rank, dp_size, batch_size)

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        return _prepared(self.collate, iter(self.micro_batches), 2)


def _prepared(
    collate: Callable[[Sequence[Row]], Batch], micro_batches: Iterator[list[Row]], ahead: int
) -> Iterator[Batch]:
    with ThreadPoolExecutor(1, thread_name_prefix="collate") as pool:
        waiting: deque[Future[Batch]] = deque()
        for micro_batch in micro_batches:
            waiting.append(pool.submit(collate, micro_batch))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
