"""The controller's lease on a cluster: a `coordination.k8s.io/v1` Lease, as the cluster's own controllers hold one.

Taking it counts `leaseTransitions` up in the same conditional write, so that number is the fencing token. A waiter
measures the holder's silence on its own clock, from when it saw the last renewal: clocks need not agree, and the
written times are for people. Among several waiters whoever writes first is next; there is no queue.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

from sluice.infra.errors import SluiceError, UnavailableError
from sluice.infra.kubernetes_objects import Kind, KubernetesObjects, Object, ObjectChanged
from sluice.infra.progress import Report, no_report

LEASE = Kind("coordination.k8s.io", "v1", "leases", "Lease")
DURATION_S = 15.0
_OWN_SHARE = 0.8
"""A holder counts itself out before others may: at this share of the duration after its last renewal was sent."""
_log = logging.getLogger(__name__)


class ClusterLease:
    """`controller_lease.ControllerLease` on a cluster. `holder` is what the others are told they wait for."""

    def __init__(
        self,
        objects: KubernetesObjects,
        application: str,
        holder: str,
        *,
        duration_s: float = DURATION_S,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._objects = objects
        self._name = f"{application}-rollout"
        self._identity = f"{holder} {uuid.uuid4().hex[:8]}"
        self.duration_s = duration_s
        self._wall = wall

    def acquire(self, report: Report = no_report) -> ClusterHeld:
        """Wait for the lease. Raises `AccessRefused`, and `UnavailableError` when the API stays away."""
        seen: tuple[str, float] = ("", 0.0)
        told, answered = "", time.monotonic()
        while True:
            asked = time.monotonic()
            try:
                found = self._objects.get(LEASE, self._name)
                answered = asked
                if found is None or not found["spec"].get("holderIdentity"):
                    return ClusterHeld(self, self._take(found), asked)
                version = found["metadata"]["resourceVersion"]
                if version != seen[0]:
                    seen = (version, asked)
                elif asked - seen[1] > float(found["spec"].get("leaseDurationSeconds") or self.duration_s):
                    return ClusterHeld(self, self._take(found), asked)
            except ObjectChanged:
                continue
            except UnavailableError:
                if asked - answered > self.duration_s:
                    raise
            else:
                holder = str(found["spec"]["holderIdentity"]).rpartition(" ")[0]
                if holder != told:
                    report(0, 0, f"waiting for {holder}")
                    told = holder
            time.sleep(min(1.0, self.duration_s / 10))

    def renew(self, held: Object) -> Object:
        """The lease with a new time. Raises `ObjectChanged` when it is somebody else's now."""
        try:
            return self._write(held, {**held["spec"], "renewTime": self._now()})
        except ObjectChanged:
            found = self._objects.get(LEASE, self._name)
            if found is None or found["spec"].get("holderIdentity") != self._identity:
                raise
            # Somebody put a label on it, or our own renewal was sent twice.
            return self._write(found, {**found["spec"], "renewTime": self._now()})

    def let_go(self, held: Object) -> None:
        """Nobody holds it now; the next one need not wait for silence. The token stays."""
        spec = {name: value for name, value in held["spec"].items() if name != "holderIdentity"}
        self._write(held, spec)

    def _take(self, found: Object | None) -> Object:
        now = self._now()
        spec = {
            "holderIdentity": self._identity,
            # Whole seconds, and others wait as long as is written here.
            "leaseDurationSeconds": max(1, math.ceil(self.duration_s)),
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": int(found["spec"].get("leaseTransitions") or 0) + 1 if found else 1,
        }
        if found is not None:
            return self._write(found, spec)
        metadata = {"name": self._name, "labels": {"app.kubernetes.io/managed-by": "sluice"}}
        body = {"apiVersion": LEASE.api_version, "kind": LEASE.name, "metadata": metadata, "spec": spec}
        return self._objects.create(LEASE, body)

    def _write(self, found: Object, spec: Object) -> Object:
        return self._objects.replace(
            LEASE, {**found, "apiVersion": LEASE.api_version, "kind": LEASE.name, "spec": spec}
        )

    def _now(self) -> str:
        return datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class ClusterHeld:
    """The lease while it is held, renewed by a thread of its own."""

    def __init__(self, lease: ClusterLease, held: Object, asked: float) -> None:
        self.token = int(held["spec"]["leaseTransitions"])
        self._lease = lease
        self._held = held
        self._deadline = asked + lease.duration_s * _OWN_SHARE
        self._taken = threading.Event()
        self._end = threading.Event()
        self._beat = threading.Thread(target=self._renew, name="controller lease", daemon=True)
        self._beat.start()

    def lost(self) -> bool:
        """Whether another controller may be at work by now. Answers at once."""
        return self._taken.is_set() or time.monotonic() > self._deadline

    def release(self) -> None:
        """Let the next one go on. Never raises; safe to repeat."""
        if self._end.is_set():
            return
        self._end.set()
        self._beat.join()
        try:
            if not self.lost():
                self._lease.let_go(self._held)
        except SluiceError as error:
            _log.warning("The controller's lease stays until it expires: %s", error)

    def _renew(self) -> None:
        while not self._end.wait(self._lease.duration_s / 5):
            asked = time.monotonic()
            if self.lost():
                # Somebody may have taken it meanwhile: a renewal would prove nothing.
                self._taken.set()
                return
            try:
                self._held = self._lease.renew(self._held)
                self._deadline = asked + self._lease.duration_s * _OWN_SHARE
            except ObjectChanged:
                self._taken.set()
                return
            except SluiceError as error:
                _log.warning("The controller's lease could not be renewed, trying again: %s", error)
