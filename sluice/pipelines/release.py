"""Releasing an approved candidate: load, probe, canary steps with analysis, promote or roll back."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from kfp import dsl

from sluice.components.canary import canary
from sluice.components.conclude import conclude
from sluice.components.load import load
from sluice.pipelines.tasks import named


@dsl.pipeline(name="release", description="load and probe the adapter, canary with analysis, promote or roll back")  # type: ignore[untyped-decorator]
def release(adapter: str, policy: str = "default", allow_override: bool = False) -> None:
    how = {"policy": policy, "allow_override": allow_override}
    loaded = named(load(adapter=adapter, **how), "load")
    rolled = named(canary(adapter=loaded.outputs["digest"], **how), "canary")
    end = conclude(adapter=adapter, previous=loaded.outputs["previous"], outcome=rolled.outputs["outcome"], **how)
    named(end, "conclude")
