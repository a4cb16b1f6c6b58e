"""What a machine offers a training: accelerators, their memory and peak, EFA devices, price.

Prices are Amazon's list, on demand, Linux, us-east-1, as public price tables quoted them from March to August 2026 (the
reduction of June 2025 is in them), or None where there is no on-demand price. They change: `--price` or a file of one's
own overrides.
Memory is what the driver reports (nvidia-smi), in GiB. Peaks are dense, from NVIDIA's datasheets.
EFA devices: AWS, "Maximize network bandwidth on Amazon EC2 instances with multiple network cards", 2026.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from sluice.infra.errors import InputError
from sluice.infra.field_mistakes import validated
from sluice.infra.yaml_file import read_text, read_yaml
from sluice.training.recipe_sections import Section

GIB = 2**30


class NodeType(Section):
    """One machine. `memory_gib` is of one accelerator; without accelerators processes share `ram_gib`."""

    name: str = Field(min_length=1)
    accelerator: str = Field("", description="empty: none, processors train")
    accelerators: int = Field(0, ge=0)
    memory_gib: float = Field(0.0, ge=0, description="of one accelerator")
    bf16_tflops: float = Field(gt=0, description="dense peak of one accelerator; without any, float32 of the machine")
    fp8_tflops: float | None = Field(None, gt=0, description="dense peak; empty: none in hardware")
    efa_devices: int = Field(0, ge=0)
    vcpus: int = Field(ge=1)
    ram_gib: float = Field(gt=0)
    dollars_per_hour: float | None = Field(None, ge=0, description="empty: unknown")

    @property
    def device(self) -> str:
        return self.accelerator or "process"


# 2 fused multiply-adds x 8 lanes x 2 operations x 3 GHz of a core with AVX2.
_CORE_TFLOPS = 0.096


def _eight(name: str, chip: tuple[str, float, float, float | None], efa: int, price: float | None) -> NodeType:
    """Eight accelerators, 192 virtual processors, 2 TiB: all of p5 and p6."""
    accelerator, memory, bf16, fp8 = chip
    return NodeType(
        name=name,
        accelerator=accelerator,
        accelerators=8,
        memory_gib=memory,
        bf16_tflops=bf16,
        fp8_tflops=fp8,
        efa_devices=efa,
        vcpus=192,
        ram_gib=2048,
        dollars_per_hour=price,
    )


def _ampere(name: str, memory_gib: float, price: float) -> NodeType:
    return NodeType(
        name=name,
        accelerator="A100",
        accelerators=8,
        memory_gib=memory_gib,
        bf16_tflops=312,
        efa_devices=4,
        vcpus=96,
        ram_gib=1152,
        dollars_per_hour=price,
    )


def _graphics(name: str, accelerators: int, efa: int, vcpus: int, ram_gib: float, price: float) -> NodeType:
    ada = name.startswith("g6e")
    return NodeType(
        name=name,
        accelerator="L40S" if ada else "A10G",
        accelerators=accelerators,
        memory_gib=45.0 if ada else 22.5,
        bf16_tflops=362 if ada else 70,
        fp8_tflops=733 if ada else None,
        efa_devices=efa,
        vcpus=vcpus,
        ram_gib=ram_gib,
        dollars_per_hour=price,
    )


_H100 = ("H100", 79.6, 989.0, 1979.0)
_H200 = ("H200", 140.4, 989.0, 1979.0)
_B200 = ("B200", 179.0, 2250.0, 4500.0)

NODE_TYPES: Mapping[str, NodeType] = {
    node.name: node
    for node in (
        NodeType(name="laptop", bf16_tflops=8 * _CORE_TFLOPS, vcpus=8, ram_gib=16, dollars_per_hour=0.0),
        _graphics("g5.12xlarge", 4, 1, 48, 192, 5.672),
        _graphics("g5.48xlarge", 8, 1, 192, 768, 16.288),
        _graphics("g6e.12xlarge", 4, 1, 48, 384, 10.49264),
        _graphics("g6e.48xlarge", 8, 4, 192, 1536, 30.13118),
        _ampere("p4d.24xlarge", 39.6, 21.957642),
        _ampere("p4de.24xlarge", 80.0, 27.44705),
        _eight("p5.48xlarge", _H100, 32, 55.04),
        # Sold as capacity blocks; there is no on-demand price.
        _eight("p5e.48xlarge", _H200, 32, None),
        _eight("p5en.48xlarge", _H200, 16, 63.296),
        _eight("p6-b200.48xlarge", _B200, 8, 113.9328),
    )
}


def this_machine() -> NodeType:
    """The processors and the memory of the machine that asks; costs nothing extra."""
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return NodeType(
        name="this", bf16_tflops=cores * _CORE_TFLOPS, vcpus=cores, ram_gib=round(memory, 1), dollars_per_hour=0.0
    )


def find_node_type(name_or_path: str) -> NodeType:
    """By name (`this` is the machine that asks), or from a YAML file with the fields of `NodeType`. `InputError`."""
    if name_or_path == "this":
        return this_machine()
    if name_or_path in NODE_TYPES:
        return NODE_TYPES[name_or_path]
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(
            f"--node-type {name_or_path!r} is no node type that is known.",
            hint=f"Known: this, {', '.join(NODE_TYPES)}; or a YAML file with {', '.join(NodeType.model_fields)}.",
        )
    read = read_yaml(read_text(path, "node type"), name_or_path, "node type")
    return validated(NodeType, read.values, name_or_path, read.lines, read.problems)


def dollars_per_hour(name: str, nodes: int) -> float | None:
    """What so many nodes of a known type cost an hour; None where nobody knows."""
    known = NODE_TYPES.get(name)
    price = known.dollars_per_hour if known else None
    return price * nodes if price is not None else None
