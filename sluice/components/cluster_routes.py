"""The gateway of a cluster and the controller's lease there, from the settings (docs/kubernetes-routing.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.infra.kubernetes_objects import KubernetesObjects
from sluice.serving.cluster_lease import ClusterLease
from sluice.serving.data_plane import DataPlane
from sluice.serving.http_route import HttpRouteRouter
from sluice.serving.http_route_rules import ClusterGateway
from sluice.serving.model_rewrite import ModelRewriteRouter

if TYPE_CHECKING:
    from sluice.infra.settings import Settings


def cluster_router(
    settings: Settings, objects: KubernetesObjects | None = None
) -> HttpRouteRouter | ModelRewriteRouter:
    """The router that setting `cluster.router` names. Raises `UnavailableError` when no cluster is known."""
    cluster = settings.cluster
    objects = objects or KubernetesObjects.open(cluster.namespace)
    proxies = DataPlane(cluster.proxies_url, host=cluster.hostname) if cluster.proxies_url else None
    metrics = DataPlane(cluster.metrics_url) if cluster.metrics_url else None
    if cluster.router == "model-rewrite":
        return ModelRewriteRouter(objects, settings.application, cluster.pool, gateway=proxies, metrics=metrics)
    gateway = ClusterGateway(
        cluster.gateway, cluster.gateway_namespace, cluster.listener, cluster.hostname, cluster.gateway_service
    )
    return HttpRouteRouter(objects, settings.application, gateway, proxies=proxies, metrics=metrics)


def cluster_lease(settings: Settings, holder: str, objects: KubernetesObjects | None = None) -> ClusterLease:
    """The lease of this application's rollouts on the cluster. Raises `UnavailableError` when no cluster is known."""
    return ClusterLease(objects or KubernetesObjects.open(settings.cluster.namespace), settings.application, holder)
