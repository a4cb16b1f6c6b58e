"""A base model with an adapter merged into it: one whole model, served at the base's speed and without PEFT.

A process of its own, `python -m sluice.training.merge BASE ADAPTER OUTPUT`, loads both in float32 and lets PEFT add the
adapter to the weights (`merge_and_unload`). Before anything is written it compares scores of the probe prompts three
times: adapter, merged in float32, merged and rounded to the base's dtypes. And it lets the adapter answer the prompts
greedily, and asks what is stored for the log-probability of each token of those answers. QLoRA's adapters are merged
into the unquantised base, as is usual; what was trained on 4 bits is then served on 16.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.infra.errors import IntegrityError, StepFailed
from sluice.training.full_model import check_model, open_model, without_tied_head, write_model
from sluice.training.round_trip import (
    COMPUTED,
    STORED,
    largest_difference,
    leave_out_slow_imports,
    load_base,
    probe,
    prompt_ids,
    run_isolated,
)
from sluice.training.safetensors_file import RawTensor
from sluice.training.staged_folder import staged

if TYPE_CHECKING:
    import torch

ANSWER_TOKENS = 16
"""Tokens of each greedy answer that the two are compared on."""
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Merged:
    """A merged model, and how far its scores of the probe prompts lie from the adapter's: in float32, and as stored.

    `answer_difference` is the largest difference of a log-probability (nats), of what is stored, along the adapter's
    greedy answers; `agreement` the share of their tokens that it would have chosen too.
    """

    model_dir: Path
    exact_difference: float
    stored_difference: float
    answer_difference: float
    agreement: float


def merge_adapter(base_dir: Path, adapter_dir: Path, target: Path) -> Merged:
    """Make `target` hold the merged model, and nothing else. Needs memory for the base in float32 and as it is stored.

    Raises `StepFailed` when PEFT cannot merge, `IntegrityError` when the merged model scores other than the adapter.
    """
    with staged(target) as folder:
        done = run_isolated("sluice.training.merge", [str(base_dir), str(adapter_dir), str(folder)])
        if done.returncode:
            why = (done.stderr.strip() or "no message")[-400:]
            raise StepFailed(f"The adapter {adapter_dir} cannot be merged into {base_dir}: {why}")
        result = json.loads(done.stdout.splitlines()[-1])
        exact, stored, answers = (float(result[name]) for name in ("exact", "stored", "answers"))
        rounding = COMPUTED["float32"] + max(STORED[tensor.dtype] for tensor in open_model(base_dir).values())
        for what, difference, limit in (
            ("in float32, a score of a probe prompt", exact, COMPUTED["float32"]),
            ("as it is stored, a score of a probe prompt", stored, rounding),
            # A log-probability is a score less the logarithm of their sum: each moves by the rounding at most.
            ("as it is stored, a log-probability along a greedy answer", answers, 2 * rounding),
        ):
            # Not-a-number is larger than any limit.
            if not difference <= limit:
                raise IntegrityError(
                    f"The merged model does not do what the adapter does: {what} differs by {difference:.4g}; "
                    f"its precision explains {limit:g}.",
                    hint="Serve the adapter itself, or look at training/merge.py.",
                )
        check_model(folder, base_dir)
    return Merged(target, exact, stored, answers, float(result["agreement"]))


def main(arguments: list[str]) -> None:
    """Write the merged model and print the differences as JSON."""
    base_dir, adapter_dir, output = (Path(argument) for argument in arguments)
    leave_out_slow_imports()
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base_dir, "lora"), str(adapter_dir))
    seen = probe(model, base_dir)
    answers = [_answer(model.eval(), ids) for ids in prompt_ids(base_dir)]
    told = [_log_probabilities(model, one) for one in answers]
    merged = model.merge_and_unload()
    exact = largest_difference(merged, base_dir, seen, "cpu")[1]
    weights = merged.state_dict()
    tensors = {}
    with torch.no_grad():
        for name, wanted in without_tied_head(open_model(base_dir), base_dir).items():
            values = weights[name].to(getattr(torch, _DTYPES[wanted.dtype])).contiguous()
            # The model gets what the file gets, so that the last comparison sees the rounding.
            weights[name].copy_(values)
            tensors[name] = RawTensor(wanted.dtype, tuple(values.shape), values.flatten().view(torch.uint8).numpy())
    stored = largest_difference(merged, base_dir, seen, "cpu")[1]
    before, after = torch.cat(told), torch.cat([_log_probabilities(merged, one) for one in answers])
    chosen = torch.cat([one[-ANSWER_TOKENS:] for one in answers])
    spoken = before.gather(1, chosen[:, None]) - after.gather(1, chosen[:, None])
    write_model(output, tensors, base_dir)
    agreement = float((after.argmax(1) == chosen).float().mean())
    print(json.dumps({"exact": exact, "stored": stored, "answers": float(spoken.abs().max()), "agreement": agreement}))


def _answer(model: Any, prompt: list[int]) -> torch.Tensor:
    """The prompt and a greedy answer to it, [prompt + ANSWER_TOKENS] tokens."""
    import torch

    tokens = torch.tensor(prompt)
    with torch.no_grad():
        for _ in range(ANSWER_TOKENS):
            tokens = torch.cat((tokens, model(input_ids=tokens[None]).logits[0, -1].argmax()[None]))
    return tokens


def _log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of every token of the vocabulary at each place of the answer, [ANSWER_TOKENS, vocabulary]."""
    import torch

    with torch.no_grad():
        scores = model(input_ids=tokens[None]).logits[0, -ANSWER_TOKENS - 1 : -1]
    return torch.log_softmax(scores.float(), dim=-1)


if __name__ == "__main__":
    main(sys.argv[1:])
