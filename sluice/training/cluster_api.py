"""The few calls to the Kubernetes API that a training needs, with plain JSON in and out and errors in our words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sluice.infra.errors import AccessRefused, InputError, UnavailableError
from sluice.infra.kubernetes_objects import open_client

TRAIN_JOBS = ("trainer.kubeflow.org", "v1alpha1", "trainjobs")
RUNTIMES = ("trainer.kubeflow.org", "v1alpha1", "trainingruntimes")
WORKLOADS = ("kueue.x-k8s.io", "v1beta2", "workloads")
Kind = tuple[str, str, str]


class ClusterApi:
    """Objects of one namespace. `client` is a `kubernetes.client.ApiClient`; `timeout_s` bounds each call.

    Each call raises `UnavailableError` when the API does not answer or is overloaded (worth trying again),
    `AccessRefused` when the account may not, and `InputError` when the API refuses the object.
    """

    def __init__(self, client: Any, namespace: str, timeout_s: float = 20.0) -> None:
        from kubernetes import client as kubernetes_client

        self._objects = kubernetes_client.CustomObjectsApi(client)
        self._core = kubernetes_client.CoreV1Api(client)
        self._namespace = namespace
        self._timeout_s = timeout_s

    @classmethod
    def open(cls, namespace: str) -> ClusterApi:
        """With the pod's own account, or outside a cluster as kubectl's configuration says."""
        return cls(open_client(), namespace)

    def create(self, kind: Kind, body: dict[str, Any]) -> bool:
        """False when an object of that name exists."""
        try:
            self._call(lambda: self._objects.create_namespaced_custom_object(*self._place(kind), body, **self._options))
        except _AlreadyThere:
            return False
        return True

    def get(self, kind: Kind, name: str) -> dict[str, Any] | None:
        """None when there is none."""
        try:
            found: dict[str, Any] = self._call(
                lambda: self._objects.get_namespaced_custom_object(*self._place(kind), name, **self._options)
            )
        except _NotThere:
            return None
        return found

    def delete(self, kind: Kind, name: str) -> None:
        """Begin to delete it and what it owns; it is there until its pods are gone. No object is success."""
        try:
            self._call(
                lambda: self._objects.delete_namespaced_custom_object(
                    *self._place(kind), name, propagation_policy="Foreground", **self._options
                )
            )
        except _NotThere:
            pass

    def listed(self, kind: Kind, labels: str) -> list[dict[str, Any]]:
        """Objects with those labels; none where the kind is not installed."""
        try:
            found = self._call(
                lambda: self._objects.list_namespaced_custom_object(
                    *self._place(kind), label_selector=labels, **self._options
                )
            )
        except _NotThere:
            return []
        return list(found["items"])

    def pods(self, labels: str) -> list[dict[str, Any]]:
        """As the API sends them: the client's own classes would drop what they do not know."""
        answer = self._call(
            lambda: self._core.list_namespaced_pod(
                self._namespace, label_selector=labels, _preload_content=False, **self._options
            )
        )
        return list(json.loads(answer.data)["items"])

    def log(self, pod: str, lines: int = 400) -> str:
        """The end of a pod's log; empty when it is gone."""
        try:
            answer = self._call(
                lambda: self._core.read_namespaced_pod_log(
                    pod, self._namespace, tail_lines=lines, _preload_content=False, **self._options
                )
            )
        except (_NotThere, InputError):
            return ""
        text: str = answer.data.decode("utf-8", "replace")
        return text

    @property
    def _options(self) -> dict[str, Any]:
        return {"_request_timeout": self._timeout_s}

    def _place(self, kind: Kind) -> tuple[str, str, str, str]:
        group, version, plural = kind
        return group, version, self._namespace, plural

    def _call(self, ask: Callable[[], Any]) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return ask()
        except ApiException as error:
            said = _message(error)
            if error.status == 404:
                raise _NotThere(said) from error
            if error.status == 409:
                raise _AlreadyThere(said) from error
            if error.status in (401, 403):
                raise AccessRefused(
                    f"The cluster refuses it: {said}", hint="docs/cluster-training.md lists what the account needs."
                ) from error
            if error.status in (400, 422):
                raise InputError(f"The cluster does not take the object: {said}") from error
            raise UnavailableError(f"The Kubernetes API answers {error.status}: {said}") from error
        except (HTTPError, OSError) as error:
            raise UnavailableError(f"The Kubernetes API does not answer: {error}.") from error


class _NotThere(Exception):
    pass


class _AlreadyThere(Exception):
    pass


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, TypeError, KeyError):
        return str(error.reason or error)
