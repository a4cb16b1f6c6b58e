"""Traces to versioned datasets."""
