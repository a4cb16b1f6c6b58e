"""What a person sees before approving: the files that decide like code, and how they differ from the champion's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sluice.components.changes import LONGEST, changes_against, markdown_of
from sluice.components.workspace import Workspace
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.fixture
def workspace(tmp_path: Path, artifacts: ArtifactStore) -> Workspace:
    made = Workspace(Settings(home=tmp_path))
    made.__dict__.update(artifacts=artifacts)
    return made


def base(artifacts: ArtifactStore, template: str = "{{ messages }}", tokenizer: str = "{}") -> str:
    files = {"chat_template.jinja": template.encode(), "tokenizer.json": tokenizer.encode(), "w.safetensors": b"w"}
    return artifacts.put_files(files, "base-model").digest


def adapter(artifacts: ArtifactStore, base: str, weights: bytes, **config: object) -> str:
    files = {"adapter_config.json": json.dumps({**CONFIG, **config}).encode(), "adapter_model.safetensors": weights}
    return artifacts.put_files(files, "adapter", {"base": base}).digest


def test_only_the_weights_differ(workspace: Workspace, artifacts: ArtifactStore) -> None:
    one = base(artifacts)
    changes = changes_against(workspace, adapter(artifacts, one, b"2"), adapter(artifacts, one, b"1"))
    assert changes == ()
    assert "as the champion's" in markdown_of(changes)


def test_a_changed_configuration_is_shown_line_by_line(workspace: Workspace, artifacts: ArtifactStore) -> None:
    one = base(artifacts)
    champion, candidate = adapter(artifacts, one, b"1"), adapter(artifacts, one, b"2", r=8)
    (change,) = changes_against(workspace, candidate, champion)
    assert change.file == "adapter_config.json"
    assert '-  "r": 4,' in change.lines
    assert '+  "r": 8,' in change.lines
    assert "```diff" in markdown_of((change,))


def test_the_first_adapter_after_the_base_model_is_new(workspace: Workspace, artifacts: ArtifactStore) -> None:
    one = base(artifacts)
    (change,) = changes_against(workspace, adapter(artifacts, one, b"1"), one)
    assert change.sentence.startswith("adapter_config.json: new against champion")
    assert change.lines


def test_another_base_shows_its_template_and_says_that_the_tokenizer_differs(
    workspace: Workspace, artifacts: ArtifactStore
) -> None:
    old, new = base(artifacts), base(artifacts, "{{ evil }}\n" * 60, '{"vocab": 1}')
    changes = changes_against(workspace, adapter(artifacts, new, b"1"), adapter(artifacts, old, b"1"))
    assert [change.file for change in changes] == ["chat_template.jinja", "tokenizer.json"]
    assert len(changes[0].lines) == LONGEST + 1
    assert changes[1].lines == ()
