"""Addresses of MLflow's pages, for people and for links between pages."""

from __future__ import annotations

from urllib.parse import quote, urlencode


def model_page(uri: str, application: str) -> str:
    """Page of a registered model: all its versions."""
    return f"{uri}/#/models/{quote(application, safe='')}"


def version_page(uri: str, application: str, number: int) -> str:
    """Page of one model version: gate, tags, approval."""
    return f"{model_page(uri, application)}/versions/{number}"


def experiment_page(uri: str, experiment_id: str) -> str:
    """Page of an experiment: its runs."""
    return f"{uri}/#/experiments/{quote(experiment_id, safe='')}"


def run_page(uri: str, experiment_id: str, run_id: str) -> str:
    """Page of one run."""
    return f"{experiment_page(uri, experiment_id)}/runs/{quote(run_id, safe='')}"


def run_file(uri: str, run_id: str, path: str) -> str:
    """Address of the bytes of one file of a run; a picture in a description points here."""
    return f"{uri}/get-artifact?{urlencode({'path': path, 'run_uuid': run_id})}"


def trace_page(uri: str, experiment_id: str, trace_id: str) -> str:
    """Page of one trace (its id as MLflow has it: `tr-` and 32 hex digits), opened among its experiment's traces."""
    return f"{experiment_page(uri, experiment_id)}/traces?{urlencode({'selectedEvaluationId': trace_id})}"
