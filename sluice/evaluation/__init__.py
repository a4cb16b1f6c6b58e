"""Answers, metrics, statistics, the gate and the report people read."""
