"""Trust: every way in which a signature holds and still does not count, told with key, reason and way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.provenance.keys import Signer
from sluice.provenance.trust import KeyRevoked, SignerRefused, Trust, TrustPolicy, load_policy

NOON = "2026-03-01T12:00:00Z"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "trusted").mkdir()
    return tmp_path


def signer(home: Path, name: str) -> Signer:
    made = Signer.load_or_create(home / f"{name}.pem")
    (home / "trusted" / f"{name}.pub").write_text(made.public_key.pem)
    return made


def policy(home: Path, text: str = "") -> TrustPolicy:
    if text:
        (home / "trust.yaml").write_text(text)
    own = Signer.load_or_create(home / "own.pem")
    return load_policy(home / "trust.yaml", own.public_key, home / "trusted")


def require(chosen: TrustPolicy, key: Signer, scope: str = "steps", name: str = "train", time: str = NOON) -> str:
    _, key_ids = Trust(chosen).open(key.sign({"a": 1}))
    return Trust(chosen).require(scope, name, key_ids, time=time, what="The statement")  # type: ignore[arg-type]


def test_without_a_file_every_known_key_may_sign_everything(home: Path) -> None:
    friend = signer(home, "friend")
    chosen = policy(home)
    assert require(chosen, friend) == friend.public_key.key_id
    assert require(chosen, Signer.load_or_create(home / "own.pem"), "ledger", "promotion")
    assert [one.name for one in chosen.signers] == ["own", "friend"]


def test_a_rule_lets_only_its_signers_sign(home: Path) -> None:
    cluster, laptop = signer(home, "cluster"), signer(home, "laptop")
    chosen = policy(
        home,
        "rules:\n- {steps: 'train*', signers: [cluster]}\n- {steps: '*', signers: [laptop]}\n"
        "- {ledger: promotion, signers: [own]}\n- {models: adapter, signers: [cluster]}\n",
    )
    assert require(chosen, cluster, name="train")
    assert require(chosen, laptop, name="gate")
    assert require(chosen, laptop, "ledger", "decision")
    for key, scope, name, allowed in (
        (laptop, "steps", "train", "cluster"),
        (cluster, "steps", "gate", "laptop"),
        (laptop, "ledger", "promotion", "own"),
        (laptop, "models", "adapter", "cluster"),
    ):
        with pytest.raises(SignerRefused, match=f"may not sign {scope} '{name}': only {allowed} may") as raised:
            require(chosen, key, scope, name)
        assert key.public_key.key_id[:12] in raised.value.message
        assert "trust.yaml" in raised.value.hint


def test_a_signature_counts_between_its_signers_dates_only(home: Path) -> None:
    key = signer(home, "year")
    (home / "trusted" / "year.pub").rename(home / "year.pub")
    chosen = policy(
        home,
        "signers:\n  year: {key: year.pub, not_before: 2026-01-01T00:00:00Z, not_after: 2027-01-01T00:00:00Z}\n",
    )
    assert require(chosen, key)
    for time in ("2025-12-31T23:59:59Z", "2027-01-01T00:00:01Z"):
        with pytest.raises(
            SignerRefused, match=r"counts from 2026-01-01.* to 2027-01-01.* only; this was signed at 20"
        ):
            require(chosen, key, time=time)


def test_a_signature_without_a_time_is_refused(home: Path) -> None:
    with pytest.raises(SignerRefused, match="does not say when it was signed"):
        require(policy(home), Signer.load_or_create(home / "own.pem"), time="yesterday")


def test_one_name_may_have_several_keys_and_a_key_several_signatures_are_asked_for(home: Path) -> None:
    old, new = signer(home, "own.2025"), signer(home, "laptop")
    chosen = policy(home, "rules:\n- {steps: train, signers: [own]}\n")
    assert require(chosen, old)
    envelope = new.sign({"a": 1})
    envelope["signatures"] += old.sign({"a": 1})["signatures"]
    _, key_ids = Trust(chosen).open(envelope)
    assert len(key_ids) == 2
    assert Trust(chosen).require("steps", "train", key_ids, time=NOON, what="x") == old.public_key.key_id


def test_a_key_in_the_text_of_the_policy(home: Path) -> None:
    key = Signer.load_or_create(home / "inline.pem")
    lines = "".join(f"      {line}\n" for line in key.public_key.pem.splitlines())
    assert require(policy(home, f"signers:\n  inline:\n    key: |\n{lines}"), key)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("signers: {a: {key: nowhere.pub}}", r"nowhere\.pub cannot be read"),
        ("signers: {a: {keys: x}}", r"signers\.a\.key"),
        ("signers: {a: {key: own.pem.pub, not_after: 2026-01-01T00:00:00}}", r"a\.not_after.*no time zone"),
        ("rules: [{steps: train, signers: [nobody]}]", r"rules\.0\.signers = 'nobody' is no signer"),
        ("rules: [{steps: train, ledger: x, signers: [own]}]", r"rules\.0 names 2 of"),
        ("rules: [{signers: [own]}]", r"rules\.0 names 0 of"),
        ("rules: [{steps: train, signers: []}]", r"rules\.0\.signers"),
        ("role: []", "role: Extra"),
        ("rules: [", "cannot be read"),
    ],
)
def test_a_mistake_in_the_policy_is_named(home: Path, text: str, says: str) -> None:
    Signer.load_or_create(home / "own.pem")
    with pytest.raises(InputError, match=says):
        policy(home, text)


def test_a_revoked_key_counts_only_for_what_was_kept(home: Path) -> None:
    thief = signer(home, "lost")
    key_id = thief.public_key.key_id
    chosen = policy(home)
    history = Trust(chosen).history.after(
        kind="revocation",
        body={"key": key_id, "reason": "laptop stolen", "kept": "sha256:" + "0" * 64},
        sequence=7,
        time=NOON,
        actor="ann",
        key_id="1" * 64,
    )
    trust = Trust(chosen, history, {key_id: frozenset({"sha256:old"})})
    assert trust.require("steps", "train", [key_id], time=NOON, what="x", identity="sha256:old")
    for identity in ("sha256:new", None):
        with pytest.raises(KeyRevoked, match=rf"ann revoked at {NOON}: laptop stolen.*\(7\)") as raised:
            trust.require("steps", "train", [key_id], time=NOON, what="The statement", identity=identity)
        assert key_id[:12] in raised.value.message
        assert "again" in raised.value.hint
