"""How many examples a dataset holds and how long they are, for an estimate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sluice.infra.errors import InputError
from sluice.training.examples import count_tokens, read_chats

_CHARACTERS_OF_A_TOKEN = 4
_TOKENS_OF_A_TURN = 4


@dataclass(frozen=True)
class DatasetFacts:
    """Usable examples of a dataset, their tokens on average, those that are too long, validation examples.

    `measured` is False where no tokenizer was at hand and characters were counted instead.
    """

    examples: int
    mean_tokens: float
    too_long: int
    validation: int
    measured: bool


def measure_dataset(folder: Path, max_length: int, base_dir: Path | None) -> DatasetFacts:
    """Of a dataset's folder. `base_dir` holds the base's tokenizer and chat template, where they are at hand.

    Raises `InputError` for a folder without train.jsonl, and for a line that is no answered chat.
    """
    file = folder / "train.jsonl"
    if not file.is_file():
        raise InputError(f"The dataset {str(folder)!r} holds no train.jsonl.")
    chats = read_chats(file)
    measured = base_dir is not None and (base_dir / "tokenizer.json").is_file()
    if measured and base_dir is not None:
        lengths = count_tokens(chats, base_dir, file.name)
    else:
        lengths = [
            sum(len(turn["content"]) // _CHARACTERS_OF_A_TOKEN + _TOKENS_OF_A_TURN for turn in chat) for chat in chats
        ]
    usable = [length for length in lengths if length <= max_length]
    other = folder / "validation.jsonl"
    return DatasetFacts(
        examples=len(usable),
        mean_tokens=sum(usable) / len(usable) if usable else 0.0,
        too_long=len(lengths) - len(usable),
        validation=len(read_chats(other)) if other.is_file() else 0,
        measured=measured,
    )
