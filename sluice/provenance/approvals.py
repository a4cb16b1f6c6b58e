"""Approvals of a decision: whose words they are, and from how many people they come."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from sluice.provenance.ledger import LedgerEntry

APPROVERS = (1, 2)
"""How many people a decision may ask for."""


@dataclass(frozen=True)
class Approval:
    """A person's (or policy's) word on one decision: `decision` is the digest of that decision's ledger entry.

    `account` is the account that acted: the approver's own, or that of an administrator who decided in the approver's
    name. Empty: the name was typed where nobody checks it (MLflow).
    """

    entry: LedgerEntry
    release: str
    decision: str
    approver: str
    account: str
    reason: str

    @property
    def names(self) -> frozenset[str]:
        """All that this person goes by, without regard to case. Everybody whose name nobody checked is one person."""
        return names_of(self.approver, self.account)


def names_of(approver: str, account: str) -> frozenset[str]:
    """The names of `Approval.names`: two approvals that share one may come from the same person."""
    return frozenset(_comparable(name) for name in (approver, account))


def _comparable(name: str) -> str:
    """A name without what nobody sees: case, width, how an accent is written, invisible characters, extra blanks."""
    seen = "".join(one for one in unicodedata.normalize("NFKC", name) if unicodedata.category(one) != "Cf")
    return unicodedata.normalize("NFKC", " ".join(seen.split()).casefold())


def of_different_people(approvals: Sequence[Approval], wanted: int) -> tuple[Approval, ...]:
    """The first approvals, in the order they were given, that come from `wanted` (1 or 2) people; fewer, if there are
    none such. Approvals that are added later never change a choice that is complete."""
    if wanted != 1:
        for place, later in enumerate(approvals):
            for earlier in approvals[:place]:
                if earlier.names.isdisjoint(later.names):
                    return (earlier, later)
    return tuple(approvals[:1])
