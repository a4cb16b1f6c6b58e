from __future__ import annotations

from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.provenance.attestation import Signer
from sluice.provenance.ledger import Ledger
from sluice.provenance.trust import SignerRefused
from sluice.registry.transfer.sites import open_site, read_sites, trust_site, trusted_sites
from tests.support.directory_store import DirectoryStore

SITES = """
sites:
  north:
    object_store: {endpoint_url: "http://127.0.0.1:9", access_key_env: NORTH_ACCESS, secret_key_file: north.secret}
    mlflow: {tracking_uri: "http://127.0.0.1:9", token_env: NORTH_TOKEN}
    public_keys: [north.pem.pub]
    signing_key: north.pem
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Signer.load_or_create(tmp_path / "north.pem")
    (tmp_path / "north.secret").write_text("very secret\n")
    (tmp_path / "sites.yaml").write_text(SITES)
    monkeypatch.setenv("NORTH_ACCESS", "access")
    monkeypatch.setenv("NORTH_TOKEN", "token")
    return tmp_path


def test_secrets_come_from_the_environment_and_files(folder: Path) -> None:
    site = open_site("north", read_sites(folder / "sites.yaml"), folder)
    assert site.objects._settings.access_key == "access"
    assert site.objects._settings.secret_key is not None
    assert site.objects._settings.secret_key.get_secret_value() == "very secret"
    assert "very secret" not in repr(site.objects._settings)
    assert site.signer is not None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("access_key_env: NORTH_ACCESS", "access_key: abc", r"sites\.north\.object_store\.access_key.*Secrets stand"),
        ("NORTH_TOKEN", "NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE is not set"),
        ("north.secret", "no.secret", r"no\.secret"),
        ("public_keys: [north.pem.pub]", "public_keys: []", r"sites\.north\.public_keys"),
        ("signing_key: north.pem", "signing_key: no.pem", r"sites\.north\.signing_key"),
        ("  north:", "  North East:", "North East"),
        ("sites:", "places:", "no mapping `sites`"),
    ],
)
def test_a_mistake_in_the_file_names_the_field(folder: Path, old: str, new: str, words: str) -> None:
    (folder / "sites.yaml").write_text(SITES.replace(old, new))
    with pytest.raises(InputError, match=words):
        open_site("north", read_sites(folder / "sites.yaml"), folder)


def test_unknown_site_and_missing_file_are_told(folder: Path) -> None:
    with pytest.raises(InputError, match=r"'south'.*north"):
        open_site("south", read_sites(folder / "sites.yaml"), folder)
    with pytest.raises(InputError, match=r"no\.yaml"):
        read_sites(folder / "no.yaml")


def test_signing_key_has_to_belong_to_the_site(folder: Path) -> None:
    Signer.load_or_create(folder / "other.pem")
    (folder / "sites.yaml").write_text(SITES.replace("signing_key: north.pem", "signing_key: other.pem"))
    with pytest.raises(InputError, match="private half"):
        open_site("north", read_sites(folder / "sites.yaml"), folder)


def test_nothing_is_written_that_the_policy_of_the_site_refuses(folder: Path) -> None:
    objects = DirectoryStore(folder / "objects")
    (folder / "sites.yaml").write_text(f"{SITES}    trust_policy: trust.yaml\n")
    with pytest.raises(InputError, match=r"sites\.north\.trust_policy = .* does not exist"):
        open_site("north", read_sites(folder / "sites.yaml"), folder)
    people = Signer.load_or_create(folder / "people.pem").public_key
    (folder / "people.pub").write_text(people.pem)
    policy = "signers: {people: {key: people.pub}}\nrules: [{ledger: import, signers: [people]}]\n"
    (folder / "trust.yaml").write_text(policy)
    site = open_site("north", read_sites(folder / "sites.yaml"), folder)
    assert site.signer is not None
    ledger = Ledger(objects, "assistant", site.signer, policy=site.policy)
    with pytest.raises(SignerRefused, match="only people may"):
        ledger.append("import", {}, "ann", expected_head=None)
    assert list(objects.list("ledger/")) == []
    ledger.append("note", {}, "ann", expected_head=None)


def test_trust_is_by_site_and_a_key_speaks_for_one(tmp_path: Path) -> None:
    Signer.load_or_create(tmp_path / "a.pem")
    Signer.load_or_create(tmp_path / "b.pem")
    assert trusted_sites(tmp_path) == []
    trust_site(tmp_path, "north", tmp_path / "a.pem.pub")
    trust_site(tmp_path, "north", tmp_path / "b.pem.pub")
    assert [len(site.keys) for site in trusted_sites(tmp_path)] == [2]
    with pytest.raises(InputError, match="that of site 'north' already"):
        trust_site(tmp_path, "south", tmp_path / "a.pem.pub")
    with pytest.raises(InputError, match="no name of a site"):
        trust_site(tmp_path, "../south", tmp_path / "a.pem.pub")
    with pytest.raises(InputError, match="cannot be read"):
        trust_site(tmp_path, "south", tmp_path / "a.pem")
