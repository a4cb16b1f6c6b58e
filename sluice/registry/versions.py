"""Model versions: one registered model for each application and one for its indexes, one version for each digest.

MLflow has no unique key but the version's number, so identity is the tag `release` (the digest), written in the same
call that makes the version. Every call here may be repeated after a crash at any point: it finds what is there and
goes on. When two processes register one digest at once, the lower number stays and the other is removed.

Tags on the page (MLflow sorts them by name): `approval`, `approval.answer`, `approval.by`, `approval.reason`,
`champion`, `gate`, `kind`, `release`, `release.base`, `release.dataset`, `release.decision`. `Version.tags` drops the
`release.` prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sluice.infra.errors import ConflictError, InputError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import is_digest, require_digest, short
from sluice.registry import links
from sluice.registry.description import VERDICTS, describe
from sluice.registry.logged_models import DIGEST_TAG, create_model, log_model
from sluice.registry.mlflow_registry import MlflowRegistry, RegistryMissing, pairs, quoted, unpaired
from sluice.registry.run_page import RunLink

Kind = Literal["base", "adapter", "merged", "index"]

RELEASED = ("adapter", "merged")
"""Kinds that a person approves. An index goes live by its gate alone, the base model is there first."""

PASSING = ("PASS", "OVERRIDDEN")
"""Values of the tag `gate` with which a version may be approved."""
NOWHERE = "none"
UNGATED, WAITING, BLOCKED = "waits for gate", "pending", "blocked by gate"
"""Values of the tag `approval` before a person decides."""
RESERVED_TAGS = (DIGEST_TAG, "kind", "gate", "decision", "approval", "champion")


@dataclass(frozen=True)
class Version:
    """One version of an application's model as MLflow shows it. `tags` have no `release.` prefix; `digest` is empty for
    a version that somebody else made."""

    name: str
    number: int
    digest: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    url: str


def register_version(
    registry: MlflowRegistry,
    *,
    application: str,
    kind: Kind,
    digest: str,
    tags: Mapping[str, str],
    description: str,
    files: Mapping[str, Path],
    run_id: str | None,
    report: Report = no_report,
) -> Version:
    """The version of `digest`, registered when it is new.

    `tags` are what the version was made of (`base`, `dataset`, ...: digests) and words for people; gate, decision and
    approval are not among them (`set_gate`, `approvals.show`). `files` are small artifacts to show (a card, a recipe),
    relative path -> local file; weights stay in the artifact store. `run_id` is the run the version came from. Raises
    `ConflictError` when the digest is registered with another kind, base or dataset, or its name is taken by another
    digest.
    """
    require_digest(digest)
    if kind not in get_args(Kind):
        raise InputError(f"kind = {kind!r} is not one of {', '.join(get_args(Kind))}.")
    if reserved := [name for name in tags if name.split(".")[0] in RESERVED_TAGS]:
        raise InputError(
            f"tags holds {', '.join(sorted(reserved))}, which a version gets later or by itself.",
            hint="A gate's decision is shown by set_gate, an approval by approvals.show.",
        )
    found = find_version(registry, application, digest)
    if found is None:
        model_id = log_model(registry, application, kind, digest, tags, files, run_id, report)
        create_model(registry, application)
        first = {} if kind == "base" else {"gate": "not run"}
        if kind in RELEASED:
            first["approval"] = UNGATED
        registry.post(
            "model-versions/create",
            name=application,
            source=f"models:/{model_id}",
            model_id=model_id,
            run_id=run_id,
            description=description,
            # The list of versions shows tags in the order of their making: what people look for comes first.
            tags=pairs({**first, "kind": kind, **{_tag(k, v): v for k, v in tags.items()}, DIGEST_TAG: digest}),
        )
        found = _keep_lowest(registry, application, digest)
    if found is None:
        raise ConflictError(
            f"The version of {short(digest)} vanished while it was registered.", hint="Somebody removed it: run again."
        )
    _require_same(found, {"kind": kind, **{k: v for k, v in tags.items() if k in ("base", "dataset")}})
    missing = {k: v for k, v in tags.items() if k not in found.tags}
    for name, value in missing.items():
        set_tag(registry, found, _tag(name, value), value)
    return get_version(registry, application, found.number)


def find_version(registry: MlflowRegistry, application: str, digest: str) -> Version | None:
    """The version of a digest (the lowest number, should two exist), or None."""
    numbers = _numbers(registry, application, digest)
    # The search leaves the aliases out, a version by its number has them.
    return get_version(registry, application, numbers[0]) if numbers else None


def get_version(registry: MlflowRegistry, application: str, number: int) -> Version:
    """The version of this number. Raises `RegistryMissing`."""
    return _version(
        registry, registry.get("model-versions/get", name=application, version=str(number))["model_version"]
    )


def list_versions(registry: MlflowRegistry, application: str) -> list[Version]:
    """All versions with a digest, newest first, with their aliases."""
    try:
        model = registry.get("registered-models/get", name=application)["registered_model"]
    except RegistryMissing:
        return []
    aliases: dict[str, list[str]] = {}
    for entry in model.get("aliases", []):
        aliases.setdefault(str(entry["version"]), []).append(entry["alias"])
    found = [
        _version(registry, {**raw, "aliases": aliases.get(str(raw["version"]), [])})
        for raw in _search(registry, f"name = {quoted(application)}")
        if is_digest(unpaired(raw.get("tags")).get(DIGEST_TAG, ""))
    ]
    return sorted(found, key=lambda version: -version.number)


def set_gate(
    registry: MlflowRegistry,
    version: Version,
    verdict: str,
    markdown: str,
    decision_digest: str,
    *,
    gate_run: RunLink | None = None,
    picture: str | None = None,
    more: Mapping[str, str] | None = None,
    second_approver: str = "",
) -> Version:
    """Show a gate's decision on the version: verdict, description, alias `candidate` when it may be approved.

    `markdown` is the gate's summary (see `description`), `gate_run` the run that holds report.html and items.html,
    `picture` the path of one of its plots, `more` further links, `second_approver` why two people must approve. A
    decision that the version does not show yet asks for a new approval; the same one again changes no approval.
    """
    if verdict not in VERDICTS:
        raise InputError(f"verdict = {verdict!r} is not one of {', '.join(VERDICTS)}.")
    require_digest(decision_digest, "decision_digest")
    shown_verdict = verdict.upper()
    current = get_version(registry, version.name, version.number)
    asks = current.tags.get("kind") in RELEASED
    if current.tags.get("decision") != decision_digest and asks:
        # An approval belongs to one decision: the old one goes first, the new decision is written last, so that a
        # crash in between leaves a version that asks again, never one that was approved unseen.
        set_tag(registry, version, "approval", waiting_state(shown_verdict))
        for name in ("approval.recorded", "approval.by", "approval.reason", "approval.answer"):
            if name in current.tags:
                registry.delete("model-versions/delete-tag", name=version.name, version=str(version.number), key=name)
    elif asks and current.tags.get("approval", UNGATED) == UNGATED:
        set_tag(registry, version, "approval", waiting_state(shown_verdict))
    set_tag(registry, version, "gate", shown_verdict)
    shown = {}
    if gate_run is not None:
        pages = {"Report": "report.html", "All items": "items.html"}
        shown = {words: f"{gate_run.url}/artifacts/{page}" for words, page in pages.items()}
        shown["Gate run"] = gate_run.url
    text = describe(
        verdict=verdict,
        markdown=markdown,
        number=version.number,
        links={**shown, **(more or {}), "All versions": links.model_page(registry.uri, version.name)},
        picture=links.run_file(registry.uri, gate_run.run_id, picture) if gate_run and picture else None,
        asks=asks,
        second_approver=second_approver,
    )
    registry.patch("model-versions/update", name=version.name, version=str(version.number), description=text)
    _follow_gate(registry, get_version(registry, version.name, version.number))
    set_tag(registry, version, _tag("decision", decision_digest), decision_digest)
    return get_version(registry, version.name, version.number)


def place_alias(registry: MlflowRegistry, application: str, alias: str, version: Version | None) -> None:
    """Point an alias at a version, or nowhere, and note that it was us (`reconcile` tells a move by hand from ours)."""
    if version is None:
        registry.delete("registered-models/alias", name=application, alias=alias)
    else:
        registry.post("registered-models/alias", name=application, alias=alias, version=str(version.number))
    note_alias(registry, application, alias, version)


def note_alias(registry: MlflowRegistry, application: str, alias: str, version: Version | None) -> None:
    """Note on the registered model where we left an alias: the tag `alias.<alias>` = number or `none`."""
    value = str(version.number) if version else NOWHERE
    registry.post("registered-models/set-tag", name=application, key=f"alias.{alias}", value=value)


def index_model(application: str) -> str:
    """Name of the registered model that holds an application's indexes."""
    return f"{application}-index"


def waiting_state(gate: str) -> str:
    """The value of the tag `approval` before a person decides, by that of the tag `gate`."""
    return WAITING if gate in PASSING else BLOCKED


def set_tag(registry: MlflowRegistry, version: Version, key: str, value: str) -> None:
    """Write one tag of a version, as MLflow names it."""
    registry.post("model-versions/set-tag", name=version.name, version=str(version.number), key=key, value=value)


def _follow_gate(registry: MlflowRegistry, version: Version) -> None:
    """`candidate` points at the newest model that may be approved; never at the champion or a rejected version."""
    tags = version.tags
    waits = tags.get("gate") in PASSING and tags.get("approval.recorded") != "rejected"
    if tags.get("kind") in RELEASED and waits and tags.get("champion") != "current":
        place_alias(registry, version.name, "candidate", version)
    elif "candidate" in version.aliases:
        place_alias(registry, version.name, "candidate", None)


def _numbers(registry: MlflowRegistry, application: str, digest: str) -> list[int]:
    condition = f"name = {quoted(application)} and tags.{DIGEST_TAG} = {quoted(require_digest(digest))}"
    return sorted(int(raw["version"]) for raw in _search(registry, condition))


def _keep_lowest(registry: MlflowRegistry, application: str, digest: str) -> Version | None:
    """Of versions that raced for one digest the lowest stays, whoever cleans up; a race for the removal is harmless."""
    for number in _numbers(registry, application, digest)[1:]:
        try:
            registry.delete("model-versions/delete", name=application, version=str(number))
        except RegistryMissing:
            pass
    return find_version(registry, application, digest)


def _search(registry: MlflowRegistry, condition: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    token: str | None = None
    while True:
        page = registry.get("model-versions/search", filter=condition, max_results=1000, page_token=token)
        found.extend(page.get("model_versions", []))
        token = page.get("next_page_token") or None
        if token is None:
            return found


def _version(registry: MlflowRegistry, raw: Mapping[str, Any]) -> Version:
    tags = {key.removeprefix(f"{DIGEST_TAG}."): value for key, value in unpaired(raw.get("tags")).items()}
    name, number = str(raw["name"]), int(raw["version"])
    digest = tags.pop(DIGEST_TAG, "")
    # Somebody may have edited the tag: a version that stands for nothing must not hold up the others.
    digest = digest if is_digest(digest) else ""
    url = links.version_page(registry.uri, name, number)
    return Version(name, number, digest, tuple(sorted(raw.get("aliases", []))), tags, url)


def _tag(name: str, value: str) -> str:
    """Digests are sorted to the end of the page, behind what people look for."""
    return f"{DIGEST_TAG}.{name}" if is_digest(value) else name


def _require_same(found: Version, expected: Mapping[str, str]) -> None:
    for name, value in expected.items():
        if found.tags.get(name, value) != value:
            raise ConflictError(
                f"{short(found.digest)} is registered as version {found.number} with {name} = {found.tags[name]!r}, "
                f"not {value!r}.",
                hint="One digest has one origin: somebody edited the tag in MLflow, or the wrong digest was given.",
            )
