"""Estimates: against published figures, what shards what, why a recipe does not fit and what would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.infra.errors import InputError
from sluice.training.dataset_facts import DatasetFacts, measure_dataset
from sluice.training.estimate import Estimate, duration, estimate
from sluice.training.model_shape import KNOWN
from sluice.training.node_types import GIB, NODE_TYPES, find_node_type
from sluice.training.recipe import Recipe, load_recipe, packaged_recipes, parse_recipe

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EIGHT = """\
name: eight
schedule: {max_steps: 100, global_batch_size: 32, micro_batch_size: 2}
data: {max_length: 4096}
lora: {rank: 16, target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}
parallelism: {processes: 8, backend: nccl}
precision: {parameters: bfloat16, compute: bfloat16}
budget: {timeout_minutes: 600.0}
"""


def recipe(**overrides: Any) -> Recipe:
    return parse_recipe(EIGHT, "eight").with_overrides(
        {name.replace("__", "."): value for name, value in overrides.items()}
    )


def check(chosen: Recipe, base: str = "llama-3.1-8b", node: str = "p5.48xlarge", **named: Any) -> Estimate:
    return estimate(chosen, KNOWN[base], find_node_type(node), **named)


def part(found: Estimate, name: str) -> float:
    return next(one.bytes for one in found.memory if one.name == name)


BASES = {
    "llama-8b-lora-h100": ("llama-3.1-8b", "p5.48xlarge"),
    "llama-70b-lora-p5": ("llama-3.1-70b", "p5.48xlarge"),
}


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_fit_what_they_are_written_for(name: str) -> None:
    base, node = BASES.get(name, ("smollm2-135m", "laptop"))
    found = check(load_recipe(name), base, node)
    assert found.fits, found.verdict
    assert not [note for note in found.notes if "timeout_minutes" in note]


def test_speed_is_what_nvidia_publishes_for_the_same_recipe() -> None:
    # AutoModel 0.7, LoRA, H100, 4,096 tokens, bf16: 8B on 8 12,473 tokens/s each, 70B on 16 985.
    assert check(recipe()).tokens_per_second / 8 == pytest.approx(12_473, rel=0.05)
    seventy = recipe(parallelism__nodes=2, parallelism__activation_checkpointing=True)
    assert check(seventy, "llama-3.1-70b").tokens_per_second / 16 == pytest.approx(985, rel=0.25)


def test_weights_gradients_and_optimizer_are_counted_and_sharded() -> None:
    parameters = KNOWN["llama-3.1-8b"].parameters
    full = check(recipe(method="full", precision__parameters="float32"))
    assert part(full, "weights") == pytest.approx(parameters * 4 / 8)
    assert part(full, "gradients") == pytest.approx(parameters * 4 / 8)
    assert part(full, "optimizer") == pytest.approx(2 * parameters * 4 / 8)
    pairs = KNOWN["llama-3.1-8b"].lora_parameters(16, ALL)
    lora = check(recipe())
    assert part(lora, "optimizer") == pytest.approx(2 * pairs * 2 / 8)
    assert part(lora, "weights") == pytest.approx((parameters + pairs) * 2 / 8)
    assert lora.trainable == pairs == 41_943_040
    # 6.98 billion numbers of the layers' matrices in 4.127 bits, the rest in 16.
    assert part(check(recipe(method="qlora")), "weights") * 8 / GIB == pytest.approx(5.4, abs=0.1)


@pytest.mark.parametrize(
    ("overrides", "name", "factor"),
    [
        ({"parallelism__nodes": 2}, "weights", 1 / 2),
        ({"parallelism__nodes": 2}, "activations", 1),
        ({"parallelism__tp": 2}, "weights", 1),
        ({"schedule__micro_batch_size": 1}, "activations", 1 / 2),
        ({"parallelism__cp": 2}, "activations", 1 / 2),
        ({"parallelism__cp": 2}, "weights", 1),
        ({"precision__compute": "float32"}, "activations", 2),
    ],
)
def test_what_is_cut_by_what(overrides: dict[str, Any], name: str, factor: float) -> None:
    assert part(check(recipe(**overrides)), name) == pytest.approx(factor * part(check(recipe()), name), rel=0.02)


def test_a_pipeline_holds_fewer_layers_and_more_micro_batches() -> None:
    whole, cut = check(recipe()), check(recipe(parallelism__pp=2, schedule__global_batch_size=64))
    assert part(cut, "activations") == pytest.approx(part(whole, "activations"))
    assert part(cut, "weights") > part(whole, "weights")
    assert "pipeline's bubble" in cut.utilisation


@settings(max_examples=60, deadline=None)
@given(
    micro=st.sampled_from([1, 2, 4, 8]),
    checkpointing=st.booleans(),
    reshard=st.booleans(),
    method=st.sampled_from(["lora", "dora", "qlora", "full"]),
    nodes=st.sampled_from([1, 2, 4]),
    base=st.sampled_from(sorted(KNOWN)),
    node=st.sampled_from([name for name in NODE_TYPES if NODE_TYPES[name].accelerators == 8]),
)
def test_a_change_that_is_named_fits(
    micro: int, checkpointing: bool, reshard: bool, method: str, nodes: int, base: str, node: str
) -> None:
    chosen = recipe(
        schedule__micro_batch_size=micro,
        schedule__global_batch_size=32 * 8,
        parallelism__activation_checkpointing=checkpointing,
        parallelism__reshard_after_forward=reshard,
        parallelism__nodes=nodes,
        method=method,
    )
    found = check(chosen, base, node)
    assert found.needed > 0
    assert found.seconds > 0
    if found.needed <= found.limit:
        assert found.fits
        assert found.changes == ()
        return
    assert not found.fits
    for change in found.changes:
        fields = change.rpartition(" (")[0].split(" with ")
        values = {name: _plain(value) for name, _, value in (field.partition(": ") for field in fields)}
        changed = check(chosen.with_overrides(values), base, node)
        assert changed.needed <= changed.limit


def _plain(text: str) -> Any:
    return text if text in ("qlora", "lora", "bfloat16") else json.loads(text)


def test_it_says_why_it_does_not_fit_and_what_would() -> None:
    found = check(recipe(), node="g5.48xlarge")
    assert not found.fits
    assert found.verdict.startswith(
        "Does not fit: 50.3 GiB are needed of 21.1 GiB usable on each A10G, most of it acti"
    )
    assert found.changes[0].startswith("parallelism.activation_checkpointing: true (")


@pytest.mark.parametrize(
    ("overrides", "base", "node", "named", "part"),
    [
        ({}, "llama-3.1-8b", "laptop", {}, "backend nccl needs accelerators and laptop has none"),
        ({"parallelism__backend": "gloo"}, "smollm2-135m", "p5.48xlarge", {}, "gloo would leave the 8 H100"),
        ({}, "smollm2-135m", "g5.12xlarge", {}, "processes 8 exceed the 4 accelerators"),
        ({"precision__fp8": True, "method": "full"}, "smollm2-135m", "p4d.24xlarge", {}, "not in the hardware of A100"),
        ({"data__max_length": 16_384}, "smollm2-135m", "p5.48xlarge", {}, "exceeds the base's context of 8192"),
        ({"parallelism__tp": 2}, "smollm2-135m", "p5.48xlarge", {}, "tp 2 does not divide the base's 9 heads"),
        ({"budget__dollars": 1.0}, "llama-3.1-8b", "p5.48xlarge", {}, "of budget.dollars = $1.00"),
        (
            {},
            "llama-3.1-8b",
            "p5.48xlarge",
            {"data": DatasetFacts(20, 100.0, 0, 5, True)},
            "20 usable examples and one step takes schedule.global_batch_size = 32",
        ),
    ],
)
def test_other_reasons(overrides: dict[str, Any], base: str, node: str, named: dict[str, Any], part: str) -> None:
    found = check(recipe(**overrides), base, node, **named)
    assert not found.fits
    assert part in found.verdict


def test_cost_is_time_times_price_times_nodes() -> None:
    found = check(recipe(parallelism__nodes=2), price=10.0)
    assert found.dollars == pytest.approx(found.seconds / 3600 * 20)
    assert check(recipe(), node="p5e.48xlarge").dollars is None
    assert check(recipe(), node="p5e.48xlarge", price=30.0).dollars is not None


def test_a_dataset_gives_epochs_and_shorter_rows() -> None:
    facts = DatasetFacts(1000, 512.0, 3, 100, True)
    found, unknown = check(recipe(), data=facts), check(recipe())
    assert found.epochs == pytest.approx(3.2)
    assert unknown.epochs is None
    assert found.seconds < unknown.seconds
    assert "3 examples are longer than data.max_length" in " ".join(found.notes)
    packed = check(recipe(data__packing=True), data=facts)
    assert packed.epochs == pytest.approx(100 * 32 / (1000 * 512 / (4096 * 0.95)))


def test_a_run_longer_than_its_budget_says_how_many_attempts() -> None:
    found = check(recipe(schedule__max_steps=10_000, budget__timeout_minutes=60.0))
    assert "ends an attempt; about 4 of them" in " ".join(found.notes)


def test_a_dataset_is_measured(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y" * 8}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(3)))
    assert measure_dataset(tmp_path, 512, None) == DatasetFacts(3, 20.0, 0, 0, False)
    assert measure_dataset(tmp_path, 16, None) == DatasetFacts(0, 0.0, 3, 0, False)
    with pytest.raises(InputError, match=r"holds no train\.jsonl"):
        measure_dataset(tmp_path / "nothing", 16, None)


def test_a_node_type_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\naccelerator: RTX\naccelerators: 8\nmemory_gib: 24\nbf16_tflops: 165\nvcpus: 32\nram_gib: 256\n"
    )
    node = find_node_type(str(file))
    assert (node.memory_gib, node.dollars_per_hour) == (24.0, None)
    file.write_text("name: mine\nacelerators: 8\nbf16_tflops: 165\nvcpus: 32\nram_gib: 256\n")
    with pytest.raises(InputError, match=r"acelerators \(line 2\): no such field; did you mean accelerators"):
        find_node_type(str(file))
    with pytest.raises(InputError, match="no node type") as caught:
        find_node_type("p9.huge")
    assert "p5.48xlarge" in caught.value.hint


def test_this_machine_is_one_without_accelerators() -> None:
    assert find_node_type("this").accelerators == 0
    assert find_node_type("this").ram_gib > 0.5


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12_000, "3 h 20 min")])
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
