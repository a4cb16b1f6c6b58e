"""A site with releases made by the real chain (steps, statements, ledger), without servers and without training."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sluice.infra.object_store import ObjectStore
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import PublicKey, Signer
from sluice.provenance.canonical import Json, canonical_json, digest_bytes
from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import promote, read_state, record_approval, record_decision
from sluice.provenance.steps import StepKey, StepOutput, StepRecord, StepRunner
from sluice.registry.model_signature import sign_model, store_signature
from sluice.registry.transfer.content import Wanted
from sluice.registry.transfer.export import Published, publish_snapshot
from tests.support.directory_store import DirectoryStore

CODE = digest_bytes(b"code")
REPORT = "**Gate: PASS.** Better by 0.1.\n\n| Metric | Candidate |\n|---|---|\n| token_f1 | 0.595 |"


class MadeSite:
    """A site's store, keys and ledger below `folder`, the base model its first champion; `release` makes one more
    release, approved unless told not."""

    def __init__(self, folder: Path, name: str, objects: ObjectStore | None = None) -> None:
        self.name, self.folder = name, folder
        self.store = DirectoryStore(folder / "objects")
        self.objects = objects or self.store
        self.signer = Signer.load_or_create(folder / "keys" / "signing.pem")
        self.public_key_file = folder / "keys" / "signing.pem.pub"
        self.artifacts = ArtifactStore(self.objects, folder / "cache")
        self.steps = StepRunner(self.objects, self.artifacts, self.signer, folder / "work")
        self.ledger = Ledger(self.objects, "assistant", self.signer)
        self.base = self._made("base-model", {}, {"model.safetensors": b"base"}, "base-model")["base-model"]
        if read_state(self.ledger).champion() is None:
            self._decide(self.base, self.artifacts.put_files({"report.md": b""}, "report").digest, None)
            record_approval(self.ledger, adapter=self.base, approver="ann")
            self.promote(self.base)

    def release(self, seed: int = 0, *, weights: int = 3000, approved: bool = True, verdict: str = "pass") -> str:
        """Digest of an adapter of so many bytes, with all of its history."""
        champion = read_state(self.ledger).champion()
        assert champion is not None
        records = self._made("harvest", {}, {"records.jsonl": b'{"trace_id": "t1"}\n'}, "records", seed)["records"]
        data = {
            "card.html": b"<h1>Dataset card</h1>",
            "card.json": b"{}",
            "lineage.json": canonical_json({"traces": ["t1"], "scores": []}),
            "train.jsonl": f'{{"prompt": "what a user wrote {seed}"}}\n'.encode(),
        }
        dataset = self._made("curate", {"records": records}, data, "dataset", seed)["dataset"]
        metadata = {"base": self.base, "dataset": dataset}
        made = {"adapter_config.json": b"{}", "adapter_model.safetensors": random.Random(seed).randbytes(weights)}
        adapter = self._made("train", metadata, made, "adapter", seed, metadata)["adapter"]
        gate = self._gate(adapter, champion, dataset, seed, verdict)
        self._decide(adapter, gate.output.artifacts["report"], champion)
        if approved:
            record_approval(self.ledger, adapter=adapter, approver="ann")
        return adapter

    def sign(self, adapter: str, signer: Signer | None = None) -> str:
        """Digest of a signature of an adapter, which names the statement of its training."""
        made = [record for record in self.steps.records() if adapter in record.output.artifacts.values()]
        data = sign_model(self.artifacts.fetch(adapter), signer or self.signer)
        signed, statement = datetime.now(UTC).isoformat(), made[0].statement
        return store_signature(
            self.objects, self.artifacts, subject=adapter, data=data, signed=signed, statement=statement
        ).digest

    def reopen(self, signer: Signer, trusted: tuple[PublicKey, ...] = ()) -> None:
        """Go on with another key; those of before are trusted still."""
        self.signer = signer
        self.steps = StepRunner(self.objects, self.artifacts, signer, self.folder / "work")
        self.ledger = Ledger(self.objects, "assistant", signer, trusted)

    def promote(self, adapter: str) -> None:
        before = read_state(self.ledger).champion()
        promote(self.ledger, release=adapter, expected_champion=before, actor="release")

    def publish(
        self, *releases: str, valid_days: float = 30, now: datetime | None = None, keys: Iterable[PublicKey] = ()
    ) -> Published:
        wanted = [Wanted(one, number, {"owner": "ann"}) for number, one in enumerate(releases, start=1)]
        return publish_snapshot(
            self.objects,
            self.artifacts,
            self.ledger,
            self.signer,
            wanted,
            site=self.name,
            application="assistant",
            keys=keys,
            valid_days=valid_days,
            now=now,
        )

    def _decide(self, release: str, report: str, champion: str | None) -> None:
        record_decision(
            self.ledger,
            adapter=release,
            verdict="pass",
            report=report,
            expires=(datetime.now(UTC) + timedelta(days=7)).isoformat(),
            holdout=None,
            champion=champion,
            actor="gate",
        )

    def _gate(self, adapter: str, champion: str, dataset: str, seed: int, verdict: str) -> StepRecord:
        inputs = {"candidate": adapter, "champion": champion, "dataset": dataset}

        def work(_: Path) -> StepOutput:
            pages = {"report.md": REPORT.encode(), "report.html": f"<h1>{seed}</h1>".encode()}
            report = self.artifacts.put_files(pages, "report", {"candidate": adapter})
            said = {"candidate": adapter, "report": report.digest, "verdict": verdict, "holdout": None}
            decision = self.artifacts.put_files({"decision.json": canonical_json(said)}, "decision")
            return StepOutput({"report": report.digest, "decision": decision.digest}, {"verdict": verdict})

        return self.steps.run(StepKey("gate", CODE, {"seed": seed}, inputs), work)[0]

    def _made(
        self,
        name: str,
        inputs: Mapping[str, str],
        files: Mapping[str, bytes],
        kind: str,
        seed: int = 0,
        metadata: Mapping[str, Json] | None = None,
    ) -> Mapping[str, str]:
        def work(_: Path) -> StepOutput:
            return StepOutput({kind: self.artifacts.put_files(files, kind, metadata).digest})

        return self.steps.run(StepKey(name, CODE, {"seed": seed}, inputs), work)[0].output.artifacts


def resigned(published: Published, signer: Signer, **changes: Json) -> bytes:
    """The snapshot with changed fields, signed anew: what a site that lies would hand over."""
    from sluice.registry.transfer.snapshot import PAYLOAD_TYPE

    payload = {**published.snapshot.model_dump(mode="json"), **changes}
    return canonical_json(signer.sign(json.loads(json.dumps(payload)), PAYLOAD_TYPE))
