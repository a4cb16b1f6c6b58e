"""Sluice: a workflow-orchestrated model supply chain, from a production trace to a canaried model and back."""

__version__ = "0.1.0"
