"""Who may do what: every verb that destroys or promotes asks here for a role, and leaves a line in the audit log.

Two authorities answer. On the local profile the settings do (`access.roles`, `access.default`); without any, the owner
of the home may do everything, and nobody else anything. That guards against mistakes, not against the owner: who can
write the settings can grant himself a role. On the cluster profile Kubernetes' RBAC is asked (a SelfSubjectAccessReview
on the verb and resource below, in the API group `sluice.dev`), for the very identity whose credentials are used.

Source of the reviews: https://kubernetes.io/docs/reference/access-authn-authz/authorization/ (fields of
`authorization.k8s.io/v1` and `authentication.k8s.io/v1`).
"""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sluice.infra.audit import AuditLine, append
from sluice.infra.errors import AccessRefused, InputError, UnavailableError
from sluice.infra.settings import Role, Settings

ACTOR_VARIABLE = "SLUICE_ACTOR"
GROUP = "sluice.dev"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True)
class Verb:
    """A verb that asks: the role that holds it, and how Kubernetes' RBAC names it. `emergency` verbs are never held up
    by an authority that does not answer."""

    role: Role
    resource: str
    kubernetes_verb: str
    emergency: bool = False


VERBS = {
    "up": Verb("operator", "installations", "update"),
    "down": Verb("operator", "installations", "delete"),
    "run": Verb("operator", "runs", "create"),
    "sweep": Verb("operator", "runs", "create"),
    "train": Verb("operator", "runs", "create"),
    "judge calibrate": Verb("operator", "runs", "create"),
    "cancel": Verb("operator", "runs", "delete"),
    "release pause": Verb("operator", "releases", "pause"),
    "release resume": Verb("operator", "releases", "resume"),
    "release promote": Verb("approver", "releases", "promote"),
    "release drift repair": Verb("operator", "releases", "update"),
    "release abort": Verb("operator", "releases", "abort", emergency=True),
    "rollback": Verb("operator", "releases", "rollback", emergency=True),
    "approve": Verb("approver", "releases", "approve"),
    "take over from MLflow": Verb("approver", "releases", "approve"),
    "approvals serve": Verb("approver", "releases", "approve"),
    "reject": Verb("approver", "releases", "reject"),
    "override": Verb("administrator", "releases", "override"),
    "decide as another": Verb("administrator", "releases", "impersonate"),
    "demo": Verb("administrator", "releases", "override"),
    "gc delete": Verb("administrator", "artifacts", "delete"),
    "keys rotate": Verb("administrator", "keys", "update"),
    "keys revoke": Verb("administrator", "keys", "delete"),
    "export": Verb("administrator", "bundles", "create"),
    "import": Verb("administrator", "bundles", "create"),
    "sync": Verb("administrator", "bundles", "create"),
    "sites trust": Verb("administrator", "sites", "update"),
    "sites publish": Verb("administrator", "bundles", "create"),
    "reproduce": Verb("operator", "runs", "create"),
}
"""By the command's words. What only reads is not here: everybody who has the store's credentials may look."""


@dataclass(frozen=True)
class Answer:
    """What an authority says, and why."""

    allowed: bool
    reason: str


class Authority(Protocol):
    """Knows who acts and what they may do. Both raise `UnavailableError` when nobody answers."""

    def identity(self) -> str:
        """The name of whoever acts."""

    def allows(self, verb: Verb) -> Answer:
        """Whether they may."""


class SettingsAuthority:
    """Roles by name from the settings; the identity is the login name, or SLUICE_ACTOR where that is trusted."""

    def __init__(self, settings: Settings) -> None:
        self._access = settings.access
        self._home = settings.home

    def identity(self) -> str:
        if self._access.trust_actor and (named := os.environ.get(ACTOR_VARIABLE, "").strip()):
            return named
        return login()

    def allows(self, verb: Verb) -> Answer:
        name = self.identity()
        if name in self._access.roles:
            roles, source = self._access.roles[name], f"access.roles.{name}"
        elif self._access.default is not None:
            roles, source = self._access.default, "access.default"
        elif self._access.roles:
            return Answer(False, f"access.roles does not name {name}, and there is no access.default")
        else:
            owner = _owner(self._home)
            return Answer(owner, "owner of the home" if owner else "not the owner of the home")
        held = verb.role in roles or "administrator" in roles
        return Answer(held, f"{source} = {', '.join(roles) or 'none'}")


class KubernetesAuthority:
    """The cluster's RBAC, asked in-cluster with the pod's own account (or with what a test hands in)."""

    def __init__(self, address: str, token: str, namespace: str, verify: str | bool = True) -> None:
        self._address, self._token, self._namespace, self._verify = address.rstrip("/"), token, namespace, verify

    @classmethod
    def in_cluster(cls) -> KubernetesAuthority:
        """From a pod's environment and mounted account. Raises `UnavailableError` outside a cluster."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        try:
            token = (_ACCOUNT / "token").read_text().strip()
            namespace = (_ACCOUNT / "namespace").read_text().strip()
        except OSError as error:
            raise UnavailableError(
                f"The cluster's RBAC cannot be asked: there is no service account in {_ACCOUNT}.",
                hint="Run this in a pod of the cluster that has one.",
            ) from error
        if not host:
            raise UnavailableError("The cluster's RBAC cannot be asked: KUBERNETES_SERVICE_HOST is not set.")
        bracketed = f"[{host}]" if ":" in host else host
        return cls(f"https://{bracketed}:{port}", token, namespace, str(_ACCOUNT / "ca.crt"))

    def identity(self) -> str:
        status = self._review("authentication.k8s.io", "selfsubjectreviews", "SelfSubjectReview", {})
        return str(status["userInfo"]["username"])

    def allows(self, verb: Verb) -> Answer:
        attributes = {
            "namespace": self._namespace,
            "group": GROUP,
            "resource": verb.resource,
            "verb": verb.kubernetes_verb,
        }
        spec = {"resourceAttributes": attributes}
        status = self._review("authorization.k8s.io", "selfsubjectaccessreviews", "SelfSubjectAccessReview", spec)
        # An authorizer that could not evaluate says so beside `allowed: false`: that is no answer.
        if not status.get("allowed") and status.get("evaluationError") and not status.get("denied"):
            raise UnavailableError(f"The cluster's RBAC could not decide: {status['evaluationError']}.")
        words = f"{verb.kubernetes_verb} {verb.resource}.{GROUP} in namespace {self._namespace}"
        return Answer(bool(status.get("allowed")), str(status.get("reason") or f"RBAC on {words}"))

    def _review(self, group: str, plural: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
        import httpx

        body = {"apiVersion": f"{group}/v1", "kind": kind, **({"spec": spec} if spec else {})}
        try:
            answer = httpx.post(
                f"{self._address}/apis/{group}/v1/{plural}",
                json=body,
                headers={"authorization": f"Bearer {self._token}"},
                timeout=httpx.Timeout(5.0, connect=3.0),
                verify=self._verify,
                trust_env=False,
            )
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()["status"]
        except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError) as error:
            raise UnavailableError(
                f"The Kubernetes API at {self._address} does not answer a {kind}: {_cause(error)}.",
                hint="Whether you may do this cannot be decided without it.",
            ) from error
        return found


def open_authority(settings: Settings) -> Authority:
    """Who answers on this profile. Raises `InputError` for roles in the settings of a cluster, where RBAC decides."""
    if settings.profile == "local":
        return SettingsAuthority(settings)
    if settings.access.roles or settings.access.default is not None:
        raise InputError(
            "Setting access.roles or access.default is given on the cluster profile, where the cluster's RBAC decides.",
            hint=f"Bind roles in the API group {GROUP} instead (docs/access.md).",
        )
    return KubernetesAuthority.in_cluster()


def require(settings: Settings, verb: str, subject: str = "") -> str:
    """The identity of whoever acts, if they may do `verb` to `subject`; a line in the audit log either way.

    Raises `AccessRefused`, `UnavailableError` when the authority or the audit log cannot be reached. An emergency verb
    (`rollback`, `release abort`) goes on then, under the login name, and the line says so: users come first.
    """
    asked = VERBS[verb]
    try:
        authority = open_authority(settings)
        identity = authority.identity()
        answer = authority.allows(asked)
        outcome = "allowed" if answer.allowed else "refused"
    except (UnavailableError, InputError) as error:
        # A verb of emergency is not held up by wrong roles in the settings either.
        answer = Answer(asked.emergency, error.message)
        identity, outcome = login(), "emergency" if asked.emergency else "refused"
        if not asked.emergency:
            append(settings.home, AuditLine(identity, verb, subject, outcome, answer.reason, asked.role))
            raise
    try:
        append(settings.home, AuditLine(identity, verb, subject, outcome, answer.reason, asked.role))
    except UnavailableError:
        if not asked.emergency:
            raise
    if not answer.allowed:
        raise AccessRefused(
            f"{identity} may not {verb}{f' {subject}' if subject else ''}: it needs the role {asked.role} "
            f"({answer.reason}).",
            hint="An administrator grants roles: docs/access.md tells how.",
        )
    return identity


def acting_as(settings: Settings, verb: str, subject: str, by: str) -> str:
    """As `require`; the name that the act gets: whoever acts, or `by`, whom only an administrator may name."""
    identity = require(settings, verb, subject)
    if by and by != identity:
        require(settings, "decide as another", by)
    return by or identity


def login() -> str:
    """The name of this process's user, by the system's account: LOGNAME and USER could say anything."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        # A container's user may have no name.
        return f"uid-{os.getuid()}"


def _owner(home: Path) -> bool:
    try:
        return home.stat().st_uid == os.getuid()
    except FileNotFoundError:
        # Whoever makes it will own it.
        return True


def _cause(error: Exception) -> str:
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.response.status_code} {error.response.text[:200]}"
    return str(error) or type(error).__name__
