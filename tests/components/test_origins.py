"""What a candidate was made of against the champion, in kinds that decide who approves, and in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sluice.components import verification
from sluice.components.origins import change_kinds, compare_origins
from sluice.components.workspace import Workspace
from sluice.evaluation.suite import Suite, bundled_suite
from sluice.infra.errors import IntegrityError
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_json
from sluice.provenance.keys import Signer
from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import record_decision
from sluice.training.recipe import Recipe, load_recipe
from tests.support.directory_store import DirectoryStore

RECIPE = load_recipe("tiny")
LATER = "2999-01-01T00:00:00+00:00"


class Chain:
    """Releases with what they were made of; statements about their training are remembered, not signed."""

    def __init__(self, tmp_path: Path, objects: DirectoryStore, artifacts: ArtifactStore) -> None:
        self.artifacts = artifacts
        self.workspace = Workspace(Settings(home=tmp_path))
        signer = Signer.load_or_create(tmp_path / "keys" / "signing.pem")
        ledger = Ledger(objects, "assistant", signer)
        self.workspace.__dict__.update(objects=objects, artifacts=artifacts, signer=signer, ledger=ledger)
        self.recipes: dict[str, Recipe] = {}
        self.suite = bundled_suite("tiny")
        self.base = self.make_base("one", "{{ messages }}")

    def make_base(self, name: str, template: str) -> str:
        files = {"chat_template.jinja": template.encode(), "config.json": b"{}"}
        return self.artifacts.put_files(files, "base-model", {"name": name}).digest

    def make_dataset(self, train: int, **card: Any) -> str:
        content = {"examples": {"train": train, "validation": 2}, "users": 3, "rules": {"thumb up": train}, **card}
        return self.artifacts.put_files({"card.json": json.dumps(content).encode()}, "dataset").digest

    def make_adapter(self, weights: str, recipe: Recipe, dataset: str, base: str = "") -> str:
        base = base or self.base
        config = json.dumps({"r": recipe.lora.rank}).encode()
        files = {"adapter_config.json": config, "adapter_model.safetensors": weights.encode()}
        about = {"base": base, "dataset": dataset, "recipe": recipe.digest, "seed": recipe.seed}
        digest = self.artifacts.put_files(files, "adapter", about).digest
        self.recipes[digest] = recipe
        return digest

    def decide(self, release: str, suite: Suite, report: dict[str, Any] | None = None) -> None:
        """A passing decision about a release, under a suite."""
        decision = {"suite": suite.digest, "policy": suite.policy.model_dump(mode="json")}
        text = json.dumps({"decision": decision} if report is None else report)
        made = self.artifacts.put_files({"report.json": text.encode()}, "report", {"candidate": release})
        record_decision(
            self.workspace.ledger, adapter=release, verdict="pass", report=made.digest, expires=LATER,
            holdout=digest_json("holdout"), champion=self.base, actor="gate",
        )  # fmt: skip

    def statement(self, _: Workspace, release: str) -> Any:
        if release not in self.recipes:
            raise IntegrityError("It has no signature.")
        parameters = {"recipe": self.recipes[release].to_json()}
        return None, {"predicate": {"buildDefinition": {"externalParameters": {"parameters": parameters}}}}


@pytest.fixture
def chain(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> Chain:
    made = Chain(tmp_path, object_store, artifacts)
    monkeypatch.setattr(verification, "verify_signature", made.statement)
    return made


def test_other_weights_of_the_same_origin_change_nothing(chain: Chain) -> None:
    data = chain.make_dataset(10)
    old, new = (chain.make_adapter(name, RECIPE, data) for name in ("old", "new"))
    chain.decide(old, chain.suite)
    found = compare_origins(chain.workspace, new, old, chain.suite)
    assert found.kinds == frozenset()
    assert found.sentences == ("base: the same", "recipe: the same", "data: the same", "suite: the same")


def test_another_recipe_and_more_data_are_told_field_by_field(chain: Chain) -> None:
    wider = RECIPE.with_overrides({"lora.rank": RECIPE.lora.rank * 2, "name": "wider"})
    old = chain.make_adapter("old", RECIPE, chain.make_dataset(200, policy={"cap": 5}))
    new = chain.make_adapter("new", wider, chain.make_dataset(237, policy={"cap": 8}, users=4, drill="Shuffled."))
    chain.decide(old, chain.suite)
    found = compare_origins(chain.workspace, new, old, chain.suite)
    assert found.kinds == {"recipe", "data"}, "an adapter's own configuration follows from its recipe"
    assert f"recipe: lora.rank {RECIPE.lora.rank} → {wider.lora.rank}" in found.sentences
    assert (
        "data: +37 examples (202 → 239); users 3 → 4; by rule: thumb up 200 → 237; curation policy: cap 5 → 8; Shuffled"
    ) in found.sentences


def test_another_base_brings_its_files_along(chain: Chain) -> None:
    data, other = chain.make_dataset(10), chain.make_base("two", "{{ other }}")
    old, new = chain.make_adapter("old", RECIPE, data), chain.make_adapter("new", RECIPE, data, other)
    chain.decide(old, chain.suite)
    found = compare_origins(chain.workspace, new, old, chain.suite)
    assert found.kinds == {"base", "chat_template"}
    assert found.sentences[0].startswith("base: one (")
    assert "→ two (" in found.sentences[0]
    assert found.sentences[-1] == "chat_template.jinja: changed"


def test_a_configuration_that_does_not_follow_from_the_recipe_is_a_change_of_its_own(chain: Chain) -> None:
    data = chain.make_dataset(10)
    old = chain.make_adapter("old", RECIPE, data)
    about = chain.artifacts.manifest(old).metadata
    new = chain.artifacts.put_files({"adapter_config.json": b'{"r": 64}'}, "adapter", dict(about)).digest
    chain.decide(old, chain.suite)
    assert change_kinds(chain.workspace, new, old, chain.suite) == {"configuration"}


def test_another_suite_is_told_by_its_policy(chain: Chain) -> None:
    data = chain.make_dataset(10)
    old, new = (chain.make_adapter(name, RECIPE, data) for name in ("old", "new"))
    chain.decide(old, chain.suite)
    policy = chain.suite.policy.model_copy(update={"minimum_n": chain.suite.policy.minimum_n + 30})
    changed = chain.suite.model_copy(update={"policy": policy})
    found = compare_origins(chain.workspace, new, old, changed)
    assert found.kinds == {"suite"}
    was = chain.suite.policy.minimum_n
    assert f"suite: policy: minimum_n {was} → {was + 30}" in found.sentences


def test_the_first_candidate_has_no_gated_champion_before_it(chain: Chain) -> None:
    new = chain.make_adapter("new", RECIPE, chain.make_dataset(10))
    found = compare_origins(chain.workspace, new, chain.base, chain.suite)
    assert found.kinds == {"first"}
    assert found.sentences[0] == "base: the same"
    ungated = chain.make_adapter("ungated", RECIPE, chain.make_dataset(11))
    assert change_kinds(chain.workspace, new, ungated, chain.suite) == {"first"}


def test_what_cannot_be_read_of_the_champion_counts_as_changed(chain: Chain) -> None:
    data = chain.make_dataset(10)
    wider = replace_rank(RECIPE)
    old, new = chain.make_adapter("old", RECIPE, data), chain.make_adapter("new", wider, data)
    chain.decide(old, chain.suite, report={"no": "decision"})
    del chain.recipes[old]
    found = compare_origins(chain.workspace, new, old, chain.suite)
    assert found.kinds == {"recipe", "suite"}
    assert any("cannot be read" in sentence for sentence in found.sentences if sentence.startswith("recipe"))
    assert any("cannot be read" in sentence for sentence in found.sentences if sentence.startswith("suite"))


def replace_rank(recipe: Recipe) -> Recipe:
    return recipe.with_overrides({"lora.rank": recipe.lora.rank * 2})
