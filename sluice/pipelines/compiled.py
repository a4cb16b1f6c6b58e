"""The pipelines as KFP YAML, and a lint for what KFP gets silently wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sluice.components.task import IMAGE_VARIABLE, LOCAL_IMAGE
from sluice.infra.errors import InputError
from sluice.pipelines.runs import PIPELINES

_PINNED = re.compile(r"^[\w./:-]+@sha256:[0-9a-f]{64}$")


def compile_all(folder: Path, image: str = "") -> list[Path]:
    """Write one YAML file a pipeline. Raises `InputError` for an image that is not pinned by digest."""
    use_image(image)
    from sluice.pipelines.dags import pipeline_function

    return [compile_pipeline(pipeline_function(name), folder / f"{name}.yaml") for name in PIPELINES]


def use_image(image: str) -> None:
    """Make the components use this image. Raises `InputError` for one that is not pinned by digest; empty is none."""
    if image and not _PINNED.match(image):
        raise InputError(
            f"--image {image!r} is not pinned by digest: a tag can move under a running pipeline.",
            hint="Use NAME@sha256:<64 hex digits>.",
        )
    if image:
        # Components read the image when they are defined, that is when their modules are first imported.
        os.environ[IMAGE_VARIABLE] = image


def compile_pipeline(pipeline: Any, path: Path) -> Path:
    """Write a pipeline as YAML. Raises `InputError` when KFP would get something of it silently wrong."""
    from kfp import compiler

    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline, str(path))
    problems = list(lint(path))
    if problems:
        raise InputError(f"The pipeline {path.stem!r} would go silently wrong: {' '.join(problems)}")
    return path


def lint(path: Path) -> Iterator[str]:
    """Sentences about what KFP accepts and then gets wrong without a word, in a compiled pipeline.

    Each was seen with kfp 2.17: packages installed at run time; a condition on a named output (the branch is always
    skipped) or on text with a single quote (every branch is skipped); an outer task's parameter inside a loop (it
    becomes the loop's item); a default value with `python3` in it (replaced by the interpreter's path); a task without
    the code digest in its environment, or with KFP's cache on (its key ignores installed code).
    """
    import yaml

    spec = next(doc for doc in yaml.safe_load_all(path.read_text()) if doc and "root" in doc)
    executors = spec["deploymentSpec"]["executors"]
    for name, executor in executors.items():
        container = executor.get("container", {})
        text = " ".join([*container.get("command", []), *container.get("args", [])])
        if re.search(r"pip['\"]?[, ]+['\"]?install", text):
            yield f"{name} installs packages when it runs."
        if "SLUICE_CODE_DIGEST" not in {variable["name"] for variable in container.get("env", [])}:
            yield f"{name} has no code digest in its environment."
        image = container.get("image", "")
        if image != LOCAL_IMAGE and not _PINNED.match(image):
            yield f"{name} uses the image {image!r}, which is not pinned by digest."
    for owner, dag in _dags(spec):
        yield from _lint_dag(owner, dag, spec)


def _dags(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "the pipeline", spec["root"]["dag"]
    for name, component in spec.get("components", {}).items():
        if "dag" in component:
            yield name, component["dag"]


def _lint_dag(owner: str, dag: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    for name, task in dag["tasks"].items():
        where = f"Task {name} of {owner}"
        if "dag" not in spec["components"].get(task["componentRef"]["name"], {}) and task.get("cachingOptions", {}).get(
            "enableCache"
        ):
            yield f"{where} uses KFP's cache, whose key ignores installed code."
        condition = task.get("triggerPolicy", {}).get("condition", "")
        if condition:
            if "\\'" in condition or re.search(r"'[^']*'[^']*'", condition.split("==")[-1]):
                yield f"{where} branches on text with a single quote: every branch is skipped."
            for reference in re.findall(r"pipelinechannel--([\w-]+)", condition):
                source = task["inputs"]["parameters"].get(f"pipelinechannel--{reference}", {})
                output = source.get("taskOutputParameter", {}).get("outputParameterKey", "Output")
                if output != "Output":
                    yield f"{where} branches on the named output {output!r}: the branch is always skipped."
        loops = "parameterIterator" in task or "artifactIterator" in task
        for key, source in task.get("inputs", {}).get("parameters", {}).items():
            if loops and "taskOutputParameter" in source and "item" not in key:
                yield f"{where} reads {key} of an outer task inside a loop: it becomes the loop's item."
            constant = source.get("runtimeValue", {}).get("constant")
            if isinstance(constant, str) and "python3" in constant:
                yield f"{where} passes text with `python3` in {key}: KFP replaces it by a path."
