from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice.components import adapter_drift as module
from sluice.components.adapter_drift import odd_adapters
from sluice.components.served import adapter_shelf, ensure_loaded, servers
from sluice.provenance.artifacts import ArtifactStore
from tests.components.serving_site import Site, serving_site
from tests.support.directory_store import DirectoryStore


@pytest.fixture
def site(
    tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    with serving_site(tmp_path / "home", object_store, artifacts, monkeypatch, replicas=2) as made:
        monkeypatch.setattr(module, "router", lambda _: made.routes)
        yield made


def test_what_is_odd_about_adapters_is_told(site: Site, tmp_path: Path) -> None:
    workspace = site.workspace
    assert odd_adapters(workspace) == ()
    stable, stranger = site.train(20), site.train(30)
    site.serve(stable)
    for release in (stable, stranger):
        ensure_loaded(workspace, release, site.base, servers(workspace.settings))
    first, second = site.servers
    del second.adapters[site.name(stranger)]
    assert odd_adapters(workspace) == (f"{first.url} holds {site.name(stranger)}, and nothing leads to it.",)
    del first.adapters[site.name(stranger)]
    second.adapters[site.name(stable)] = tmp_path
    assert odd_adapters(workspace) == (
        f"{second.url} serves {site.name(stable)} from {tmp_path}, which nobody verified.",
    )
    # Somebody changes the files: what is loaded answers on, and a restart would come back without it.
    second.adapters[site.name(stable)] = first.adapters[site.name(stable)]
    (adapter_shelf(workspace.settings).path(site.name(stable)) / "adapter_config.json").write_text("{}")
    assert odd_adapters(workspace) == (
        f"The files of {site.name(stable)} changed on the shelf: a restart would not load it.",
    )
