"""The bill of materials of a release: CycloneDX 1.6, with the adapter as a machine-learning model and its model card.

Made by cyclonedx-python-lib; the model card, which the library does not know yet, is added to its JSON and the whole
checked against the schema in the tests. The same facts give the same bytes; the serial number is drawn from digests.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from sluice.provenance.canonical import Json, digest_bytes, digest_json, hex_of, short

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

BOM_FILE = "bom.cdx.json"
_PINNED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)


@dataclass(frozen=True)
class Material:
    """One thing that a release is made of. `digest` is the artifact's; `licences` are SPDX ids or words."""

    name: str
    kind: Literal["model", "data", "code"]
    digest: str
    description: str
    licences: tuple[str, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """One figure of the gate: what, the candidate's value, on which slice, and the interval of the difference."""

    name: str
    value: float
    slice: str
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class ModelCard:
    """What the model card says: how the model was made, and what the gate measured."""

    base: str
    datasets: tuple[str, ...]
    parameters: Mapping[str, str]
    metrics: tuple[Metric, ...]
    limitations: tuple[str, ...]


def build_bom(
    application: str,
    adapter: Material,
    materials: Sequence[Material],
    card: ModelCard,
    locks: Mapping[str, bytes],
    created: datetime,
) -> bytes:
    """The bill of materials as JSON.

    `materials` are base model, data sets, index, corpus and code; `locks` the lock files by path, whose packages are
    listed; `card.base` and `card.datasets` are digests among `materials`.
    """
    from cyclonedx.model import Property
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion

    release = _component(adapter, application)
    parts = [_component(one, application) for one in materials]
    packages = list(_packages(locks))
    bom = Bom(
        components=[*parts, *packages],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, digest_json([adapter.digest, *(m.digest for m in materials)])),
        metadata=BomMetaData(
            component=release,
            timestamp=created,
            properties=[Property(name=f"sluice:lock:{path}", value=digest_bytes(data)) for path, data in locks.items()],
        ),
    )
    bom.register_dependency(release, [*parts, *packages])
    made: Json = json.loads(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string())
    made["metadata"]["component"]["modelCard"] = _model_card(card)
    return json.dumps(made, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _component(material: Material, application: str) -> Component:
    from cyclonedx.factory.license import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType

    types = {
        "model": ComponentType.MACHINE_LEARNING_MODEL,
        "data": ComponentType.DATA,
        "code": ComponentType.APPLICATION,
    }
    return Component(
        type=types[material.kind],
        group=application,
        name=material.name,
        version=short(material.digest),
        bom_ref=material.digest,
        description=material.description,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=hex_of(material.digest))],
        licenses=[LicenseFactory().make_from_string(one) for one in sorted(set(material.licences))],
        properties=[
            Property(name=f"sluice:{name}", value=value) for name, value in sorted(material.properties.items())
        ],
    )


def _packages(locks: Mapping[str, bytes]) -> Iterator[Component]:
    """The packages that lock files pin, each once; its property says which environments hold it."""
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component
    from packageurl import PackageURL

    found: dict[tuple[str, str], list[str]] = {}
    for path, data in sorted(locks.items()):
        for name, version in _PINNED.findall(data.decode("utf-8", "replace")):
            found.setdefault((name, version), []).append(path)
    for (name, version), paths in sorted(found.items()):
        purl = PackageURL(type="pypi", name=name, version=version)
        locked = [Property(name="sluice:locked-in", value=path) for path in paths]
        yield Component(name=name, version=version, purl=purl, bom_ref=purl.to_string(), properties=locked)


def _model_card(card: ModelCard) -> dict[str, Any]:
    metrics = []
    for one in card.metrics:
        metric: dict[str, Any] = {"type": one.name, "value": f"{one.value:g}", "slice": one.slice}
        if one.interval is not None:
            low, high = one.interval
            metric["confidenceInterval"] = {"lowerBound": f"{low:g}", "upperBound": f"{high:g}"}
        metrics.append(metric)
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": f"LoRA adapter of {card.base}",
            "datasets": [{"ref": digest} for digest in card.datasets],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": {"technicalLimitations": list(card.limitations)},
        "properties": [{"name": f"sluice:{name}", "value": value} for name, value in sorted(card.parameters.items())],
    }
