"""Environment of NCCL on EFA: what is set and why, and what people set by habit and why it is left alone here.

Sources: AWS's list of settings (https://github.com/awslabs/awsome-distributed-training, 1.architectures/
efa-cheatsheet.md) and NCCL's own (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html). They belong
into the container: what a host's profile says never reaches a pod.
"""

from __future__ import annotations


def fabric_environment(net_plugin: str) -> dict[str, str]:
    """Variables of every process of a run over several nodes. The reasons are in `REASONS`."""
    return {
        "NCCL_NET": "AWS Libfabric",
        "NCCL_NET_PLUGIN": net_plugin,
        "NCCL_SOCKET_IFNAME": "^lo,docker,veth",
        "NCCL_DEBUG": "WARN",
    }


REASONS = {
    "NCCL_NET": "without it a plugin that fails to load means TCP sockets, at a twentieth of the speed, in silence",
    "NCCL_NET_PLUGIN": (
        "names the library, libnccl-net-NAME.so: NVIDIA's images look for aws-ofi, the EFA installer of 1.42 and newer "
        "calls it ofi; with the wrong name and NCCL_NET set, NCCL says so and ends"
    ),
    "NCCL_SOCKET_IFNAME": "the bootstrap over TCP must not pick the loop-back or a container bridge",
    "NCCL_DEBUG": "warnings reach the log; the preflight alone runs with INFO, to read which provider was chosen",
}

LEFT_UNSET = {
    "FI_PROVIDER": "aws-ofi-nccl newer than 1.5 chooses efa itself; the preflight checks that it did",
    "FI_EFA_USE_DEVICE_RDMA": "the default since libfabric 1.18 with aws-ofi-nccl 1.7",
    "FI_EFA_FORK_SAFE": "of no effect on kernels of 5.15 and newer",
    "FI_EFA_USE_HUGE_PAGE": "huge pages are requested, and nothing here forks after NCCL has started",
    "FI_EFA_SET_CUDA_SYNC_MEMOPS": "mends EFA installers older than 1.29.1 only",
    "NCCL_PROTO": "the plugin's tuner chooses better, and a forced value has hung runs",
    "RDMAV_FORK_SAFE": "another library's switch; it breaks things on current kernels",
}
