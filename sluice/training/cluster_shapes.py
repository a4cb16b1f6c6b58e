"""What a pod asks for on each node type. GPUs and EFA devices are counted; vCPUs and memory are the machine's own.

Sources: vCPUs, memory, accelerators and network cards as listed by AWS for accelerated computing instances
(https://docs.aws.amazon.com/ec2/latest/instancetypes/ac.html); EFA devices are the network cards that carry one
(https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa-acc-inst-types.html): card 0 needs an `efa-only` interface
beside the node's own, otherwise a node offers one device fewer and its pods wait for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

from sluice.infra.errors import InputError

HUGEPAGES_2MI = "5120Mi"
"""Pages of 2 MiB that libfabric's EFA provider takes for its buffers on one node: the value of AWS's own manifests
(awsome-distributed-training, micro-benchmarks/nccl-tests/kubernetes/nccl-tests.yaml). Request and limit must agree."""


@dataclass(frozen=True)
class NodeShape:
    """One node type: accelerators, EFA devices, vCPUs, and memory in GiB of a whole node."""

    name: str
    accelerators: int
    efa_devices: int
    vcpus: int
    memory_gib: int

    def resources(self, processes: int, *, network: bool) -> dict[str, dict[str, str]]:
        """Requests and limits of a pod with one process for each of its accelerators.

        A quarter of vCPUs and memory stays with the kubelet, the daemons and the file system's cache. `network` asks
        for all EFA devices (a run over several nodes); a run on one node needs none. No limit on CPU: throttling a
        process that drives an accelerator costs more than it saves.
        """
        memory = {"memory": f"{self.memory_gib * 3 * processes // (4 * self.accelerators)}Gi"}
        devices = {"nvidia.com/gpu": str(processes)}
        if network:
            devices |= {"vpc.amazonaws.com/efa": str(self.efa_devices), "hugepages-2Mi": HUGEPAGES_2MI}
        cpu = {"cpu": str(self.vcpus * 3 * processes // (4 * self.accelerators))}
        return {"requests": cpu | memory | devices, "limits": memory | devices}

    @property
    def shared_memory(self) -> str:
        """Size of /dev/shm, which counts as the pod's memory. Kubernetes gives 64 MiB, too little for NCCL."""
        return f"{self.memory_gib // 16}Gi"


SHAPES = {
    shape.name: shape
    for shape in (
        NodeShape("p4d.24xlarge", accelerators=8, efa_devices=4, vcpus=96, memory_gib=1152),
        NodeShape("p4de.24xlarge", accelerators=8, efa_devices=4, vcpus=96, memory_gib=1152),
        NodeShape("p5.48xlarge", accelerators=8, efa_devices=32, vcpus=192, memory_gib=2048),
        NodeShape("p5e.48xlarge", accelerators=8, efa_devices=32, vcpus=192, memory_gib=2048),
        NodeShape("p5en.48xlarge", accelerators=8, efa_devices=16, vcpus=192, memory_gib=2048),
        NodeShape("p6-b200.48xlarge", accelerators=8, efa_devices=8, vcpus=192, memory_gib=2048),
    )
}


def shape_of(node_type: str) -> NodeShape:
    """Raises `InputError` for a node type that is not in the table."""
    if node_type not in SHAPES:
        raise InputError(
            f"The node type {node_type!r} is not known for training on a cluster.",
            hint=f"Known are: {', '.join(SHAPES)} (sluice/training/cluster_shapes.py).",
        )
    return SHAPES[node_type]
