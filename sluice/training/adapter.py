"""A trained adapter as two files in PEFT's layout, checked against its base model, the same bytes on every machine.

AutoModel leaves paths of this machine, its own settings and a copy of the tokenizer beside the weights. Here remain
adapter_model.safetensors (written again, in float32) and adapter_config.json (what PEFT and vLLM read, no path), so
that two runs on the same inputs give one artifact digest. An adapter of DoRA has a magnitude for each output row beside
A and B; one of QLoRA looks as LoRA's does, because quantisation belongs to the base while it is trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sluice.infra.errors import IntegrityError
from sluice.provenance.canonical import Json
from sluice.training.recipe import Recipe
from sluice.training.safetensors_file import FloatArray, read_float32, read_header, write_tensors
from sluice.training.staged_folder import staged

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_NAME = "base-model"
"""Stands where PEFT wants the base's path. The adapter artifact's metadata names the base by digest."""

_TENSOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>A|B|magnitude_vector)(?P<weight>\.weight)?$")
_MAGNITUDE = "magnitude_vector"
"""DoRA's. PEFT spells it without `.weight` in files, unlike A and B."""


def collect_adapter(checkpoint_model: Path, base_dir: Path, recipe: Recipe, target: Path) -> Path:
    """Make `target` hold the adapter of a checkpoint's `model` folder, and nothing else. Returns `target`.

    Raises `IntegrityError` naming the file, tensor or module that is not what recipe and base model call for.
    """
    source = checkpoint_model / WEIGHTS
    if not source.is_file():
        raise IntegrityError(f"The checkpoint {checkpoint_model} holds no {WEIGHTS}.")
    tensors = read_float32(source)
    modules = check_tensors(source, tensors, _base_shapes(base_dir), recipe)
    config = _adapter_config(modules, recipe)
    with staged(target) as folder:
        write_tensors(folder / WEIGHTS, tensors)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def check_tensors(
    path: Path, tensors: Mapping[str, FloatArray], base_shapes: Mapping[str, tuple[int, ...]], recipe: Recipe
) -> tuple[str, ...]:
    """The adapted modules' full names, sorted. Raises `IntegrityError`.

    Each has A [rank, in] and B [out, rank] (for DoRA also a magnitude [out]) of finite numbers, exists in the base as
    [out, in], and is one the recipe names; no module the recipe names is left out, and not every B is zero (an
    untrained adapter changes nothing).
    """
    rank, complete = recipe.lora.rank, {"A", "B", _MAGNITUDE} if recipe.method == "dora" else {"A", "B"}
    found: dict[str, set[str]] = {}
    trained = False
    for name, values in tensors.items():
        match = _TENSOR.match(name)
        if not match or match["part"] not in complete or (match["weight"] is None) != (match["part"] == _MAGNITUDE):
            raise IntegrityError(f"{path} holds {name!r}, which is no weight of an adapter made by {recipe.method}.")
        module, part = match["module"], match["part"]
        base = base_shapes.get(f"{module}.weight")
        if base is None or len(base) != 2:
            raise IntegrityError(f"{name} adapts {module!r}, which the base model does not have.")
        if module.rsplit(".", 1)[-1] not in recipe.lora.target_modules:
            raise IntegrityError(f"{name} adapts a module outside lora.target_modules {recipe.lora.target_modules}.")
        expected = {"A": (rank, base[1]), "B": (base[0], rank), _MAGNITUDE: (base[0],)}[part]
        if values.shape != expected:
            raise IntegrityError(f"{name} has shape {values.shape}; rank and base model give {expected}.")
        if not np.isfinite(values).all():
            raise IntegrityError(f"{name} holds numbers that are not finite: training diverged.")
        trained = trained or (part == "B" and bool(values.any()))
        found.setdefault(module, set()).add(part)
    wanted = {
        name.removesuffix(".weight")
        for name in base_shapes
        if name.removesuffix(".weight").rsplit(".", 1)[-1] in recipe.lora.target_modules
    }
    if missing := sorted(wanted - {module for module, parts in found.items() if parts == complete}):
        raise IntegrityError(f"{path} lacks a weight of {missing[0]!r} ({len(missing)} modules are incomplete).")
    if not trained:
        raise IntegrityError(f"All B weights in {path} are zero: nothing was trained.")
    return tuple(sorted(found))


def check_adapter(adapter_dir: Path, base_dir: Path, recipe: Recipe) -> None:
    """Nothing, when the folder is what `recipe` declares for this base model and nothing else.

    Configuration, tokenizer and chat template decide what a model does as code does. So every value of the
    configuration is one that the recipe declares, and a tokenizer or template is none of an adapter's files: servers
    take the base model's. Raises `IntegrityError` naming the file, value, tensor or module.
    """
    require_files(adapter_dir)
    weights = adapter_dir / WEIGHTS
    modules = check_tensors(weights, read_float32(weights), _base_shapes(base_dir), recipe)
    declared, found = _adapter_config(modules, recipe), read_config(adapter_dir)
    for name in sorted(declared | found):
        if (name in declared) != (name in found) or declared[name] != found[name]:
            says = repr(found[name]) if name in found else "nothing"
            means = repr(declared[name]) if name in declared else "nothing"
            raise IntegrityError(
                f"{CONFIG} of adapter {adapter_dir.name} says {name} = {says}; its recipe declares {means}.",
                hint="Change the recipe and train again; a configuration is not edited afterwards.",
            )


def require_fit(adapter_dir: Path, base_dir: Path) -> None:
    """Nothing, when every weight fits the base model it is to be served on: the module is there, and rank and sizes are
    those of configuration and base. Reads headers alone. Raises `IntegrityError` naming tensor and sizes."""
    rank, shapes = read_config(adapter_dir).get("r"), _base_shapes(base_dir)
    for name, tensor in read_header(adapter_dir / WEIGHTS).items():
        match = _TENSOR.match(name)
        base = shapes.get(f"{match['module']}.weight") if match else None
        if match is None or base is None or len(base) != 2:
            raise IntegrityError(f"{name} of adapter {adapter_dir.name} adapts nothing that the base model has.")
        expected = {"A": (rank, base[1]), "B": (base[0], rank), _MAGNITUDE: (base[0],)}[match["part"]]
        if tensor.shape != expected:
            raise IntegrityError(
                f"{name} of adapter {adapter_dir.name} has shape {tensor.shape}; its rank and the base model give "
                f"{expected}.",
                hint="It was trained for another base model, or its configuration is another adapter's.",
            )


def require_files(adapter_dir: Path) -> None:
    """Nothing, when the folder holds the adapter's two files and no other. Raises `IntegrityError` naming the file."""
    found = {path.relative_to(adapter_dir).as_posix() for path in adapter_dir.rglob("*") if not path.is_dir()}
    if missing := sorted({WEIGHTS, CONFIG} - found):
        raise IntegrityError(f"The adapter {adapter_dir.name} holds no {missing[0]}.")
    if strange := sorted(found - {WEIGHTS, CONFIG}):
        raise IntegrityError(
            f"The adapter {adapter_dir.name} holds {strange[0]}, which no recipe declares.",
            hint="An adapter is its weights and their configuration; a tokenizer or a template belongs to the base.",
        )


def _adapter_config(modules: tuple[str, ...], recipe: Recipe) -> Json:
    # Every module of these names is adapted (checked above), so their short names say it all; readers match suffixes.
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_NAME,
        "r": recipe.lora.rank,
        "lora_alpha": recipe.lora.alpha,
        "lora_dropout": recipe.lora.dropout,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in modules}),
        "bias": "none",
        "use_dora": recipe.method == "dora",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _base_shapes(base_dir: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(base_dir.glob("*.safetensors")):
        shapes |= {name: tensor.shape for name, tensor in read_header(path).items()}
    if not shapes:
        raise IntegrityError(f"The base model {base_dir} holds no safetensors file.")
    return shapes


def read_config(adapter_dir: Path) -> dict[str, Any]:
    """The adapter's PEFT configuration. Raises `IntegrityError` when it is not JSON."""
    try:
        loaded = json.loads((adapter_dir / CONFIG).read_text(encoding="utf-8"))
        return dict(loaded)
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"{adapter_dir / CONFIG} is no adapter configuration: {error}.") from error
