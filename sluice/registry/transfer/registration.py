"""What people of the receiving site see of an imported release, and what its own ledger says about it.

By default nothing that another site decided counts here: the version is registered, tells where it came from and what
was decided there, and waits for a gate of this site. Where the policy accepts that site's decisions
(`release.accept_decisions_of`), the decision becomes an entry of this site's ledger, under the name of the site, and
the version waits for an approval by this site's people. An approval is never taken over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import short
from sluice.provenance.ledger import Draft, Ledger, LedgerEntry
from sluice.provenance.release_state import Decision
from sluice.provenance.releases import read_state, record_decision
from sluice.provenance.times import parse_time
from sluice.registry.description import LIMIT, VERDICTS, align_tables
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.transfer.released import Release
from sluice.registry.transfer.snapshot import ReleaseEntry, Snapshot
from sluice.registry.versions import RESERVED_TAGS, Version, find_version, register_version, set_gate

REPORT_FILE = "report.md"


@dataclass(frozen=True)
class Imported:
    """A release that is now here. `accepted`: its decision counts here and a person may approve it; `why` in words."""

    version: Version
    new: bool
    accepted: bool
    why: str


def register_import(
    registry: MlflowRegistry,
    ledger: Ledger | None,
    artifacts: ArtifactStore,
    snapshot: Snapshot,
    release: ReleaseEntry,
    found: Release,
    *,
    application: str,
    accept_decision: bool,
    actor: str,
) -> Imported:
    """Note the import in the ledger (where this process may write it) and show the release as a version in MLflow.

    Again is success. Raises `ConflictError` when the digest is registered with another base or dataset.
    """
    accepted, why = False, f"it waits for a gate of this site: decisions of {snapshot.site!r} do not count here"
    if ledger is not None:
        _note_import(ledger, snapshot, release, found, actor)
        if accept_decision:
            accepted, why = _take_decision(ledger, artifacts, snapshot, release, found)
    report = _files(artifacts, release.report, REPORT_FILE).get(REPORT_FILE, b"").decode()
    known = find_version(registry, application, release.release)
    tags = {name: value for name, value in release.tags.items() if _carried(name)}
    card = _files(artifacts, release.dataset, "card.html")
    files = {f"data-{name}": data for name, data in card.items()} | _files(artifacts, release.report, "report.html")
    version = _register(
        registry,
        application,
        release,
        {
            **tags,
            "base": release.base.digest,
            "dataset": release.dataset,
            "site": snapshot.site,
            "site.version": str(release.number),
            "site.gate": found.verdict,
            "site.approved.by": found.approver,
        },
        _description(snapshot, found, report),
        files,
    )
    if accepted and (known is None or known.tags.get("decision") != release.evidence):
        version = set_gate(registry, version, found.verdict, report, release.evidence)
    return Imported(version, known is None, accepted, why)


def _register(
    registry: MlflowRegistry,
    application: str,
    release: ReleaseEntry,
    tags: Mapping[str, str],
    description: str,
    files: Mapping[str, bytes],
) -> Version:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in files}
        for name, data in files.items():
            paths[name].write_bytes(data)
        return register_version(
            registry,
            application=application,
            kind="adapter",
            digest=release.release,
            tags=tags,
            description=description,
            files=paths,
            run_id=None,
        )


def _note_import(ledger: Ledger, snapshot: Snapshot, release: ReleaseEntry, found: Release, actor: str) -> None:
    """Say in the ledger, once for each foreign decision, what was let in, from whom, and who let it in."""
    body = {
        "release": release.release,
        "site": snapshot.site,
        "snapshot": snapshot.number,
        "decision": found.decision,
        "verdict": found.verdict,
        "approver": found.approver,
    }

    def decide(entries: list[LedgerEntry]) -> Draft | LedgerEntry:
        for entry in entries:
            same = (entry.body.get("release"), entry.body.get("site"), entry.body.get("decision"))
            if entry.kind == "import" and same == (release.release, snapshot.site, found.decision):
                return entry
        return Draft("import", body)

    ledger.transact(actor, decide)


def _take_decision(
    ledger: Ledger, artifacts: ArtifactStore, snapshot: Snapshot, release: ReleaseEntry, found: Release
) -> tuple[bool, str]:
    """Whether the foreign decision counts here now, and why."""
    site = snapshot.site
    if found.verdict != "pass":
        return False, f"it waits for a gate of this site: {site!r} overrode its own, and that is not taken over"
    if datetime.now(UTC) >= parse_time(found.expires, "expires"):
        return False, f"it waits for a gate of this site: the decision of {site!r} expired at {found.expires}"
    known = read_state(ledger).decision_for(release.release)
    if known is not None and known.entry.actor != _actor(site):
        return False, f"this site has decided itself: {known.verdict} at {known.entry.time[:19]}"
    if known is None or not _same(known, found):
        decided = json.loads(artifacts.read_file(release.evidence, "decision.json"))
        record_decision(
            ledger,
            adapter=release.release,
            verdict="pass",
            report=found.report,
            expires=found.expires,
            holdout=decided.get("holdout"),
            champion=found.champion,
            approvers=found.approvers,
            actor=_actor(site),
        )
    champion = read_state(ledger).champion()
    if champion is not None and champion != found.champion:
        compared = short(found.champion) if found.champion else "no champion"
        return True, (
            f"the decision of {site!r} counts here, but it compares with {compared}, and the champion here is "
            f"{short(champion)}: its release will be refused until a gate of this site has compared the two"
        )
    return True, f"the decision of {site!r} counts here: it waits for an approval"


def _same(known: Decision, found: Release) -> bool:
    return (known.report, known.expires) == (found.report, found.expires)


def _actor(site: str) -> str:
    return f"site:{site}"


def _carried(name: str) -> bool:
    return name.split(".")[0] not in (*RESERVED_TAGS, "site", "mlflow", "alias")


def _files(artifacts: ArtifactStore, digest: str, name: str) -> dict[str, bytes]:
    """A file of an artifact by its name; empty where the artifact has no such file."""
    there = any(entry.path == name for entry in artifacts.manifest(digest).files)
    return {name: artifacts.read_file(digest, name)} if there else {}


def _description(snapshot: Snapshot, found: Release, report: str) -> str:
    text = "\n\n".join(
        [
            f"### Imported from {snapshot.site}",
            f"**The gate there: {found.verdict}.** {VERDICTS[found.verdict].split('. ')[0]}. "
            f"Approved there by {found.approver}. That site's people decided for that site; nothing is released "
            "here before this site's own gate or policy, and an approval by this site's people.",
            align_tables(report),
        ]
    )
    return text if len(text) <= LIMIT else f"{text[: LIMIT - 80]}\n\n*(Shortened here: see report.html.)*"
