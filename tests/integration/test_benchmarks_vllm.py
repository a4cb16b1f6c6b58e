"""Benchmark tasks against the real vLLM: prompt log-probabilities and chat answers through our serving path."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from sluice.evaluation.benchmark_endpoint import Endpoint
from sluice.evaluation.benchmark_tasks import find_tasks
from sluice.evaluation.benchmarks import benchmark_scores, run_benchmarks
from sluice.evaluation.cache import open_cache
from sluice.serving.adapters import AdapterShelf, load_adapter
from sluice.serving.vllm import VllmClient, VllmSettings
from tests.integration.test_bring_up_vllm import SERVE_PYTHON, running_vllm
from tests.serving.gateway import free_port
from tests.serving.tiny_llama import write_adapter, write_tiny_llama
from tests.serving.vllm_server import digests_of

pytestmark = pytest.mark.integration

Array = Any
CONTEXT, CONTINUATIONS = "Question: Where does the sun rise?\nAnswer:", (" In the east", " In the west", " Nowhere")


@pytest.mark.skipif(not SERVE_PYTHON.exists(), reason=f"no vLLM environment at {SERVE_PYTHON} (make setup)")
def test_likelihoods_and_answers_come_from_the_served_model(tmp_path: Path) -> None:
    from sluice.evaluation.benchmark_model import ServedModel

    base = tmp_path / "base"
    write_tiny_llama(base)
    write_adapter(tmp_path / "adapter", scale=0.5, seed=1)
    shelf = AdapterShelf(tmp_path / "shelf")
    settings = VllmSettings(SERVE_PYTHON, base, "app-base", shelf, free_port(), dtype="float32", max_model_len=512)
    tasks = find_tasks(["general-choice", "general-short"])
    requests = [SimpleNamespace(args=(CONTEXT, continuation)) for continuation in CONTINUATIONS]
    found: dict[str, list[tuple[float, bool]]] = {}
    with running_vllm(settings, tmp_path / "vllm.log"), VllmClient(settings.url) as client:
        load_adapter((client,), shelf, "app-adapter", tmp_path / "adapter", digests_of(tmp_path / "adapter"))
        for name in ("app-base", "app-adapter"):
            with open_cache(tmp_path / "cache.sqlite") as cache:
                endpoint = Endpoint(f"{settings.url}/v1", name, name, cache)
                samples = run_benchmarks(tasks, endpoint, base=base, limit=6)
                found[name] = ServedModel(endpoint, base, lambda *_: None).loglikelihood(requests)
            assert {len(column.values) for column in benchmark_scores(tasks, samples).columns.values()} == {6}
            assert all(sample.value in (0.0, 1.0) for sample in samples), samples
    expected = [likelihood(base, CONTEXT, continuation) for continuation in CONTINUATIONS]
    assert [value for value, _ in found["app-base"]] == pytest.approx(expected, abs=1e-3)
    # Another model, other likelihoods: the adapter was asked where it was named.
    differences = [abs(a - b) for (a, _), (b, _) in zip(found["app-base"], found["app-adapter"], strict=True)]
    assert min(differences) > 0.01, differences


def likelihood(base: Path, context: str, continuation: str) -> float:
    """Log-likelihood of `continuation` after `context`: the llama of Touvron et al. 2023, written out (transformers
    would take longer to import than all of this test)."""
    config = json.loads((base / "config.json").read_text())
    weights = load_file(base / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    ids = tokenizer.encode(context + continuation, add_special_tokens=False).ids
    start = len(tokenizer.encode(context, add_special_tokens=False).ids)
    length, width = len(ids), config["head_dim"]
    angles = np.arange(length)[:, None] / config["rope_parameters"]["rope_theta"] ** (np.arange(0, width, 2) / width)
    cosine, sine = np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)
    hidden = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):

        def part(name: str, at: str = f"model.layers.{layer}") -> Array:
            return weights[f"{at}.{name}.weight"]

        def heads(name: str, x: Array) -> Array:
            return (x @ part(f"self_attn.{name}").T).reshape(length, -1, width).swapaxes(0, 1)

        def rotated(x: Array) -> Array:
            return x * cosine + np.concatenate((-x[..., width // 2 :], x[..., : width // 2]), -1) * sine

        x = normed(hidden, part("input_layernorm"))
        query, key, value = rotated(heads("q_proj", x)), rotated(heads("k_proj", x)), heads("v_proj", x)
        shared = len(query) // len(key)
        key, value = key.repeat(shared, 0), value.repeat(shared, 0)
        attention = query @ key.swapaxes(1, 2) / np.sqrt(width) + np.triu(np.full((length, length), -np.inf), 1)
        mixed = (np.exp(log_softmax(attention)) @ value).swapaxes(0, 1).reshape(length, -1)
        hidden = hidden + mixed @ part("self_attn.o_proj").T
        x = normed(hidden, part("post_attention_layernorm"))
        gate = x @ part("mlp.gate_proj").T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * (x @ part("mlp.up_proj").T)) @ part("mlp.down_proj").T
    logits = log_softmax(normed(hidden, weights["model.norm.weight"]) @ weights["lm_head.weight"].T)
    return float(sum(logits[place - 1, ids[place]] for place in range(start, length)))


def normed(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
