"""What a cluster job must say, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

import pytest

from sluice.infra.errors import InputError
from sluice.infra.settings import ObjectStoreSettings, TrainingSettings
from sluice.training.cluster_shapes import shape_of
from sluice.training.fabric import LEFT_UNSET, REASONS, fabric_environment
from sluice.training.launcher import Secret, cluster_job, job_name
from sluice.training.node_types import NODE_TYPES
from tests.training.cluster import KEY, big_job, big_recipe, settings


def test_the_name_is_that_of_the_steps_key() -> None:
    assert big_job().name == job_name(KEY) == "sluice-train-3f3f3f3f3f3f3f3f"
    assert big_job().work_dir == PurePosixPath("/fsx/sluice/sluice-train-3f3f3f3f3f3f3f3f")
    with pytest.raises(InputError, match="no sha256 digest"):
        job_name("train")


@pytest.mark.parametrize(
    ("overrides", "fields", "words"),
    [
        ({}, {"image": ""}, "training.image is not set"),
        ({}, {"claim": ""}, "training.claim is not set"),
        ({}, {"image": "registry.example/ml/train:1.0"}, "not pinned by digest"),
        ({}, {"node_type": "t3.micro"}, "'t3.micro' is not known"),
        ({}, {"queue": None}, "training.priority = 'prod' means nothing without training.queue"),
        ({"parallelism.backend": "gloo"}, {}, "parallelism.backend = 'gloo'"),
        ({"parallelism.processes": 16, "schedule.micro_batch_size": 1}, {}, "has 8 accelerators"),
        ({"parallelism.processes": 4}, {}, "uses a part of each of 4 nodes"),
    ],
)
def test_what_cannot_work_is_refused(overrides: dict[str, object], fields: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        big_job(overrides, **fields)


def test_the_work_folder_is_on_the_shared_file_system() -> None:
    for folder in ("/tmp/work", "/fsx"):
        with pytest.raises(InputError, match="is not below /fsx"):
            replace(big_job(), work_dir=PurePosixPath(folder))


def test_the_environment_pins_the_network_and_names_no_secret() -> None:
    environment = big_job().environment()
    assert environment["NCCL_NET"] == "AWS Libfabric"
    assert environment["NCCL_NET_PLUGIN"] == "aws-ofi"
    assert environment["SLUICE_OBJECT_STORE__SECRET_KEY"] == Secret("s3", "secret_key")
    assert environment["SLUICE_TRAINING__NODE_TYPE"] == "p5.48xlarge"
    # A TrainJob that sets a variable of torchrun's is refused by Kubeflow's webhook.
    assert not [name for name in environment if name.startswith("PET_")]
    assert not set(environment) & set(LEFT_UNSET)
    assert set(fabric_environment("x")) == set(REASONS)


def test_without_a_secret_the_service_account_has_to_do() -> None:
    assert not [value for value in big_job(object_store_secret=None).environment().values() if type(value) is Secret]


def test_one_node_asks_for_no_network() -> None:
    overrides = {"parallelism.nodes": 1, "parallelism.processes": 2}
    job = big_job(overrides)
    assert job.resources["limits"] == {"memory": "384Gi", "nvidia.com/gpu": "2"}
    assert job.resources["requests"]["cpu"] == "36"
    # NCCL_NET names a network that would not be there.
    assert not [name for name in job.environment() if name.startswith("NCCL_")]


def test_every_shape_leaves_a_node_something() -> None:
    for node in [node for node in NODE_TYPES.values() if node.accelerators]:
        shape = shape_of(node.name)
        whole = shape.resources(shape.accelerators, network=True)
        assert int(whole["requests"]["cpu"]) < node.vcpus
        assert int(whole["limits"]["memory"].removesuffix("Gi")) < node.ram_gib
        # Extended resources and huge pages: Kubernetes wants request and limit equal.
        for name in ("nvidia.com/gpu", "vpc.amazonaws.com/efa", "hugepages-2Mi", "memory"):
            assert whole["requests"][name] == whole["limits"][name]
    whole = shape_of("p5.48xlarge").resources(8, network=True)
    assert whole["limits"]["vpc.amazonaws.com/efa"] == "32"


def test_the_notice_is_the_recipes() -> None:
    job = cluster_job(big_recipe(**{"budget.notice_s": 200.0}), KEY, settings(), ObjectStoreSettings())
    assert (job.notice_s, job.grace_s, job.deadline_s) == (200, 230, 14400)


def test_the_settings_have_no_image_of_their_own() -> None:
    assert TrainingSettings().image == ""
    assert NODE_TYPES[TrainingSettings().node_type].accelerators
