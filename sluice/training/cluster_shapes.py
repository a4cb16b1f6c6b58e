"""What a pod that trains asks for on each node type: devices, huge pages, a share of processors and memory."""

from __future__ import annotations

from dataclasses import dataclass

from sluice.infra.errors import InputError
from sluice.training.node_types import NODE_TYPES, NodeType

HUGEPAGES_2MI = "5120Mi"
"""Pages of 2 MiB that libfabric's EFA provider takes for its buffers on one node: the value of AWS's own manifests
(awsome-distributed-training, micro-benchmarks/nccl-tests/kubernetes/nccl-tests.yaml). Request and limit must agree."""


@dataclass(frozen=True)
class NodeShape:
    """A node type as pods see it."""

    node: NodeType

    @property
    def accelerators(self) -> int:
        return self.node.accelerators

    def resources(self, processes: int, *, network: bool) -> dict[str, dict[str, str]]:
        """Requests and limits of a pod with one process for each of its accelerators.

        A quarter of vCPUs and memory stays with the kubelet, the daemons and the file system's cache. `network` asks
        for all EFA devices (a run over several nodes); a run on one node needs none. No limit on CPU: throttling a
        process that drives an accelerator costs more than it saves.
        """
        memory = {"memory": f"{int(self.node.ram_gib) * 3 * processes // (4 * self.accelerators)}Gi"}
        devices = {"nvidia.com/gpu": str(processes)}
        if network:
            devices |= {"vpc.amazonaws.com/efa": str(self.node.efa_devices), "hugepages-2Mi": HUGEPAGES_2MI}
        cpu = {"cpu": str(self.node.vcpus * 3 * processes // (4 * self.accelerators))}
        return {"requests": cpu | memory | devices, "limits": memory | devices}

    @property
    def shared_memory(self) -> str:
        """Size of /dev/shm, which counts as the pod's memory. Kubernetes gives 64 MiB, too little for NCCL."""
        return f"{int(self.node.ram_gib) // 16}Gi"


def shape_of(node_type: str) -> NodeShape:
    """Raises `InputError` for a node type that has no accelerators, or is not in the table."""
    node = NODE_TYPES.get(node_type)
    if node is None or not node.accelerators:
        known = ", ".join(name for name, one in NODE_TYPES.items() if one.accelerators)
        raise InputError(
            f"The node type {node_type!r} is not known for training on a cluster.", hint=f"Known are: {known}."
        )
    return NodeShape(node)
