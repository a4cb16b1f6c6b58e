"""A whole model as a Hugging Face folder: what full fine-tuning gives, and a base with an adapter merged into it.

Its weights are the trained ones in the base's names, shapes and dtypes. Everything else (configuration, tokenizer, chat
template, licence) is the base's own: it decides what a model does as code does, and no recipe changes it. The folder
names no path of this machine and has one set of bytes, so that two runs on the same inputs give one digest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sluice.infra.errors import IntegrityError
from sluice.provenance.canonical import Json
from sluice.training.safetensors_file import RawTensor, open_tensors, write_raw
from sluice.training.staged_folder import staged

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FROM_BASE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
"""Files that are copied from the base model byte for byte, where it has them."""
SHARD_BYTES = 5 * 2**30
"""A model of more bytes is cut into several files, each held in memory once while it is written."""
_TIED_HEAD = "lm_head.weight"


def collect_model(checkpoint_model: Path, base_dir: Path, target: Path) -> Path:
    """Make `target` hold the model of AutoModel's export (`model/consolidated` of a checkpoint), and nothing else.

    `checkpoint_model` is the checkpoint's `model` folder. Returns `target`. Raises `IntegrityError` naming the file or
    tensor that is not what the base model calls for.
    """
    source = checkpoint_model / "consolidated"
    if not source.is_dir():
        raise IntegrityError(
            f"The checkpoint {checkpoint_model} holds no consolidated model.", hint="Train again from the last step."
        )
    tensors = without_tied_head(open_model(source), base_dir)
    check_weights(source, tensors, base_dir)
    with staged(target) as folder:
        write_model(folder, tensors, base_dir)
    return target


def check_model(model_dir: Path, base_dir: Path) -> None:
    """Nothing, when the folder is what training this base model can give: its files, its weights' names, shapes and
    dtypes, finite and changed. Raises `IntegrityError` naming the file or tensor."""
    tensors = open_model(model_dir)
    weights = {path.name for path in model_dir.glob("*.safetensors")}
    weights |= {INDEX} if weights != {SINGLE} else set()
    copied = {name for name in FROM_BASE if (base_dir / name).is_file()}
    found = {path.relative_to(model_dir).as_posix() for path in model_dir.rglob("*") if not path.is_dir()}
    if missing := sorted((copied | weights | {CONFIG}) - found):
        raise IntegrityError(f"The model {model_dir.name} holds no {missing[0]}.")
    if strange := sorted(found - copied - weights - {CONFIG}):
        raise IntegrityError(f"The model {model_dir.name} holds {strange[0]}, which its base model does not have.")
    for name in sorted(copied):
        if (model_dir / name).read_bytes() != (base_dir / name).read_bytes():
            raise IntegrityError(f"{name} of the model {model_dir.name} is not its base model's.")
    if (model_dir / CONFIG).read_bytes() != _config_bytes(base_dir):
        raise IntegrityError(f"{CONFIG} of the model {model_dir.name} says other things than its base model's.")
    check_weights(model_dir, tensors, base_dir)


def check_weights(where: Path, tensors: Mapping[str, RawTensor], base_dir: Path) -> None:
    """Raise `IntegrityError` unless these are the base model's tensors by name, shape and dtype, finite, and at least
    one of them changed. A head that is tied to the embedding is no tensor of its own."""
    base = without_tied_head(open_model(base_dir), base_dir)
    if missing := sorted(base.keys() - tensors.keys()):
        raise IntegrityError(f"{where} lacks {missing[0]!r} ({len(missing)} tensors are missing).")
    if strange := sorted(tensors.keys() - base.keys()):
        raise IntegrityError(f"{where} holds {strange[0]!r}, which the base model does not have.")
    changed = False
    for name, tensor in tensors.items():
        if tensor.shape != base[name].shape:
            raise IntegrityError(f"{name} has shape {tensor.shape}; the base model's has {base[name].shape}.")
        if tensor.dtype != base[name].dtype:
            raise IntegrityError(f"{name} is {tensor.dtype}; the base model's is {base[name].dtype}.")
        if not np.isfinite(tensor.float32()).all():
            raise IntegrityError(f"{name} holds numbers that are not finite: training diverged.")
        changed = changed or not np.array_equal(tensor.data, base[name].data)
    if not changed:
        raise IntegrityError(f"All weights in {where} are the base model's: nothing was trained.")


def open_model(folder: Path) -> dict[str, RawTensor]:
    """All tensors of a Hugging Face folder in name order, read when they are used. Raises `IntegrityError`."""
    found: dict[str, RawTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in open_tensors(path).items():
            if name in found:
                raise IntegrityError(f"{path} holds {name!r}, which another file of {folder} holds too.")
            found[name] = tensor
    if not found:
        raise IntegrityError(f"The model {folder} holds no safetensors file.")
    return {name: found[name] for name in sorted(found)}


def without_tied_head(tensors: Mapping[str, RawTensor], base_dir: Path) -> dict[str, RawTensor]:
    """The tensors less the output head where the base ties it to the embedding: readers make it of that."""
    tied = bool(_config(base_dir).get("tie_word_embeddings", False))
    return {name: tensor for name, tensor in tensors.items() if not (tied and name == _TIED_HEAD)}


def write_model(
    folder: Path, tensors: Mapping[str, RawTensor], base_dir: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write weights and the base's other files into the empty `folder`: equal tensors and base give equal bytes."""
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        write_raw(folder / SINGLE, shards[0])
    else:
        names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        for file, shard in zip(names, shards, strict=True):
            write_raw(folder / file, shard)
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(int(tensor.data.nbytes) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_bytes(_json_bytes(index))
    (folder / CONFIG).write_bytes(_config_bytes(base_dir))
    for copied in FROM_BASE:
        if (base_dir / copied).is_file():
            shutil.copyfile(base_dir / copied, folder / copied)


def _shards(tensors: Mapping[str, RawTensor], limit: int) -> Iterator[dict[str, RawTensor]]:
    """The tensors in name order, in groups of at most `limit` bytes (a larger tensor stands alone)."""
    shard: dict[str, RawTensor] = {}
    size = 0
    for name in sorted(tensors):
        if shard and size + tensors[name].data.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensors[name]
        size += tensors[name].data.nbytes
    yield shard


def _config(base_dir: Path) -> dict[str, Any]:
    path = base_dir / CONFIG
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path} is no model configuration: {error}.") from error


def _config_bytes(base_dir: Path) -> bytes:
    """The base's configuration without the place it was once loaded from."""
    return _json_bytes({key: value for key, value in _config(base_dir).items() if key != "_name_or_path"})


def _json_bytes(value: Json) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
