"""Datasets for the training benchmarks: chats whose lengths in tokens are known."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ("board", "wood", "wall", "floor", "water", "heat", "light", "house", "stone", "glass", "sand", "door")
"""Each one token of the tokenizer when a space stands before it."""


def write_chats(folder: Path, sizes: list[tuple[int, int]], *, seed: int = 0) -> Path:
    """A dataset folder with one chat for each (words of the question, words of the answer). Equal sizes give equal
    numbers of tokens."""
    drawn = random.Random(seed)
    folder.mkdir(parents=True)
    with (folder / "train.jsonl").open("w") as file:
        for number, (asked, answered) in enumerate(sizes):
            question, answer = (" ".join(drawn.choices(WORDS, k=count)) for count in (asked, answered))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": str(number), "messages": messages}) + "\n")
    return folder


def mixed_sizes(count: int, longest: int, *, seed: int = 0) -> list[tuple[int, int]]:
    """Sizes as curated chats have them: many short, few long (log-normal), the answer about a quarter."""
    drawn = random.Random(seed)
    sizes = []
    for _ in range(count):
        words = min(longest, max(16, round(drawn.lognormvariate(4.4, 0.7))))
        answer = max(4, round(words * drawn.uniform(0.1, 0.4)))
        sizes.append((words - answer, answer))
    return sizes
