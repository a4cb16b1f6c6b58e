"""The round trip of an adapter: what PEFT loads from its files scores the probe prompts as the trained model did.

Training writes the scores of its last step (`probes.json`) before it saves the last checkpoint. Then a process of its
own, `python -m sluice.training.round_trip BASE ADAPTER PROBES`, loads base model and adapter in float32 with PEFT, and
prints the largest difference. So a weight that was renamed, transposed, scaled or lost on its way into the file is
found before anything is registered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.infra.errors import IntegrityError, StepFailed
from sluice.provenance.canonical import Json
from sluice.training.recipe import Recipe

if TYPE_CHECKING:
    import torch

PROBES_FILE = "probes.json"
PROMPTS = (
    "Question: Who issues a building permit?\nAnswer:",
    "List three things to check before pouring concrete:\n1.",
    "def area(width, height):\n    return",
    "The inspection was postponed because",
)
"""Fixed: two runs are comparable, and none of them comes from anybody's traces."""
TOP = 8
"""Scores that are kept for each prompt: those of the likeliest next tokens."""
TOLERANCE: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a score by the precision that layers calculated in. float32: a run of two processes passed;
bfloat16 keeps 8 bits of a score of about 30, and was never run."""


@dataclass(frozen=True)
class RoundTrip:
    """The probes as training saw them, and the largest difference of a score that PEFT's model gave."""

    probes: Sequence[Json]
    difference: float


def probe(model: Any, base_dir: Path, device: torch.device | str = "cpu") -> list[Json]:
    """For each prompt the likeliest next tokens and their scores: `{"prompt", "tokens": [8], "scores": [8]}`.

    A sharded model gathers its weights in every call, so all processes have to take part.
    """
    import torch

    found: list[Json] = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for text, ids in zip(PROMPTS, _token_ids(base_dir), strict=True):
            scores = _next_scores(model, ids, device)
            best = torch.topk(scores, TOP)
            found.append({"prompt": text, "tokens": best.indices.tolist(), "scores": best.values.tolist()})
    model.train(training)
    return found


def check_round_trip(base_dir: Path, adapter_dir: Path, probes: Path, recipe: Recipe) -> RoundTrip:
    """Load the adapter with PEFT in a process of its own and compare. Some seconds, most of them imports.

    Raises `IntegrityError` when a score differs by more than the precision explains, `StepFailed` when the adapter
    cannot be loaded or training left no probes.
    """
    if not probes.is_file():
        raise StepFailed(
            f"Training left no scores of the probe prompts ({probes}).", hint="Train again from the start."
        )
    done = subprocess.run(
        [sys.executable, "-m", "sluice.training.round_trip", str(base_dir), str(adapter_dir), str(probes)],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise StepFailed(f"PEFT cannot load the adapter {adapter_dir}: {(done.stderr.strip() or 'no message')[-400:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    difference, limit = float(result["difference"]), TOLERANCE[recipe.precision.compute]
    # Not-a-number is larger than any limit.
    if not difference <= limit:
        raise IntegrityError(
            f"The adapter does not give back what was trained: loaded with PEFT, a score of the probe "
            f"{result['prompt']!r} differs by {difference:.4g}; {recipe.precision.compute} explains {limit:g}.",
            hint="The weights changed between training and file: look at the checkpoint and training/adapter.py.",
        )
    return RoundTrip(json.loads(probes.read_text(encoding="utf-8")), difference)


def write_probes(found: Sequence[Json], target: Path) -> None:
    """Whole or not at all: the checkpoint that is saved next counts as complete."""
    staging = target.with_name(f".{target.name}")
    staging.write_text(json.dumps(found), encoding="utf-8")
    staging.replace(target)


def _token_ids(base_dir: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base_dir / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in PROMPTS]


def _next_scores(model: Any, ids: list[int], device: torch.device | str) -> torch.Tensor:
    import torch

    output = model(input_ids=torch.tensor([ids], device=device))
    scores: torch.Tensor = getattr(output, "logits", output)[0, -1].float()
    return scores


def main(arguments: list[str]) -> None:
    """Print the prompt with the largest difference, and the difference, as JSON."""
    base_dir, adapter_dir, probes = (Path(argument) for argument in arguments)
    from sluice.training.entry import NOT_NEEDED

    for name in NOT_NEEDED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter_dir))
    model.eval()
    prompt, largest = "", 0.0
    with torch.no_grad():
        for seen, ids in zip(json.loads(probes.read_text(encoding="utf-8")), _token_ids(base_dir), strict=True):
            scores = _next_scores(model, ids, "cpu")[torch.tensor(seen["tokens"])]
            difference = float((scores - torch.tensor(seen["scores"])).abs().max())
            if not difference <= largest:
                prompt, largest = seen["prompt"], difference
    print(json.dumps({"prompt": prompt, "difference": largest}))


if __name__ == "__main__":
    main(sys.argv[1:])
