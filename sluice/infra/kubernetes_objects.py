"""Objects of one Kubernetes namespace: read, create, replace only what nobody else changed, delete.

Plain JSON in and out, so that no field a newer API adds is dropped. A replace carries the `resourceVersion` that was
read; when somebody changed the object meanwhile the API server refuses it, and nothing is lost. Unknown fields are
refused too: without `fieldValidation=Strict` an API server drops them silently.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sluice.infra.errors import AccessRefused, ConflictError, InputError, UnavailableError

Object = dict[str, Any]


class ObjectChanged(ConflictError):
    """The object is no longer the one that was read, or one of that name exists: read it and decide again."""


def open_client() -> Any:
    """A `kubernetes.client.ApiClient` with the pod's own account, or outside a cluster as kubectl's configuration says.
    Raises `UnavailableError`."""
    from kubernetes import client, config

    try:
        try:
            config.load_incluster_config()
        except config.ConfigException:
            config.load_kube_config()
    except config.ConfigException as error:
        raise UnavailableError(
            f"No Kubernetes cluster is known: {error}.",
            hint="Run this in a pod with a service account, or where kubectl works.",
        ) from error
    return client.ApiClient()


@dataclass(frozen=True)
class Kind:
    """A kind of the API. `group` is empty for the core group; `plural` is its name in addresses."""

    group: str
    version: str
    plural: str
    name: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


class KubernetesObjects:
    """`client` is a `kubernetes.client.ApiClient`; `timeout_s` bounds each call.

    Each call raises `UnavailableError` when the API does not answer or is overloaded (worth trying again),
    `AccessRefused` when the account may not, and `InputError` when the API does not take the object.
    """

    def __init__(self, client: Any, namespace: str, timeout_s: float = 5.0) -> None:
        self.namespace = namespace
        self._client = client
        self._timeout_s = timeout_s

    @classmethod
    def open(cls, namespace: str) -> KubernetesObjects:
        """With the pod's own account, or outside a cluster as kubectl's configuration says."""
        return cls(open_client(), namespace)

    def get(self, kind: Kind, name: str) -> Object | None:
        """None when there is none."""
        try:
            return self._ask("GET", kind, name)
        except _NotThere:
            return None

    def listed(self, kind: Kind, labels: str) -> list[Object]:
        """Objects with those labels; none where the kind is not installed."""
        try:
            return list(self._ask("GET", kind, "", query=[("labelSelector", labels)])["items"])
        except _NotThere:
            return []

    def create(self, kind: Kind, body: Object) -> Object:
        """The stored object. Raises `ObjectChanged` when one of that name exists."""
        try:
            return self._ask("POST", kind, "", body)
        except _NotThere as error:
            raise _not_installed(kind, error) from error

    def replace(self, kind: Kind, body: Object) -> Object:
        """The stored object. `body` carries the `resourceVersion` that was read. Raises `ObjectChanged`."""
        name = body["metadata"]["name"]
        if not body["metadata"].get("resourceVersion"):
            raise InputError(f"metadata.resourceVersion of {kind.name} {name!r} is empty: read it before replacing it.")
        try:
            return self._ask("PUT", kind, name, body)
        except _NotThere as error:
            raise ObjectChanged(f"The {kind.name} {name!r} was deleted meanwhile.") from error

    def delete(self, kind: Kind, name: str) -> None:
        """No object is success."""
        try:
            self._ask("DELETE", kind, name)
        except _NotThere:
            pass

    def _ask(
        self, method: str, kind: Kind, name: str, body: Object | None = None, query: list[tuple[str, str]] | None = None
    ) -> Object:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
        path = f"{root}/namespaces/{self.namespace}/{kind.plural}" + (f"/{name}" if name else "")
        if body is not None:
            query = [("fieldValidation", "Strict")]
        try:
            answer: Object = self._client.call_api(
                path,
                method,
                query_params=query or [],
                header_params={"Accept": "application/json", "Content-Type": "application/json"},
                body=body,
                response_type="object",
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _request_timeout=self._timeout_s,
            )
        except ApiException as error:
            said = _message(error)
            if error.status == 404:
                raise _NotThere(said) from error
            if error.status == 409:
                raise ObjectChanged(f"Somebody else was first: {said}") from error
            if error.status in (401, 403):
                raise AccessRefused(
                    f"The cluster refuses it: {said}", hint="docs/kubernetes-routing.md lists what the account needs."
                ) from error
            if error.status in (400, 422):
                raise InputError(f"The cluster does not take the {kind.name} {name!r}: {said}") from error
            raise UnavailableError(f"The Kubernetes API answers {error.status}: {said}") from error
        except (HTTPError, OSError) as error:
            raise UnavailableError(
                f"The Kubernetes API does not answer: {error}.",
                hint="Is the cluster up, and this account's address right?",
            ) from error
        return answer


class _NotThere(Exception):
    pass


def _not_installed(kind: Kind, error: Exception) -> UnavailableError:
    return UnavailableError(
        f"The cluster knows no {kind.name} of {kind.api_version}, or the namespace is missing: {error}.",
        hint="Install its CRDs, or create the namespace (docs/kubernetes-routing.md).",
    )


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, TypeError, KeyError):
        return str(error.reason or error)
