"""What each method leaves, with the real parts: AutoModel builds, trains and exports, PEFT and transformers load.

One process does all that needs AutoModel (its imports take most of the time), and says what it saw.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sluice.provenance.artifacts import describe_directory
from sluice.training.adapter import WEIGHTS, read_config
from sluice.training.base_model import build_tiny_llama
from sluice.training.full_model import check_model, collect_model, open_model
from sluice.training.merge import merge_adapter
from sluice.training.safetensors_file import read_float32

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SCRIPT = """
import json, sys
from pathlib import Path
from sluice.training.adapter import collect_adapter
from sluice.training.full_model import collect_model
from sluice.training.recipe import load_recipe
from sluice.training.round_trip import leave_out_slow_imports, main as compare, probe, write_probes
from sluice.training.safetensors_file import read_float32, write_tensors

leave_out_slow_imports()
base, work = Path(sys.argv[1]), Path(sys.argv[2])
import torch
import torch.distributed as dist
from sluice.training import cpu_compatibility
from sluice.training.dora import start_magnitudes

cpu_compatibility.install()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from nemo_automodel.components.models.common import BackendConfig


def build(peft):
    torch.manual_seed(7)
    return NeMoAutoModelForCausalLM.from_pretrained(
        pretrained_model_name_or_path=str(base), torch_dtype="float32", attn_implementation="sdpa",
        use_liger_kernel=False, peft_config=peft,
        backend=BackendConfig(attn="sdpa", linear="torch", rms_norm="torch", rope_fusion=False),
    )


def train(model):
    ids = torch.arange(40, 104).reshape(2, 32)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-3)
    for _ in range(3):
        scores = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(scores.float(), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def export(model, peft, name):
    write_probes(probe(model, base), work / f"{name}.json")
    config = CheckpointingConfig(
        checkpoint_dir=str(work), model_repo_id=str(base), model_cache_dir=str(work), is_peft=peft is not None,
        save_consolidated="final" if peft is None else False,
    )
    config.build(0, 0, 0).save_model(model, str(work / name), peft_config=peft, is_final_checkpoint=True)


def distance(seen, other):
    return max(abs(a - b) for x, y in zip(seen, other) for a, b in zip(x["scores"], y["scores"]))


plain = build(None)
untouched = probe(plain, base)
train(plain)
export(plain, None, "full")
peft = PeftConfig(target_modules=["*.q_proj", "*.v_proj"], dim=4, alpha=8, use_dora=True)
adapted = build(peft)
count = start_magnitudes(adapted)
at_start = probe(adapted, base)
train(adapted)
export(adapted, peft, "dora")
print(json.dumps({"count": count, "start": distance(untouched, at_start),
                  "moved": distance(untouched, probe(adapted, base))}))

# The comparisons that check_round_trip makes in a process of its own, here where the imports are paid for.
recipe = load_recipe("tiny").with_overrides({"method": "dora"})
collect_adapter(work / "dora" / "model", base, recipe, work / "adapter")
collect_model(work / "full" / "model", base, work / "model")
compare([str(base), str(work / "adapter"), str(work / "dora.json"), "dora", "float32"])
compare([str(base), str(work / "model"), str(work / "full.json"), "full", "float32"])
collect_model(work / "full" / "model", base, work / "off")
weights = work / "off" / "model.safetensors"
write_tensors(weights, {n: v * v.dtype.type(1.5 if "down_proj" in n else 1) for n, v in read_float32(weights).items()})
compare([str(base), str(work / "off"), str(work / "full.json"), "full", "float32"])
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("base")).folder


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that AutoModel exported to, and what the process said: the start, then three comparisons."""
    work = tmp_path_factory.mktemp("exports")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(base), str(work)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return work, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


Exported = tuple[Path, list[dict[str, Any]]]


def test_dora_starts_at_the_base_and_comes_back_through_peft(exported: Exported) -> None:
    work, (start, loaded, _, _) = exported
    # Without start_magnitudes they are what the memory held before: the first scores would be far from the base's.
    assert start["count"] == 4
    assert start["start"] < 1e-4
    assert start["moved"] > 0.1
    assert loaded["difference"] < 1e-3
    assert read_config(work / "adapter")["use_dora"] is True
    parts = {name.rpartition("lora_")[2] for name in read_float32(work / "adapter" / WEIGHTS)}
    assert parts == {"A.weight", "B.weight", "magnitude_vector"}


def test_a_merged_model_does_what_the_adapter_does(base: Path, exported: Exported, tmp_path: Path) -> None:
    work, _ = exported
    merged = merge_adapter(base, work / "adapter", tmp_path / "merged")
    assert max(merged.exact_difference, merged.stored_difference, merged.answer_difference) < 1e-4
    assert merged.agreement == 1
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    check_model(merged.model_dir, base)
    trained = open_model(merged.model_dir)
    changed = [name for name, one in open_model(base).items() if (one.data != trained[name].data).any()]
    assert [name.split(".")[-2] for name in changed] == ["q_proj", "v_proj"] * 2


def test_a_whole_model_comes_back_and_has_one_digest(base: Path, exported: Exported, tmp_path: Path) -> None:
    work, (_, _, loaded, off) = exported
    check_model(work / "model", base)
    assert loaded["difference"] < 1e-3
    assert off["difference"] > 0.01
    again = collect_model(work / "full" / "model", base, tmp_path / "again")
    assert describe_directory(work / "model", "model").digest == describe_directory(again, "model").digest
    assert not any(str(work).encode() in path.read_bytes() for path in again.rglob("*.json"))
