"""Every kind of bad recipe gets its own sentence, with field, line and value."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.training.recipe import load_recipe, parse_recipe

GOOD = """\
name: small
method: lora
lora:
  rank: 4
  target_modules: [q_proj, v_proj]
data:
  max_length: 64
schedule:
  max_steps: 8
  global_batch_size: 8
  micro_batch_size: 2
optimizer:
  learning_rate: 1.0e-3
parallelism:
  processes: 2
"""
CLUSTER = GOOD.replace("  processes: 2\n", "  processes: 8\n  backend: nccl\n").replace(
    "batch_size: 8", "batch_size: 64"
)

BAD: dict[str, tuple[str, list[tuple[str, str]], list[str]]] = {
    "misspelt field": (
        GOOD,
        [("  rank: 4", "  rnak: 4")],
        ["lora.rnak (line 4)", "no such field; did you mean rank?"],
    ),
    "misspelt section": (
        GOOD,
        [("optimizer:", "optimiser:")],
        ["optimiser (line 12)", "did you mean optimizer?"],
    ),
    "field outside its section": (
        GOOD,
        [("name: small", "name: small\nmax_steps: 3")],
        ["max_steps (line 2)", "did you mean schedule.max_steps?"],
    ),
    "unknown field without a neighbour": (
        GOOD,
        [("name: small", "name: small\nzzz: 3")],
        ["zzz (line 2): no such field."],
    ),
    "too small": (
        GOOD,
        [("rank: 4", "rank: 0")],
        ["lora.rank (line 4) = 0", "greater than or equal to 1"],
    ),
    "text for a number": (
        GOOD,
        [("rank: 4", "rank: '4'")],
        ["lora.rank (line 4) = '4'", "text in quotes is no number"],
    ),
    "fraction for an integer": (
        GOOD,
        [("max_steps: 8", "max_steps: 2.5")],
        ["schedule.max_steps (line 9) = 2.5", "valid integer"],
    ),
    "unknown choice": (
        GOOD,
        [("v_proj]", "lm_head]")],
        ["lora.target_modules.1 (line 5) = 'lm_head'", "'q_proj', 'k_proj'"],
    ),
    "projection twice": (
        GOOD,
        [("v_proj]", "q_proj]")],
        ["lora.target_modules (line 5)", "names q_proj twice"],
    ),
    "required field missing": (
        GOOD,
        [("  max_steps: 8\n", "")],
        ["schedule.max_steps (line 8)", "is required"],
    ),
    "bad name": (
        GOOD,
        [("name: small", "name: Small Model")],
        ["name (line 1) = 'Small Model'", "match pattern"],
    ),
    "bad digest": (
        GOOD,
        [("name: small", "name: small\nbase: llama")],
        ["base (line 2) = 'llama'", "is no digest"],
    ),
    "key twice": (
        GOOD,
        [("  rank: 4", "  rank: 4\n  rank: 8")],
        ["lora.rank (line 4)", "given twice, in line 4 and in line 5"],
    ),
    "section twice": (
        GOOD,
        [("data:", "lora:\n  rank: 8\ndata:")],
        ["lora (line 3)", "given twice, in line 3 and in line 6"],
    ),
    "tab": (
        GOOD,
        [("  rank: 4", "\trank: 4")],
        ["mine.yaml line 4: a tab"],
    ),
    "exponent without a point": (
        GOOD,
        [("1.0e-3", "1e-3")],
        ["optimizer.learning_rate (line 13) = '1e-3'", "YAML 1.1", "1.0e-3"],
    ),
    "exponent without a sign": (
        GOOD,
        [("1.0e-3", "1.0e3")],
        ["optimizer.learning_rate (line 13) = '1.0e3'", "1.0e+3"],
    ),
    "minutes with a colon": (
        GOOD,
        [("data:", "budget:\n  timeout_minutes: 30:00\ndata:")],
        ["budget.timeout_minutes (line 7) = 1800", "30:00", "base 60"],
    ),
    "leading zero": (
        GOOD,
        [("max_length: 64", "max_length: 0100")],
        ["data.max_length (line 7) = 64", "0100", "base 8"],
    ),
    "no as a name": (
        GOOD,
        [("name: small", "name: no")],
        ["name (line 1) = False", "YAML 1.1 reads yes, no"],
    ),
    "list for a section": (
        GOOD,
        [("data:\n  max_length: 64", "data: [64]")],
        ["data (line 6) = [64]", "is a section", "not a list"],
    ),
    "value for a section": (
        GOOD,
        [("data:\n  max_length: 64", "data: 64")],
        ["data (line 6) = 64", "is a section", "not a single value"],
    ),
    "empty section": (
        GOOD,
        [("  max_length: 64\n", "")],
        ["data (line 6) = None", "is empty"],
    ),
    "empty value": (
        GOOD,
        [("max_steps: 8", "max_steps:")],
        ["schedule.max_steps (line 9) = None", "is empty"],
    ),
    "preference tuning": (
        GOOD,
        [("method: lora", "method: dpo")],
        ["method (line 2) = 'dpo'", "AutoModel 0.7 has neither a recipe nor a loss", "preferred answers alone"],
    ),
    "lora beside full": (
        GOOD,
        [("method: lora", "method: full")],
        ["lora (line 3)", "means nothing with method full"],
    ),
    "qlora on processors": (
        GOOD,
        [("method: lora", "method: qlora")],
        [
            "method (line 2) = 'qlora'",
            "needs accelerators",
            "bitsandbytes",
            "precision.compute = 'float32'",
            "must be bfloat16",
        ],
    ),
    "qlora cut": (
        CLUSTER,
        [("method: lora", "method: qlora\nprecision: {compute: bfloat16}"), ("processes: 8", "processes: 8\n  tp: 2")],
        ["parallelism.tp (line 17) = 2", "must be 1 with method qlora"],
    ),
    "batch that does not divide": (
        GOOD,
        [("micro_batch_size: 2", "micro_batch_size: 3")],
        ["schedule.global_batch_size (line 10) = 8", "multiple", "= 6"],
    ),
    "processes that do not divide": (
        CLUSTER,
        [("processes: 8", "processes: 8\n  tp: 3")],
        ["parallelism.processes (line 15) = 8", "tp x pp x cp = 3"],
    ),
    "validation never reached": (
        GOOD,
        [("max_steps: 8", "max_steps: 8\n  validate_every_steps: 9")],
        ["schedule.validate_every_steps (line 10) = 9", "never reached within schedule.max_steps = 8"],
    ),
    "best of one": (
        GOOD,
        [("max_steps: 8", "max_steps: 8\n  result: best")],
        ["schedule.result (line 10) = 'best'", "needs schedule.validate_every_steps"],
    ),
    "patience without a series": (
        GOOD,
        [("data:", "guards:\n  validation_loss:\n    patience: 2\ndata:")],
        ["guards.validation_loss.patience (line 8) = 2", "needs schedule.validate_every_steps"],
    ),
    "warm-up without an end": (
        GOOD,
        [("1.0e-3", "1.0e-3\n  warmup_steps: 8")],
        ["optimizer.warmup_steps (line 14) = 8", "below schedule.max_steps = 8"],
    ),
    "rates upside down": (
        GOOD,
        [("1.0e-3", "1.0e-6")],
        ["optimizer.minimum_learning_rate (line 12) = 1e-05", "exceeds optimizer.learning_rate = 1e-06"],
    ),
    "betas": (
        GOOD,
        [("1.0e-3", "1.0e-3\n  betas: [0.9, 1.0]")],
        ["optimizer.betas (line 14) = [0.9, 1.0]", "below 1"],
    ),
    "tensor parallel on processors": (
        GOOD,
        [("processes: 2", "processes: 2\n  tp: 2")],
        ["parallelism.tp (line 16) = 2", "must be 1 with backend gloo"],
    ),
    "compile on processors": (
        GOOD,
        [("data:", "precision: {compile: true}\ndata:")],
        ["precision.compile (line 6) = True", "needs accelerators"],
    ),
    "tensor parallel over nodes": (
        CLUSTER,
        [("processes: 8", "processes: 2\n  nodes: 2\n  tp: 4")],
        ["parallelism.tp (line 17) = 4", "exceeds parallelism.processes = 2"],
    ),
    "pipeline without micro-batches": (
        CLUSTER,
        [("processes: 8", "processes: 8\n  pp: 8"), ("batch_size: 64", "batch_size: 4")],
        ["parallelism.pp (line 16) = 8", "a step has 2"],
    ),
    "rows not cut by context parallel": (
        CLUSTER,
        [("max_length: 64\n", "max_length: 66\n"), ("processes: 8", "processes: 8\n  cp: 2")],
        ["data.max_length (line 7) = 66", "2 x parallelism.cp = 4"],
    ),
    "packing with context parallel": (
        CLUSTER,
        [("max_length: 64", "max_length: 64\n  packing: true"), ("processes: 8", "processes: 8\n  cp: 2")],
        ["data.packing (line 8) = True", "would see each other"],
    ),
    "pack without packing": (
        GOOD,
        [("max_length: 64", "max_length: 64\n  pack_length: 128")],
        ["data.pack_length (line 8) = 128", "means nothing while data.packing is false"],
    ),
    "pack too short": (
        GOOD,
        [("max_length: 64", "max_length: 64\n  packing: true\n  pack_length: 32")],
        ["data.pack_length (line 9) = 32", "shorter than data.max_length = 64"],
    ),
    "fp8 on processors": (
        GOOD,
        [("data:", "precision: {fp8: true}\ndata:")],
        ["precision.fp8 (line 6) = True", "needs accelerators", "precision.compute (line 6) = 'float32'"],
    ),
    "fp8 where every projection has a pair": (
        CLUSTER,
        [
            ("[q_proj, v_proj]", "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"),
            ("data:", "precision: {fp8: true, compute: bfloat16}\ndata:"),
        ],
        ["precision.fp8 (line 6) = True", "gains nothing here", "all have one"],
    ),
    "fp8 rows": (
        CLUSTER,
        [("max_length: 64", "max_length: 70"), ("data:", "precision: {fp8: true, compute: bfloat16}\ndata:")],
        ["data.max_length (line 8) = 70", "multiple of 16"],
    ),
    "merge beside full": (
        GOOD,
        [("method: lora\nlora:\n  rank: 4\n  target_modules: [q_proj, v_proj]", "method: full\noutput: {merge: true}")],
        ["output.merge (line 3) = True", "a whole model already"],
    ),
    "no time to train": (
        GOOD,
        [("data:", "budget: {timeout_minutes: 1.0, notice_s: 90}\ndata:")],
        ["budget.notice_s (line 6) = 90", "timeout_minutes = 1"],
    ),
}
"""By its kind: the recipe, what is changed in it, and what the sentence must say."""


@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_bad_recipe_gets_its_sentence(kind: str) -> None:
    text, changes, parts = BAD[kind]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(InputError) as caught:
        parse_recipe(text, "mine.yaml")
    assert caught.value.message.startswith("mine.yaml")
    for part in parts:
        assert part in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", [GOOD, CLUSTER])
def test_what_is_changed_above_was_good(text: str) -> None:
    assert parse_recipe(text, "good.yaml").name == "small"


def test_all_mistakes_are_told_at_once() -> None:
    text = GOOD.replace("rank: 4", "rank: 0").replace("1.0e-3", "1e-3").replace("name: small", "name: small\nname: two")
    with pytest.raises(InputError) as caught:
        parse_recipe(text, "mine.yaml")
    first, *lines = caught.value.message.splitlines()
    assert first == "mine.yaml has 3 mistakes:"
    assert [line.split()[0] for line in lines] == ["name", "lora.rank", "optimizer.learning_rate"]


def test_an_override_is_checked_as_a_file_is() -> None:
    with pytest.raises(InputError, match=r"schedule.validate_every_steps = 99: is never reached"):
        load_recipe("tiny").with_overrides({"schedule.validate_every_steps": 99})
    with pytest.raises(InputError, match=r"schedule.max_step = 1 names no field of a recipe; did you mean max_steps\?"):
        load_recipe("tiny").with_overrides({"schedule.max_step": 1})


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(InputError, match="not UTF-8"):
        load_recipe(path)
