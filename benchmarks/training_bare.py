"""The loop we are compared with: transformers, PEFT and torch's FSDP2, nothing else. torchrun executes it.

    torchrun ... benchmarks/training_bare.py SETTINGS.json

It is written to be fast: rows are ready as tensors, nothing is logged but the loss, nothing is checked or saved. Each
step is done twice, once projecting every token onto the vocabulary as a plain loop does (`all`), once only the columns
with labels as ours does (`answers`), in alternating order, on the same model.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.time()


def main(path: Path) -> None:
    import numpy as np
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    settings = json.loads(path.read_text())
    imported = time.time()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(settings["seed"])
    model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.float32)
    model.config.use_cache = False
    lora = settings["lora"]
    model = get_peft_model(
        model,
        LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["target_modules"], task_type="CAUSAL_LM"
        ),
    )
    model.train()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        again = settings["reshard_after_forward"]
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=again)
        fully_shard(model, mesh=mesh, reshard_after_forward=again)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0)
    rows = np.load(settings["rows"])
    inputs, labels = (torch.from_numpy(rows[name][rank::world].astype(np.int64)) for name in ("inputs", "labels"))
    columns = (labels != -100).any(dim=0).nonzero().flatten()

    def step(variant: str) -> float:
        wanted = labels if variant == "all" else labels[:, columns]
        count = (wanted != -100).sum()
        dist.all_reduce(count)
        options: dict[str, Any] = {} if variant == "all" else {"logits_to_keep": columns}
        scores = model(input_ids=inputs, **options).logits
        # Summed over tokens, divided by those of all processes; FSDP takes the mean over processes.
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1).float(), wanted.flatten(), reduction="sum")
        (loss * world / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach() / count
        dist.all_reduce(shown)
        return float(shown)

    times: dict[str, list[float]] = {"all": [], "answers": []}
    first_loss, ready = 0.0, time.time()
    for number in range(settings["steps"]):
        for variant in ("all", "answers") if number % 2 else ("answers", "all"):
            begun = time.perf_counter()
            loss = step(variant)
            times[variant].append(time.perf_counter() - begun)
            first_loss = first_loss or loss
    if rank == 0:
        said = {
            "times": times,
            "first_loss": first_loss,
            "import_s": imported - STARTED,
            "start_up_s": ready - float(os.environ["BENCHMARK_LAUNCHED"]),
            "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        Path(settings["out"]).write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
