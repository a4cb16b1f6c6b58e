"""A job of four p5.48xlarge nodes."""

from __future__ import annotations

from typing import Any

from sluice.infra.settings import ObjectStoreSettings, TrainingSettings
from sluice.training.launcher import ClusterJob, cluster_job
from sluice.training.recipe import Recipe, load_recipe

KEY = "sha256:" + "3f" * 32
IMAGE = "registry.example/ml/train@sha256:" + "0" * 64


def big_recipe(**overrides: Any) -> Recipe:
    fields: dict[str, Any] = {"schedule.global_batch_size": 64, "schedule.micro_batch_size": 2, "parallelism.nodes": 4}
    fields |= {"parallelism.processes": 8, "parallelism.backend": "nccl", "budget.timeout_minutes": 240.0}
    return load_recipe("tiny").with_overrides(fields | overrides)


def settings(**fields: Any) -> TrainingSettings:
    given = {"image": IMAGE, "claim": "fsx-train", "queue": "train", "priority": "prod", "object_store_secret": "s3"}
    return TrainingSettings(**(given | fields))


def big_job(overrides: dict[str, Any] | None = None, **fields: Any) -> ClusterJob:
    store = ObjectStoreSettings(bucket="models", endpoint_url="https://s3.example/it's", region="eu-central-1")
    return cluster_job(big_recipe(**(overrides or {})), KEY, settings(**fields), store)
