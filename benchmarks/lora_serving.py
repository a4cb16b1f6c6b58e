"""What a LoRA adapter costs to serve on CPU: vLLM's own operators against ours, base and adapter, in one run.

    .venv/bin/python benchmarks/lora_serving.py [--requests 16] [--tokens 40] [--out FILE.json]

Starts one vLLM server after the other on the real base model with a random rank-8 adapter (speed does not depend on
what it learnt), sends the same requests to base and adapter, and prints CPU seconds a request (all processes of the
server) and tokens a second. What counts are the ratios: both servers ran on the same machine minutes apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from sluice.infra.ports import PortBook
from sluice.infra.settings import load_settings
from sluice.provenance.canonical import digest_file
from sluice.serving.adapters import AdapterShelf, load_adapter
from sluice.serving.vllm import VllmClient, VllmSettings, vllm_service
from sluice.training.base_model import unpack_smollm2

LAYERS, HIDDEN, VALUE_WIDTH, RANK = 30, 576, 192, 8


def random_adapter(folder: Path) -> Path:
    """A PEFT adapter on q_proj and v_proj with random weights."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)
    tensors = {}
    for layer in range(LAYERS):
        for module, width in (("q_proj", HIDDEN), ("v_proj", VALUE_WIDTH)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = generator.normal(0, 0.02, (RANK, HIDDEN)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = generator.normal(0, 0.02, (width, RANK)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "lora_dropout": 0.0,
        "bias": "none", "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "base",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


async def ask(url: str, model: str, requests: int, tokens: int) -> int:
    """Send all requests at once; the number of tokens that came back."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(number: int) -> int:
            context = " ".join(f"A building permit of kind {number} takes {week} weeks." for week in range(20))
            body = {
                "model": model,
                "messages": [{"role": "user", "content": f"{context} How long does it take?"}],
                "max_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
            answer = await client.post("/v1/chat/completions", json=body)
            return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

        return sum(await asyncio.gather(*(one(number) for number in range(requests))))


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and everything below it, in seconds."""
    parent = psutil.Process(pid)
    return sum(sum(p.cpu_times()[:2]) for p in (parent, *parent.children(recursive=True)))


def measure(grouped: bool, base: Path, adapter: Path, work: Path, requests: int, tokens: int) -> dict[str, Any]:
    """One server: base and adapter, after a warm-up of each."""
    settings = load_settings()
    port = PortBook(work, {}).allocate(["vllm"])["vllm"]
    shelf = AdapterShelf(work / "adapters")
    spec = vllm_service(
        VllmSettings(settings.serve_python, base, "base", shelf, port, grouped_lora=grouped, max_lora_rank=16)
    )
    with (work / "vllm.log").open("ab") as log:
        server = subprocess.Popen(
            spec.command, env={**os.environ, **spec.environment}, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        client = VllmClient(url)
        deadline = time.monotonic() + 300
        while not client.healthy():
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"vLLM did not start; its log is {work / 'vllm.log'}")
            time.sleep(0.5)
        digests = {file.name: digest_file(file) for file in adapter.iterdir()}
        load_adapter((client,), shelf, "adapter", adapter, digests)
        found: dict[str, Any] = {}
        for model in ("base", "adapter"):
            asyncio.run(ask(url, model, 2, 8))
            cpu, wall = cpu_seconds(server.pid), time.monotonic()
            came = asyncio.run(ask(url, model, requests, tokens))
            wall = time.monotonic() - wall
            found[model] = {
                "cpu_seconds_per_request": round((cpu_seconds(server.pid) - cpu) / requests, 3),
                "tokens_per_second": round(came / wall, 1),
            }
        return found
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lora_serving.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        base = unpack_smollm2(work / "base").folder
        adapter = random_adapter(work / "random-adapter")
        servers = {}
        for name, grouped in (("vllm", False), ("grouped", True)):
            folder = work / name
            folder.mkdir()
            servers[name] = measure(grouped, base, adapter, folder, given.requests, given.tokens)
            print(name, servers[name])
    cost = {
        n: s["adapter"]["cpu_seconds_per_request"] / s["base"]["cpu_seconds_per_request"] for n, s in servers.items()
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "requests": given.requests,
        "tokens": given.tokens,
        "servers": servers,
        "adapter_cost_over_base": {name: round(ratio, 2) for name, ratio in cost.items()},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["adapter_cost_over_base"]))


if __name__ == "__main__":
    main()
