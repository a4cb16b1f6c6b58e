from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice.components import adapter_drift as module
from sluice.components.adapter_drift import adapter_drift, mend_adapters
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


def test_a_server_that_lost_an_adapter_is_told_and_mended(site: Site, tmp_path: Path) -> None:
    workspace = site.workspace
    assert adapter_drift(workspace) == ()
    stable, stranger = site.train(20), site.train(30)
    site.serve(stable)
    for release in (stable, stranger):
        ensure_loaded(workspace, release, site.base, servers(workspace.settings))
    first, second = site.servers
    del second.adapters[site.name(stable)], second.adapters[site.name(stranger)]
    assert adapter_drift(workspace) == (
        f"{first.url} holds {site.name(stranger)}, and nothing leads to it.",
        f"{second.url} lacks {site.name(stable)}: stable, 100% of the users.",
    )
    assert mend_adapters(workspace) == ()
    assert list(second.adapters) == [site.name(stable)]
    second.adapters[site.name(stable)] = tmp_path
    del first.adapters[site.name(stranger)]
    assert adapter_drift(workspace) == (
        f"{second.url} serves {site.name(stable)} from {tmp_path}, which nobody verified.",
    )
    mend_adapters(workspace)
    assert second.adapters[site.name(stable)] == tmp_path
    del second.adapters[site.name(stable)]
    mend_adapters(workspace)
    (adapter_shelf(workspace.settings).path(site.name(stable)) / "adapter_config.json").write_text("{}")
    assert "changed on the shelf" in adapter_drift(workspace)[0]
