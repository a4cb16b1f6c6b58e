"""How a task of a DAG is set up: its name in the DAG, our cache instead of KFP's, and its code's digest."""

from __future__ import annotations

from functools import cache
from typing import Any

from sluice.components.task import CODE_VARIABLE, TASK_VARIABLE
from sluice.provenance.code import code_digest

ROOMS = (
    "components",
    "curation",
    "rag",
    "training",
    "evaluation",
    "registry",
    "serving",
    "statistics",
    "provenance",
    "infra",
)


def named(task: Any, name: str) -> Any:
    """Give a task its name and environment.

    KFP's cache key ignores installed code, so its cache is off: a step's own key, with content digests, is our cache.
    The code digest in the environment makes two runs of different code differ in the IR as well.
    """
    task.set_display_name(name)
    task.set_caching_options(False)
    task.set_env_variable(TASK_VARIABLE, name)
    task.set_env_variable(CODE_VARIABLE, _code())
    return task


@cache
def _code() -> str:
    return code_digest(*ROOMS, locks=("main", "serve"))
