"""What an adapter says to some prompts according to the training library: PEFT on transformers, float32, greedy.

A process of its own, `python -m sluice.training.parity_reference BASE ADAPTER REQUEST`, loads both and prints for each
prompt its tokens, the answer's tokens, and the log-probabilities that a server must agree with. The chat is rendered as
training renders it, so a server with another template or tokenizer is found too. An adapter of QLoRA is loaded on the
base as it is served, which is not quantised.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sluice.infra.errors import StepFailed
from sluice.provenance.canonical import Json
from sluice.training.chat_template import ChatTemplate
from sluice.training.round_trip import leave_out_slow_imports, load_base, run_isolated

LIKELIEST = 20
"""Tokens whose log-probability is kept for each step: the answer may part from the server's at a near tie."""


def make_reference(base_dir: Path, adapter_dir: Path, prompts: Sequence[str], max_tokens: int) -> list[Json]:
    """For each prompt `{"prompt": token ids, "steps": [[[token id, log-probability], ...], ...]}`: the likeliest tokens
    of each step in falling order, of which the first was taken. Ten seconds for a small model, most of them imports.

    Raises `StepFailed` when base and adapter cannot be loaded together.
    """
    with tempfile.TemporaryDirectory(prefix="sluice-reference-") as folder:
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"prompts": list(prompts), "max_tokens": max_tokens}), encoding="utf-8")
        done = run_isolated("sluice.training.parity_reference", [str(base_dir), str(adapter_dir), str(request)])
    if done.returncode:
        raise StepFailed(
            f"The training library cannot answer with the adapter {adapter_dir}: "
            f"{(done.stderr.strip() or 'no message')[-400:]}",
            hint="Without its answers nobody can tell whether the server gives the same ones.",
        )
    found: list[Json] = json.loads(done.stdout.splitlines()[-1])
    return found


def answer(model: Any, ids: Sequence[int], max_tokens: int, ends: frozenset[int]) -> list[list[tuple[int, float]]]:
    """The likeliest tokens of each greedy step, (id, log-probability), up to a token of `ends` or `max_tokens`."""
    import torch

    steps: list[list[tuple[int, float]]] = []
    given, past = torch.tensor([list(ids)]), None
    with torch.no_grad():
        for _ in range(max_tokens):
            output = model(input_ids=given, past_key_values=past, use_cache=True)
            past = output.past_key_values
            best = torch.topk(torch.log_softmax(output.logits[0, -1].float(), dim=-1), LIKELIEST)
            steps.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
            taken = steps[-1][0][0]
            if taken in ends:
                break
            given = torch.tensor([[taken]])
    return steps


def main(arguments: list[str]) -> None:
    """Print what `make_reference` returns."""
    base_dir, adapter_dir, request_file = (Path(argument) for argument in arguments)
    request = json.loads(request_file.read_text(encoding="utf-8"))
    leave_out_slow_imports()
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base_dir, "lora"), str(adapter_dir)).eval()
    ending = model.generation_config.eos_token_id
    ends = frozenset(ending if isinstance(ending, list) else [] if ending is None else [ending])
    template = ChatTemplate(base_dir)
    found = []
    for prompt in request["prompts"]:
        ids = template.prompt([{"role": "user", "content": prompt}])
        found.append({"prompt": ids, "steps": answer(model, ids, request["max_tokens"], ends)})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
