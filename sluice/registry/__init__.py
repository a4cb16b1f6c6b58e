"""MLflow runs, model versions, aliases and approvals: what people see of the ledger."""
