"""A base model with an adapter merged into it: one whole model, served at the base's speed and without PEFT.

A process of its own, `python -m sluice.training.merge BASE ADAPTER OUTPUT`, loads both in float32 and lets PEFT add the
adapter to the weights (`merge_and_unload`). Before anything is written it compares scores of the probe prompts three
times: adapter, merged in float32, merged and rounded to the base's dtypes. QLoRA's adapters are merged into the
unquantised base, as is usual; what was trained on 4 bits is then served on 16.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from sluice.infra.errors import IntegrityError, StepFailed
from sluice.training.full_model import check_model, open_model, without_tied_head, write_model
from sluice.training.round_trip import (
    COMPUTED,
    STORED,
    largest_difference,
    leave_out_slow_imports,
    load_base,
    probe,
    run_isolated,
)
from sluice.training.safetensors_file import RawTensor
from sluice.training.staged_folder import staged

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Merged:
    """A merged model, and how far its scores of the probe prompts lie from the adapter's: in float32, and as stored."""

    model_dir: Path
    exact_difference: float
    stored_difference: float


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
        exact, stored = float(result["exact"]), float(result["stored"])
        rounding = COMPUTED["float32"] + max(STORED[tensor.dtype] for tensor in open_model(base_dir).values())
        for what, difference, limit in (
            ("in float32", exact, COMPUTED["float32"]),
            ("as it is stored", stored, rounding),
        ):
            # Not-a-number is larger than any limit.
            if not difference <= limit:
                raise IntegrityError(
                    f"The merged model does not do what the adapter does: {what}, a score of a probe prompt differs by "
                    f"{difference:.4g}; its precision explains {limit:g}.",
                    hint="Serve the adapter itself, or look at training/merge.py.",
                )
        check_model(folder, base_dir)
    return Merged(target, exact, stored)


def main(arguments: list[str]) -> None:
    """Write the merged model and print the two differences as JSON."""
    base_dir, adapter_dir, output = (Path(argument) for argument in arguments)
    leave_out_slow_imports()
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base_dir, "lora"), str(adapter_dir))
    seen = probe(model, base_dir)
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
    write_model(output, tensors, base_dir)
    print(json.dumps({"exact": exact, "stored": stored}))


if __name__ == "__main__":
    main(sys.argv[1:])
