"""Trust: whose signature counts for what, and until when.

Three things decide. The policy (a YAML file, or by default every known key for everything) says which named signer may
sign which steps, ledger entries and models. The ledger says which key followed which (`rotation`, signed by the old
one) and which was revoked. And what a revoked key had signed counts only where the ledger had referred to it before.

    signers:
      training: {key: keys/training.pub, not_before: 2026-01-01T00:00:00Z, not_after: 2027-01-01T00:00:00Z}
    rules:                                  # the first that matches decides; where none does, every signer may sign
      - {steps: train, signers: [training]}
      - {ledger: "revocation", signers: [own]}
      - {models: "*", signers: [training]}

`own` is this installation's key; `NAME.pub` and `NAME.anything.pub` in keys/trusted are signers called NAME.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.attestation import verify_signatures
from sluice.provenance.canonical import Json
from sluice.provenance.keys import IN_TOTO_PAYLOAD, PublicKey, parse_public_key, read_public_key
from sluice.provenance.times import parse_time

Scope = Literal["steps", "ledger", "models"]
OWN = "own"
"""The name of this installation's own key in a policy."""


class SignerRefused(IntegrityError):
    """A signature holds, but its signer may not sign this."""


class KeyRevoked(SignerRefused):
    """A signature holds, but its key was revoked before anything in the ledger referred to what it signed."""


@dataclass(frozen=True)
class TrustedSigner:
    """A key under a name, and the time in which its signatures count. A name may have several keys."""

    name: str
    key: PublicKey
    not_before: datetime | None = None
    not_after: datetime | None = None


@dataclass(frozen=True)
class Rule:
    """Only `signers` (names) may sign what `pattern` matches: step names, kinds of ledger entries, kinds of models."""

    scope: Scope
    pattern: str
    signers: tuple[str, ...]


@dataclass(frozen=True)
class Revocation:
    """The ledger entry that revoked a key. `kept` is the artifact that lists what had been referred to before."""

    key_id: str
    sequence: int
    time: str
    by: str
    reason: str
    kept: str


@dataclass(frozen=True)
class KeyHistory:
    """What a ledger says about keys: new keys with the id of the one that introduced each, and revocations."""

    successors: Mapping[str, tuple[PublicKey, str]] = field(default_factory=dict)
    revocations: Mapping[str, Revocation] = field(default_factory=dict)

    def after(self, *, kind: str, body: Json, sequence: int, time: str, actor: str, key_id: str) -> KeyHistory:
        """The history once this verified ledger entry is part of it. Raises `IntegrityError` for a malformed one."""
        try:
            if kind == "rotation":
                # Only a key itself may name its successor: it hands on what it may sign.
                if body["previous"] != key_id:
                    raise IntegrityError(
                        f"Ledger entry {sequence} hands on key {str(body['previous'])[:12]}, but key {key_id[:12]} "
                        "signed it.",
                        hint="Somebody who may write here tried to act as another signer; find out who.",
                    )
                new = parse_public_key(str(body["pem"]).encode(), f"of ledger entry {sequence}")
                return KeyHistory({**self.successors, new.key_id: (new, str(body["previous"]))}, self.revocations)
            if kind == "revocation" and body["key"] not in self.revocations:
                found = Revocation(str(body["key"]), sequence, time, actor, str(body["reason"]), str(body["kept"]))
                return KeyHistory(self.successors, {**self.revocations, found.key_id: found})
        except (KeyError, TypeError, InputError) as error:
            raise IntegrityError(f"Ledger entry {sequence} is no {kind} of a key: {error!r}.") from error
        return self


NO_HISTORY = KeyHistory()


@dataclass(frozen=True)
class TrustPolicy:
    """The signers of an installation and the rules about them."""

    signers: tuple[TrustedSigner, ...]
    rules: tuple[Rule, ...] = ()
    source: str = ""

    @classmethod
    def of(cls, keys: Iterable[PublicKey]) -> TrustPolicy:
        """Every key for everything; the first is this installation's own."""
        return cls(tuple(TrustedSigner(key.short if n else OWN, key) for n, key in enumerate(keys)))

    def known(self, history: KeyHistory = NO_HISTORY) -> tuple[TrustedSigner, ...]:
        """The signers, and those that the ledger introduced in their place: a new key has its predecessor's names."""
        found = list(self.signers)
        for key_id, (key, previous) in history.successors.items():
            names = {one.name for one in found if one.key.key_id == previous}
            held = {one.name for one in found if one.key.key_id == key_id}
            found.extend(TrustedSigner(name, key) for name in sorted(names - held))
        return tuple(found)

    def allowed(self, scope: Scope, name: str) -> tuple[str, ...] | None:
        """Names of the signers that a rule lets sign `name`; None where no rule speaks of it."""
        for rule in self.rules:
            if rule.scope == scope and fnmatchcase(name, rule.pattern):
                return rule.signers
        return None


@dataclass(frozen=True)
class Trust:
    """A policy at one point of the ledger. `kept`: by revoked key, what had been referred to before its revocation."""

    policy: TrustPolicy
    history: KeyHistory = NO_HISTORY
    kept: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[PublicKey, ...]:
        """All keys whose signatures are looked at."""
        return tuple({one.key.key_id: one.key for one in self.policy.known(self.history)}.values())

    def open(self, envelope: Json, payload_type: str = IN_TOTO_PAYLOAD) -> tuple[Json, tuple[str, ...]]:
        """An envelope's payload, and the known keys whose signature on it holds. `require` says if one may sign it."""
        return verify_signatures(envelope, self.keys, payload_type)

    def require(
        self, scope: Scope, name: str, key_ids: Iterable[str], *, time: str, what: str, identity: str | None = None
    ) -> str:
        """The id of the key that may have signed `what`.

        `time` is when it says it was signed (ISO 8601), `identity` the digest by which the ledger may have referred to
        it before its key was revoked. Raises `SignerRefused`, or `KeyRevoked`, with the exact reason.
        """
        try:
            signed = parse_time(time, "time")
        except InputError as error:
            raise SignerRefused(f"{what} does not say when it was signed: {error.message}") from error
        refusal: SignerRefused | None = None
        for key_id in key_ids:
            try:
                self._require(scope, name, key_id, signed, what, identity)
                return key_id
            except SignerRefused as error:
                refusal = error
        raise refusal or SignerRefused(f"{what} is not signed by a trusted key.")

    def _require(self, scope: Scope, name: str, key_id: str, time: datetime, what: str, identity: str | None) -> None:
        known = [one for one in self.policy.known(self.history) if one.key.key_id == key_id]
        signed = f"{what} is signed by key {key_id[:12]} ({', '.join(one.name for one in known)})"
        allowed = self.policy.allowed(scope, name)
        permitted = [one for one in known if allowed is None or one.name in allowed]
        if not permitted:
            raise SignerRefused(
                f"{signed}, which may not sign {scope} {name!r}: only {', '.join(allowed or ())} may.",
                hint=f"Sign it with such a key, or change the rule in {self.policy.source}.",
            )
        if not any(
            (one.not_before is None or one.not_before <= time) and (one.not_after is None or time <= one.not_after)
            for one in permitted
        ):
            window = permitted[0]
            raise SignerRefused(
                f"{signed}, which counts from {window.not_before or 'ever'} to {window.not_after or 'ever'} only; "
                f"this was signed at {time}.",
                hint=f"Sign it with a key that is valid now, or change its dates in {self.policy.source}.",
            )
        revoked = self.history.revocations.get(key_id)
        if revoked is not None and (identity is None or identity not in self.kept.get(key_id, ())):
            raise KeyRevoked(
                f"{signed}, which {revoked.by} revoked at {revoked.time}: {revoked.reason}. No ledger entry before "
                f"that one ({revoked.sequence}) refers to it.",
                hint="Make it again, so that a key that counts signs it; `sluice keys list` shows the keys.",
            )


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _SignerSection(_Section):
    key: str = Field(min_length=1)
    not_before: datetime | None = None
    not_after: datetime | None = None


class _RuleSection(_Section):
    steps: str | None = None
    ledger: str | None = None
    models: str | None = None
    signers: tuple[str, ...] = Field(min_length=1)


class _PolicyFile(_Section):
    signers: dict[str, _SignerSection] = {}
    rules: tuple[_RuleSection, ...] = ()


def load_policy(file: Path, own: PublicKey, trusted: Path) -> TrustPolicy:
    """The policy of an installation: its own key, the public keys in `trusted`, and what `file` says, if it is there.

    Raises `InputError` that names the field, for an unknown signer as for a key that cannot be read.
    """
    signers = [TrustedSigner(OWN, own)]
    signers += [TrustedSigner(path.name.split(".")[0], read_public_key(path)) for path in sorted(trusted.glob("*.pub"))]
    if not file.is_file():
        return TrustPolicy(tuple(signers))
    import yaml

    try:
        written = _PolicyFile.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The trust policy {file} cannot be read: {error}.") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise InputError(f"The trust policy {file}: {problems}.") from error
    for name, section in written.signers.items():
        place = f"The trust policy {file}: signers.{name}"
        for when, date in (("not_before", section.not_before), ("not_after", section.not_after)):
            if date is not None and date.tzinfo is None:
                raise InputError(f"{place}.{when} = {date} has no time zone.", hint="For example 2026-01-01T00:00:00Z.")
        inline = section.key.lstrip().startswith("-----BEGIN")
        key = parse_public_key(section.key.encode(), place) if inline else read_public_key(file.parent / section.key)
        signers.append(TrustedSigner(name, key, section.not_before, section.not_after))
    names = {one.name for one in signers}
    rules = []
    for number, rule in enumerate(written.rules):
        given = [(scope, pattern) for scope in _SCOPES if (pattern := getattr(rule, scope)) is not None]
        if len(given) != 1:
            raise InputError(f"The trust policy {file}: rules.{number} names {len(given)} of steps, ledger and models.")
        if strange := sorted(set(rule.signers) - names):
            raise InputError(
                f"The trust policy {file}: rules.{number}.signers = {strange[0]!r} is no signer.",
                hint=f"Signers are {', '.join(sorted(names))}.",
            )
        rules.append(Rule(given[0][0], given[0][1], rule.signers))
    return TrustPolicy(tuple(signers), tuple(rules), str(file))


_SCOPES: tuple[Scope, ...] = ("steps", "ledger", "models")
