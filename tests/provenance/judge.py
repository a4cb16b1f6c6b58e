"""A second opinion on the ledger's rules: it replays bare entries and knows nothing of `ReleaseState`."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from typing import Any

from sluice.provenance.ledger import LedgerEntry


class Judge:
    """Replays entries and says when one breaks an invariant."""

    def __init__(self) -> None:
        self.champion: str | None = None
        self.weight: defaultdict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.decision: dict[str, LedgerEntry] = {}
        # By release: who approved the latest decision, each by all the names that they go by.
        self.approved: defaultdict[str, list[set[str]]] = defaultdict(list)

    def see(self, entry: LedgerEntry, now: datetime) -> None:
        body: Any = entry.body
        if entry.kind == "decision":
            self.decision[body["adapter"]] = entry
            self.approved[body["adapter"]] = []
        elif entry.kind == "approval":
            assert body["decision"] == self.decision[body["adapter"]].digest
            self.approved[body["adapter"]].append({body["approver"].lower(), body["account"].lower() or "nobody knows"})
        elif entry.kind == "rejection":
            self.approved[body["adapter"]] = []
        elif entry.kind == "failure":
            self.failed.add(body["release"])
        elif entry.kind == "rollout":
            if body["weight"] > self.weight[body["release"]]:
                self.may_grow(body["release"], now)
            self.weight[body["release"]] = body["weight"]
            if body["verdict"] == "fail":
                self.failed.add(body["release"])
        elif entry.kind == "promotion":
            assert body["previous"] == self.champion, "invariant 2"
            self.may_grow(body["release"], now)
            self.move_to(body["release"])
        elif entry.kind == "rollback":
            assert body["to"] not in self.failed, "invariant 8"
            self.approved[body["release"]] = []
            self.weight[body["release"]] = 0.0
            self.move_to(body["to"])

    def may_grow(self, release: str, now: datetime) -> None:
        assert release not in self.failed, "invariant 8"
        if release != self.champion:
            decision: Any = self.decision[release].body
            assert decision["verdict"] == "pass", "invariant 1: passing"
            assert now < datetime.fromisoformat(decision["expires"]), "invariant 1: unexpired"
            assert decision["champion"] == self.champion, "invariant 1: compared with the present champion"
            assert self.people(release) >= decision["approvers"], "invariant 1: approved by as many as were asked for"

    def people(self, release: str) -> int:
        """How many people approved for certain: 0, 1, or 2 for two or more."""
        given = self.approved[release]
        return 2 if any(not one & other for one in given for other in given) else min(len(given), 1)

    def move_to(self, release: str) -> None:
        if release != self.champion:
            self.weight.clear()
        self.champion = release
        self.weight[release] = 100.0
