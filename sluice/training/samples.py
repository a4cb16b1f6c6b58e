"""Answers during training: greedy, at fixed prompts, by the model as it is trained (sharded over all processes)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from sluice.training.chat_template import ChatTemplate
from sluice.training.examples import read_chats


@dataclass(frozen=True)
class Prompt:
    """The chat up to the answer as tokens, its last message as text, the dataset's answer, and how a turn ends."""

    text: str
    reference: str
    ids: tuple[int, ...]
    end: int | None
    tokenizer: Tokenizer


def read_prompts(split: Path, base_dir: Path, count: int) -> list[Prompt]:
    """The first `count` chats of a split that was checked before."""
    tokenizer = Tokenizer.from_file(str(base_dir / "tokenizer.json"))
    settings = json.loads((base_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    eos = settings.get("eos_token")
    end = tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos) if eos else None
    template = ChatTemplate(base_dir)
    found = []
    for messages in read_chats(split)[:count]:
        *asked, last = messages
        text = template.text(asked, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        found.append(Prompt(asked[-1]["content"] if asked else "", last["content"], tuple(ids), end, tokenizer))
    return found


def answer(model: Any, prompt: Prompt, max_tokens: int, device: torch.device) -> str:
    """Greedy continuation, one whole forward pass a token: a sharded model has no cache, and prompts are few.

    All processes call it together. Process 0's choice counts for all, so that rounding cannot part them.
    """
    training = model.training
    model.eval()
    ids = torch.tensor([prompt.ids], device=device)
    with torch.no_grad():
        for _ in range(max_tokens):
            output = model(input_ids=ids)
            following = getattr(output, "logits", output)[:, -1].argmax(dim=-1, keepdim=True)
            if dist.is_initialized():
                dist.broadcast(following, src=0)
            if int(following) == prompt.end:
                break
            ids = torch.cat((ids, following), dim=1)
    model.train(training)
    return str(prompt.tokenizer.decode(ids[0, len(prompt.ids) :].tolist()))
