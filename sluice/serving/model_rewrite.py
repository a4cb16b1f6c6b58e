"""The router of a cluster with llm-d: an InferenceModelRewrite sends the public model name to the releases' own names.

One inference pool holds all releases of an application side by side, and the endpoint picker chooses the name at
random by weight. So there is no stickiness and no shadow here, and a server for one release alone is another pool's
matter; what cannot be done is refused in words. The smallest weight is 1: a release with 0% is no target.

The endpoint picker writes no status (version 0.10), so a change is confirmed by asking: each revision has a model name
of its own, which only an endpoint picker that follows this revision knows.
"""

from __future__ import annotations

from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.kubernetes_objects import Kind, KubernetesObjects, Object
from sluice.serving.cluster_router import ClusterRouter, Refused, differing
from sluice.serving.data_plane import DataPlane
from sluice.serving.route_decision import RouteDecision
from sluice.serving.routes import Role, RouteState, Target
from sluice.serving.vllm import served_name

MODEL_REWRITE = Kind("llm-d.ai", "v1alpha2", "inferencemodelrewrites", "InferenceModelRewrite")
POOL_GROUP = "inference.networking.k8s.io"
_RUNNING = "llm_d_router_epp_running_requests"


class ModelRewriteRouter(ClusterRouter):
    """`Router` over one InferenceModelRewrite of `pool`. `gateway` is the address that clients use, `metrics` the
    endpoint picker's; without the first no change can be confirmed, without the second active requests are unknown."""

    kind = MODEL_REWRITE

    def __init__(
        self,
        objects: KubernetesObjects,
        application: str,
        pool: str,
        *,
        gateway: DataPlane | None = None,
        metrics: DataPlane | None = None,
        confirm_s: float = 10.0,
    ) -> None:
        super().__init__(objects, application, confirm_s=confirm_s)
        self._pool = pool
        self._gateway = gateway
        self._metrics = metrics

    def spec(self, decision: RouteDecision, probe_key: str) -> Object:
        """Exact names come before the rule without a match, whose target no server has: nobody reaches a release by
        its own name."""
        state = decision.state
        shares = [(target, state.share(target.release)) for target in state.targets()]
        rules = [_rule(self.application, *((target, share) for target, share in shares if share))]
        for role, target in (("stable", state.stable), ("canary", state.canary)):
            if target is not None:
                rules.append(_rule(_forced(role, probe_key), (target, 1)))
        rules.append(_rule(_revision(decision, probe_key), (state.stable, 1)))
        rules.append({"targets": [{"modelRewrite": f"{self.application}-is-asked-by-another-name", "weight": 1}]})
        pool = {"group": POOL_GROUP, "kind": "InferencePool", "name": self._pool}
        return {"poolRef": pool, "rules": rules}

    def check(self, state: RouteState) -> None:
        if state.shadow:
            raise InputError(
                f"shadow = {state.shadow}: an InferenceModelRewrite cannot mirror requests.",
                hint="Take `shadow` out of rollout.yaml, or set cluster.router to http-route.",
            )
        for target in state.targets():
            if target.dedicated:
                raise InputError(
                    f"{target.served_name!r} has servers of its own; an InferenceModelRewrite chooses names within one "
                    "pool, not servers.",
                    hint="Release it as an adapter, or set cluster.router to http-route.",
                )

    def differences(self, decision: RouteDecision, live: Object, probe_key: str) -> tuple[str, ...]:
        rules = live["spec"]["rules"]
        weights = {one["modelRewrite"]: one.get("weight", 1) for one in (rules[0]["targets"] if rules else ())}
        total = sum(weights.values()) or 1
        found = []
        for target in decision.state.targets():
            wanted = decision.state.share(target.release)
            has = round(100 * weights.get(target.served_name, 0) / total)
            if has != wanted:
                found.append(f"{target.served_name} gets {has}% in the {self.kind.name} and should get {wanted}%.")
        changed = differing(self.spec(decision, probe_key), live["spec"])
        if changed and not found:
            found.append(
                f"The {self.kind.name} {self.application!r} was changed at spec.{', spec.'.join(changed[:5])}."
            )
        return tuple(found)

    def confirmed(self, live: Object, decision: RouteDecision, probe_key: str) -> str:
        for condition in (live.get("status") or {}).get("conditions") or ():
            current = condition.get("observedGeneration", 0) >= live["metadata"]["generation"]
            if condition["type"] == "Accepted" and condition["status"] == "False" and current:
                raise Refused(
                    f"The endpoint picker refuses the rewrite ({condition['reason']}: {condition['message']})."
                )
        if self._gateway is None:
            return "nobody can be asked: set cluster.proxies_url (the endpoint picker writes no status)"
        question = {"model": _revision(decision, probe_key), "prompt": "1", "max_tokens": 1}
        for answer in self._gateway.ask("POST", "/v1/completions", body=question):
            if answer.status != 200:
                return f"{answer.address} does not know revision {decision.revision} yet (status {answer.status})"
        return ""

    def active_requests(self, release: str) -> int:
        if self._metrics is None:
            raise UnavailableError(
                "Nobody tells how many requests run: the endpoint picker's metrics have no address.",
                hint="Set cluster.metrics_url to its port of Prometheus metrics.",
            )
        name = self._served_name(release)
        return int(self._metrics.metric(_RUNNING, {"target_model_name": name}, "/metrics"))

    def probe_model(self, role: Role) -> str:
        """The model name by which a probe reaches this role, whatever the weights are."""
        return _forced(role, self.probe_key())

    def probe_headers(self, role: Role) -> dict[str, str]:
        raise InputError(
            f"A probe cannot reach {role} by headers: an endpoint picker looks at the model's name alone.",
            hint=f"Ask for the model {self.probe_model(role)!r}, or set cluster.router to http-route.",
        )

    def preflight(self) -> tuple[str, ...]:
        """What keeps this cluster from doing everything, a sentence each."""
        found = ["A session may change between stable and canary: the endpoint picker chooses for each request anew."]
        if self._gateway is None:
            found.append("cluster.proxies_url is empty: no change of the routes can be confirmed.")
        if self._metrics is None:
            found.append("cluster.metrics_url is empty: retiring a release cannot wait until it is idle.")
        return tuple(found)

    def _served_name(self, release: str) -> str:
        targets = self._current()[0].targets()
        # One that was rolled back is no target any more, and may still answer.
        return next(
            (one.served_name for one in targets if one.release == release), served_name(self.application, release)
        )


def _rule(model: str, *targets: tuple[Target, int]) -> Object:
    return {
        "matches": [{"model": {"type": "Exact", "value": model}}],
        "targets": [{"modelRewrite": target.served_name, "weight": weight} for target, weight in targets],
    }


def _forced(role: str, probe_key: str) -> str:
    return f"probe-{role}-{probe_key}"


def _revision(decision: RouteDecision, probe_key: str) -> str:
    return f"revision-{decision.revision}-{probe_key}"
