"""How large the demonstration is: a plan is a YAML file with every number in it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sluice.infra.errors import InputError
from sluice.provenance.canonical import digest_json


class Plan(BaseModel):
    """Sizes and names of one demonstration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: str
    documents: str = Field("faq", description="what the index is built from: `faq`, or a folder of documents")
    traffic_questions: int = Field(ge=1, description="questions asked before the retraining")
    holdout_size: int = Field(ge=8, description="questions never trained on")
    minimum_examples: int = Field(ge=2)
    validation_share: float = Field(gt=0, lt=1)
    concurrency: int = Field(ge=1, le=64, description="users at once")
    recipe: str
    suite: str
    policy: str = Field(description="rollout policy: `default`, or a YAML file beside the plan")
    drill: bool = Field(description="also train on shuffled labels and watch gate and canary refuse it")
    drill_steps: int = Field(ge=1)

    @property
    def digest(self) -> str:
        """What tells the loops of one installation apart."""
        return digest_json(self.model_dump())


def load_plan(name: str) -> Plan:
    """A bundled plan (`demo`, `tiny`) or a YAML file. Raises `InputError` naming the field."""
    import yaml

    bundled = Path(str(files("sluice.demo") / "plans" / f"{name}.yaml"))
    path = bundled if bundled.is_file() else Path(name)
    try:
        plan = Plan.model_validate(yaml.safe_load(path.read_text()))
        if plan.policy == "default":
            return plan
        # A policy lies beside its plan.
        return plan.model_copy(update={"policy": str((path.parent / plan.policy).absolute())})
    except OSError as error:
        raise InputError(f"--plan {name!r} cannot be read: {error}.", hint="Bundled plans: demo, tiny.") from error
    except (ValidationError, yaml.YAMLError) as error:
        raise InputError(f"--plan {name!r} is not a plan: {error}.") from error
