"""LoRA of a Llama-3.1-8B-shaped model on one H100 or H200: what each setting of a recipe brings, row by row.

    python benchmarks/training_gpu.py [--rows NAME ...] [--steps 8] [--folder DIR] [--out FILE.json]

Weights are random, rows are 4,096 tokens of which all but the question's few have a loss, layers calculate in bfloat16.
Everything goes through `sluice.training.train` and a recipe, as a pipeline's step does. Rows add up: each has its own
change beside those of the rows before it that made training faster. The last two compare packing with padding on chats
of mixed lengths, in answer tokens a second.

NVIDIA publishes 12,473 tokens/s and 402 TFLOP/s for AutoModel's LoRA of this model on an H100, global batch 32, micro
batch 2 (docs.nvidia.com/nemo/automodel/performance/performance-summary). TFLOP/s are counted as it counts them
(`flops_per_token`), so that figures compare. Results are written after each row, and a later call with the same
`--folder` and `--out` goes on: a row takes two to three minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.random_llama import LLAMA_8B, build_random_llama, count_parameters
from benchmarks.training_rows import mixed_sizes, write_chats
from benchmarks.training_run import Run, machine, train_and_time
from sluice.infra.errors import SluiceError
from sluice.provenance.canonical import Json
from sluice.training.base_model import LlamaShape
from sluice.training.recipe import Recipe, parse_recipe

SEQUENCE = 4096
PUBLISHED = {"tokens_per_s": 12_473, "tflops": 402, "gpu": "H100", "source": "AutoModel performance summary"}
PEAK_TFLOPS: Mapping[str, Mapping[str, float]] = {
    "H100": {"bfloat16": 989.0, "fp8": 1979.0},
    "H200": {"bfloat16": 989.0, "fp8": 1979.0},
}
"""Dense peaks of the SXM boards, from NVIDIA's data sheets. MFU is counted against bfloat16, also with fp8."""
RECIPE = """
name: benchmark-8b
lora: {rank: 8, alpha: 32, target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}
data: {max_length: 4112, bucket_batches: 1}
schedule: {max_steps: 1000, global_batch_size: 32, micro_batch_size: 1}
optimizer: {learning_rate: 1.0e-5, warmup_steps: 0, decay: constant}
parallelism: {processes: 1, backend: nccl, activation_checkpointing: true}
precision: {parameters: bfloat16, compute: bfloat16, reduce: float32, fused_loss: false}
checkpoints: {every_steps: 1000, upload: false}
samples: {prompts: 0}
budget: {timeout_minutes: 30}
"""


@dataclass(frozen=True)
class Row:
    """One change of the recipe. `mixed` rows train on chats of mixed lengths, beside the cumulative ones."""

    name: str
    changes: Mapping[str, Json] = field(default_factory=dict)
    mixed: bool = False


ROWS = (
    Row("baseline"),
    Row("no activation checkpointing", {"parallelism.activation_checkpointing": False}),
    Row("compile", {"precision.compile": True}),
    Row("fused loss", {"precision.fused_loss": True}),
    Row("micro batch 2", {"schedule.micro_batch_size": 2}),
    Row("micro batch 4", {"schedule.micro_batch_size": 4}),
    # A projection with a low-rank pair keeps its precision, so float8 needs some without one.
    Row("pairs on q and v only", {"lora.target_modules": ["q_proj", "v_proj"]}),
    Row("fp8", {"lora.target_modules": ["q_proj", "v_proj"], "precision.fp8": True}),
    Row("mixed lengths, padded", {"data.bucket_batches": 16}, mixed=True),
    Row("mixed lengths, packed", {"data.packing": True, "data.pack_length": 4112}, mixed=True),
)


def flops_per_token(shape: LlamaShape, sequence: int, trained_share: float = 1.0) -> float:
    """Floating-point operations of training one token, as AutoModel counts them.

    `llama3_flops` of nemo_automodel/components/utils/flops_utils.py: 6 for each weight of a product (2 forward, 4
    backward), causal attention at half; times (2 + share) / 3, because frozen weights need no gradient of their own
    (recipes/llm/benchmark.py:236). An untied output head is counted, the embedding is none.
    """
    per_layer = (
        12
        + 12 * shape.key_value_heads / shape.heads
        + 18 * shape.intermediate / shape.hidden
        + 12 * sequence / shape.hidden * 0.5
        + 6 * shape.vocabulary / (shape.layers * shape.hidden)
    )
    return shape.layers * shape.hidden**2 * per_layer * (2 + trained_share) / 3


def pairs_parameters(shape: LlamaShape, recipe: Recipe) -> int:
    """Trained parameters: A [rank, in] and B [out, rank] of each adapted projection."""
    sizes = shape.tensors()
    adapted = [size for name, size in sizes.items() if name.split(".")[-2] in recipe.lora.target_modules]
    return sum(recipe.lora.rank * sum(size) for size in adapted)


def peak_tflops(device: str) -> float | None:
    """Of bfloat16; None for a device that is not in the table."""
    return next((peaks["bfloat16"] for name, peaks in PEAK_TFLOPS.items() if name in device), None)


def recipe_of(row: Row, done: Sequence[Mapping[str, Any]]) -> Recipe:
    """The row's recipe: the baseline, the changes of the rows before it that were kept, its own."""
    changes: dict[str, Json] = {}
    before = ROWS[: ROWS.index(row)]
    kept = {one["name"] for one in done if one.get("kept")}
    for one in before:
        if one.name in kept and not one.mixed:
            changes.update(one.changes)
    if row.mixed and changes.get("precision.fp8"):
        # Packs and pads are compared in the precision of all other published figures.
        changes |= {"precision.fp8": False}
    return parse_recipe(RECIPE, "benchmark").with_overrides({**changes, **row.changes})


def result_of(
    row: Row, run: Run, recipe: Recipe, shape: LlamaShape, device: str, before: float | None
) -> dict[str, Any]:
    """One line of the table; `before` are tokens a second of the last row that was kept."""
    seconds = sum(run.times)
    share = pairs_parameters(shape, recipe) / count_parameters(shape, tied=False)
    speed = run.tokens / seconds
    tflops = speed * flops_per_token(shape, SEQUENCE, share) / 1e12
    peak = peak_tflops(device)
    found: dict[str, Any] = {
        "name": row.name,
        "step_s": round(run.step_s, 3),
        "tokens_per_s": round(speed),
        "label_tokens_per_s": round(run.label_tokens / seconds),
        "tflops": round(tflops, 1),
        "mfu": round(tflops / peak, 3) if peak else None,
        "memory_gib": round(run.memory_gib, 1),
        "start_up_s": round(run.start_up_s, 1),
        "gain": round(speed / before, 3) if before else None,
    }
    if row.mixed:
        # Attention is shorter than a full row's, so the formula would flatter.
        found |= {"tflops": None, "mfu": None, "gain": None}
    return found | {"kept": not row.mixed and (before is None or speed > before)}


def require_gpu() -> str:
    """The device's name, or the end with a sentence."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            "This benchmark needs an NVIDIA GPU with 80 GB or more; torch sees none here. "
            "benchmarks/training.py is the one for processors."
        )
    return str(torch.cuda.get_device_name())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'row':<30}{'tokens/s':>10}{'gain':>8}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>7}{'answer tokens/s':>17}"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['name']:<30}{row['failed'][:90]}")
            continue
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "-"
        lines.append(
            f"{row['name']:<30}{row['tokens_per_s']:>10,}{row['gain'] or '-':>8}{row['tflops'] or '-':>9}{mfu:>7}"
            f"{row['memory_gib']:>7}{row['label_tokens_per_s']:>17,}"
        )
    lines.append(f"{'NVIDIA, H100 (published)':<30}{PUBLISHED['tokens_per_s']:>10,}{'':>8}{PUBLISHED['tflops']:>9}")
    return "\n".join(lines)


def prepare(folder: Path, shape: LlamaShape) -> tuple[Path, Path, Path]:
    """Base model, full rows and mixed rows in `folder`, made once. 8B in bfloat16 is 16 GB."""
    base, full, mixed = folder / "base", folder / "full", folder / "mixed"
    if not (base / "config.json").exists():
        build_random_llama(base, shape, tied=False, dtype="BF16")
    if not full.exists():
        # One token a word; the template adds 32, so inputs are SEQUENCE long: one token of a chat is a label only.
        write_chats(full, [(16, SEQUENCE - 47)] * 64)
    if not mixed.exists():
        write_chats(mixed, mixed_sizes(2000, SEQUENCE - 64))
    return base, full, mixed


def measure(row: Row, places: tuple[Path, Path, Path], recipe: Recipe, work: Path, steps: int) -> Run:
    shutil.rmtree(work, ignore_errors=True)
    return train_and_time(places[0], places[2] if row.mixed else places[1], recipe, work, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="default: all that are missing")
    parser.add_argument("--steps", type=int, default=8, help="of each run, two of them to warm up")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sluice-training-gpu"), help="model and work folders")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training_gpu.json"))
    arguments = parser.parse_args()
    device = require_gpu()
    places = prepare(arguments.folder, LLAMA_8B)
    done: list[dict[str, Any]] = json.loads(arguments.out.read_text())["rows"] if arguments.out.is_file() else []
    wanted = arguments.rows or [row.name for row in ROWS if row.name not in {one["name"] for one in done}]
    for row in (one for one in ROWS if one.name in wanted):
        done = [one for one in done if one["name"] != row.name]
        recipe = recipe_of(row, done)
        kept = [one["tokens_per_s"] for one in done if one.get("kept")]
        try:
            run = measure(row, places, recipe, arguments.folder / "work", arguments.steps)
            done.append(result_of(row, run, recipe, LLAMA_8B, device, kept[-1] if kept else None))
        except SluiceError as error:
            # Not enough memory, or a setting that does not run here: that is a result too.
            done.append({"name": row.name, "failed": str(error), "kept": False})
        result = {"machine": machine() | {"device": device}, "steps": arguments.steps, "published": PUBLISHED}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result | {"rows": done}, indent=2) + "\n")
        print(json.dumps(done[-1]), flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
