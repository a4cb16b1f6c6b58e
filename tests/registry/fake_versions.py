"""An MLflow in memory, as far as versions, their tags and aliases go: for what would take a real one minutes to try.

`tests/integration/test_approvals_mlflow.py` does the same with a real server.
"""

from __future__ import annotations

import threading
from typing import Any

from sluice.registry.mlflow_registry import MlflowRegistry, RegistryMissing, pairs
from sluice.registry.versions import Version, get_version


class FakeVersions(MlflowRegistry):
    """`writes` are the writing calls so far; the call of number `dies_after` is done, and then its process ends."""

    def __init__(self, model: str = "assistant") -> None:
        super().__init__("http://mlflow.test")
        self.model = model
        self.versions: dict[str, dict[str, Any]] = {}
        self.aliases: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.writes: list[str] = []
        self.dies_after = 0
        self._guard = threading.RLock()

    def add(self, digest: str, **tags: str) -> Version:
        number = str(len(self.versions) + 1)
        shown = {"kind": "adapter", "gate": "PASS", "approval": "pending", "release": digest, **tags}
        self.versions[number] = {"tags": shown, "description": "### Gate: PASS\n\nBetter.\n\n**To decide:** ..."}
        return get_version(self, self.model, int(number))

    def see(self, number: int = 1) -> dict[str, str]:
        """The tags that people look at."""
        tags = self.versions[str(number)]["tags"]
        return {name: value for name, value in tags.items() if name.startswith("approval")}

    def say(self, number: int = 1, **tags: str) -> None:
        """As a person in MLflow's page: `by` for `approval.by`."""
        for name, value in tags.items():
            self.versions[str(number)]["tags"]["approval" if name == "approval" else f"approval.{name}"] = value

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        with self._guard:
            if path == "registered-models/get":
                aliases = [{"alias": alias, "version": number} for alias, number in self.aliases.items()]
                return {"registered_model": {"aliases": aliases, "tags": pairs(self.tags)}}
            if path == "model-versions/search":
                return {"model_versions": [self._shown(number) for number in self.versions]}
            assert path == "model-versions/get", path
            if query["version"] not in self.versions:
                raise RegistryMissing(f"no version {query['version']}")
            shown = self._shown(query["version"])
            return {
                "model_version": {**shown, "aliases": [a for a, n in self.aliases.items() if n == query["version"]]}
            }

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        with self._written(path, body):
            if path == "model-versions/set-tag":
                self.versions[body["version"]]["tags"][body["key"]] = body["value"]
            elif path == "registered-models/set-tag":
                self.tags[body["key"]] = body["value"]
            else:
                assert path == "registered-models/alias", path
                self.aliases[body["alias"]] = body["version"]
        return {}

    def patch(self, path: str, **body: Any) -> dict[str, Any]:
        with self._written(path, body):
            assert path == "model-versions/update", path
            self.versions[body["version"]]["description"] = body["description"]
        return {}

    def delete(self, path: str, **body: Any) -> dict[str, Any]:
        with self._written(path, body):
            if path == "model-versions/delete-tag":
                if self.versions[body["version"]]["tags"].pop(body["key"], None) is None:
                    raise RegistryMissing("no such tag")
            else:
                assert path == "registered-models/alias", path
                self.aliases.pop(body["alias"], None)
        return {}

    def _shown(self, number: str) -> dict[str, Any]:
        found = self.versions[number]
        return {
            "name": self.model,
            "version": number,
            "tags": pairs(found["tags"]),
            "description": found["description"],
        }

    def _written(self, path: str, body: dict[str, Any]) -> _Written:
        return _Written(self, f"{path} {body.get('key', body.get('alias', ''))}".strip())


class Died(BaseException):
    """Stands for the end of the process: nothing catches it."""


class _Written:
    def __init__(self, fake: FakeVersions, what: str) -> None:
        self.fake, self.what = fake, what

    def __enter__(self) -> None:
        self.fake._guard.acquire()

    def __exit__(self, kind: Any, *_: object) -> None:
        fake = self.fake
        fake.writes.append(self.what)
        died = kind is None and fake.dies_after == len(fake.writes)
        fake._guard.release()
        if died:
            raise Died(self.what)
