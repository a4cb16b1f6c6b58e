"""The round trip of what training made: loaded from its files it scores the probe prompts as the trained model did.

Training writes the scores of its last step (`probes.json`) before it exports. Then a process of its own, `python -m
sluice.training.round_trip BASE OUTPUT PROBES METHOD PRECISION`, loads the output in float32 (an adapter with PEFT on
its base, a whole model with transformers), and prints the largest difference. So a weight that was renamed, transposed,
scaled or lost on its way into the file is found before anything is registered.
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

from sluice.infra.errors import IntegrityError, StepFailed, UnavailableError
from sluice.provenance.canonical import Json
from sluice.training.adapter import CONFIG as ADAPTER_CONFIG
from sluice.training.recipe import Recipe
from sluice.training.safetensors_file import read_header

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
COMPUTED: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest difference of a score by the precision that layers calculated in. float32: other kernels, another order of
additions (a run of two processes stayed below 1e-4). bfloat16: layers keep 8 bits; SmolLM2-135M with an adapter on all
seven projections differs by up to 0.24 from its float32 self on these prompts, and larger models have larger scores."""
STORED: Mapping[str, float] = {"F32": 0.0, "F16": 0.1, "BF16": 0.25}
"""What rounding the weights of a whole model to the dtype of its file adds; the same model: F16 0.02, BF16 0.045.
Adapters are stored in float32, which loses nothing."""


@dataclass(frozen=True)
class RoundTrip:
    """The probes as training saw them, and the largest difference of a score that the loaded output gave."""

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
        for text, ids in zip(PROMPTS, prompt_ids(base_dir), strict=True):
            scores = _next_scores(model, ids, device)
            best = torch.topk(scores, TOP)
            found.append({"prompt": text, "tokens": best.indices.tolist(), "scores": best.values.tolist()})
    model.train(training)
    return found


def check_round_trip(base_dir: Path, output_dir: Path, probes: Path, recipe: Recipe) -> RoundTrip:
    """Load an adapter or a whole model in a process of its own and compare. Some seconds, most of them imports.

    Raises `IntegrityError` when a score differs by more than the precision explains, `StepFailed` when the output
    cannot be loaded or training left no probes.
    """
    if not probes.is_file():
        raise StepFailed(
            f"Training left no scores of the probe prompts ({probes}).", hint="Train again from the start."
        )
    done = run_isolated(
        "sluice.training.round_trip",
        [str(base_dir), str(output_dir), str(probes), recipe.method, recipe.precision.compute],
    )
    if done.returncode:
        raise StepFailed(f"The output {output_dir} cannot be loaded: {(done.stderr.strip() or 'no message')[-400:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    difference, limit = float(result["difference"]), tolerance(output_dir, recipe)
    # Not-a-number is larger than any limit.
    if not difference <= limit:
        raise IntegrityError(
            f"The output does not give back what was trained: loaded from {output_dir}, a score of the probe "
            f"{result['prompt']!r} differs by {difference:.4g}; its precision explains {limit:g}.",
            hint="The weights changed between training and file: look at the export and at training/adapter.py.",
        )
    return RoundTrip(json.loads(probes.read_text(encoding="utf-8")), difference)


def tolerance(output_dir: Path, recipe: Recipe) -> float:
    """The largest difference that the precision of calculating and of storing explains."""
    stored = {tensor.dtype for path in output_dir.glob("*.safetensors") for tensor in read_header(path).values()}
    return COMPUTED[recipe.precision.compute] + max((STORED[dtype] for dtype in stored), default=0.0)


def run_isolated(module: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """`python -m module` in a process of its own: what it loads leaves memory with it, and no hub is asked."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


def leave_out_slow_imports() -> None:
    """Optional imports of transformers and PEFT that take seconds and serve nothing here."""
    from sluice.training.entry import NOT_NEEDED

    for name in NOT_NEEDED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def write_probes(found: Sequence[Json], target: Path) -> None:
    """Whole or not at all: the checkpoint that is saved next counts as complete."""
    staging = target.with_name(f".{target.name}")
    staging.write_text(json.dumps(found), encoding="utf-8")
    staging.replace(target)


def prompt_ids(base_dir: Path) -> list[list[int]]:
    """The probe prompts as tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base_dir / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in PROMPTS]


def _next_scores(model: Any, ids: list[int], device: torch.device | str) -> torch.Tensor:
    import torch

    output = model(input_ids=torch.tensor([ids], device=device))
    scores: torch.Tensor = getattr(output, "logits", output)[0, -1].float()
    return scores


def largest_difference(
    model: Any, base_dir: Path, seen: Sequence[Json], device: torch.device | str
) -> tuple[str, float]:
    """The prompt whose scores differ most from those that were seen, and by how much."""
    import torch

    prompt, largest = "", 0.0
    model.eval()
    with torch.no_grad():
        for one, ids in zip(seen, prompt_ids(base_dir), strict=True):
            scores = _next_scores(model, ids, device).cpu()[torch.tensor(one["tokens"])]
            difference = float((scores - torch.tensor(one["scores"])).abs().max())
            if not difference <= largest:
                prompt, largest = one["prompt"], difference
    return prompt, largest


def load_base(base_dir: Path, method: str, compute: str = "float32") -> Any:
    """The base as the adapter was trained on it: in float32, for QLoRA in 4 bits on the accelerator (the settings are
    those of `automodel.py`). Raises `UnavailableError` where QLoRA finds no CUDA."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if method != "qlora":
        return AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    if not torch.cuda.is_available():
        raise UnavailableError(
            "An adapter of method qlora is checked on its quantised base, which needs CUDA.",
            hint="Run the check where the adapter was trained.",
        )
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, compute),
    )
    return AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=quantised, device_map={"": 0})


def main(arguments: list[str]) -> None:
    """Print the prompt with the largest difference, and the difference, as JSON."""
    base_dir, output_dir, probes = (Path(argument) for argument in arguments[:3])
    leave_out_slow_imports()
    import torch
    from transformers import AutoModelForCausalLM

    if (output_dir / ADAPTER_CONFIG).is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_base(base_dir, *arguments[3:]), str(output_dir))
    else:
        model = AutoModelForCausalLM.from_pretrained(output_dir, dtype=torch.float32)
    device = next(model.parameters()).device
    prompt, difference = largest_difference(model, base_dir, json.loads(probes.read_text(encoding="utf-8")), device)
    print(json.dumps({"prompt": prompt, "difference": difference}))


if __name__ == "__main__":
    main(sys.argv[1:])
