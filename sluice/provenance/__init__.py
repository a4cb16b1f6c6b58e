"""Artifacts by digest, step records, attestations, lineage and the promotion ledger."""
