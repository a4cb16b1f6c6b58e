"""Verify a bundle with public tools alone: python verify_bundle.py BUNDLE.tar SITE.pub [FOLDER]

Needs Python 3.11 and securesystemslib (the DSSE and signing library of in-toto and TUF) with cryptography. Exits with 0
when everything holds; FOLDER then gets the files of the released models. Not checked here: what the gate decided (read
the ledger entries that are printed) and that statements follow each other (`sluice verify` does both).
"""

import hashlib
import json
import sys
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

SNAPSHOT = "application/vnd.sluice.snapshot+json"
STATEMENT = "application/vnd.in-toto+json"
ENTRY = "application/vnd.sluice.ledger-entry+json"


def opened(data: bytes, key: SSlibKey, payload_type: str, name: str) -> Any:
    """The JSON inside a DSSE envelope, its signature verified."""
    envelope = Envelope.from_dict(json.loads(data))
    if envelope.payload_type != payload_type:
        raise ValueError(f"{name}: its payload is {envelope.payload_type}, not {payload_type}")
    envelope.verify([key], threshold=1)
    return json.loads(envelope.payload)


def member(tar: tarfile.TarFile, name: str) -> Any:
    """The bytes of a plain file in the archive, as a stream."""
    stream = tar.extractfile(name)
    if stream is None:
        raise ValueError(f"{name}: not a plain file")
    return stream


def sha256(stream: Any) -> str:
    return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def verify(bundle: str, key: SSlibKey) -> Any:
    """The signed list, after everything was checked; raises at the first thing that does not hold."""
    with tarfile.open(bundle, "r:") as tar:
        names = tar.getnames()

        def read(name: str) -> bytes:
            return bytes(member(tar, name).read())

        snapshot = opened(read("bundle.json"), key, SNAPSHOT, "bundle.json")
        if datetime.now(UTC) >= datetime.fromisoformat(snapshot["expires"]):
            raise ValueError(f"bundle.json: expired at {snapshot['expires']}")
        listed = {file["path"]: file["digest"] for file in snapshot["files"]}
        if sorted(names) != sorted({"bundle.json", *listed}):
            raise ValueError(f"not the files that were signed: {set(names) ^ {'bundle.json', *listed}}")
        for name, digest in listed.items():
            if sha256(member(tar, name)) != digest:
                raise ValueError(f"{name}: its bytes were changed")
        print(f"bundle.json: snapshot {snapshot['number']} of {snapshot['site']}, valid until {snapshot['expires']}")
        print(f"{len(listed)} files: each is the one that was signed")

        statements = [opened(read(n), key, STATEMENT, n) for n in sorted(listed) if n.startswith("attestations/")]
        print(f"{len(statements)} in-toto statements: signatures hold")
        made = {"sha256:" + subject["digest"]["sha256"] for one in statements for subject in one["subject"]}

        previous: str | None = None
        entries: dict[str, Any] = {}
        for name in sorted(n for n in listed if n.startswith("ledger/")):
            entry = opened(read(name), key, ENTRY, name)
            if entry["previous"] != previous or entry["sequence"] != len(entries) + 1:
                raise ValueError(f"{name}: it does not follow the entry before it")
            previous = listed[name]
            entries[previous] = entry
        if previous != snapshot["ledger"]["head"]:
            raise ValueError("ledger: it ends elsewhere than bundle.json says")
        print(f"{len(entries)} ledger entries: an unbroken chain")

        for release in snapshot["releases"]:
            decision, approval = entries[release["decision"]], entries[release["approval"]]
            print(f"release {release['release']}")
            print(f"  decision {decision['time']}: {decision['body']['verdict']}, about {decision['body']['adapter']}")
            print(f"  approval {approval['time']}: by {approval['body']['approver']}")
            if release["release"] not in made:
                raise ValueError(f"{release['release']}: no signed statement says how it was made")
            if (decision["kind"], decision["body"]["adapter"]) != ("decision", release["release"]):
                raise ValueError(f"{release['release']}: the decision is about something else")
            if (approval["kind"], approval["body"]["decision"]) != ("approval", release["decision"]):
                raise ValueError(f"{release['release']}: the approval is about something else")
        return snapshot


def extract(bundle: str, snapshot: Any, folder: Path) -> None:
    """The files of each released adapter, by their own names."""
    with tarfile.open(bundle, "r:") as tar:
        for release in snapshot["releases"]:
            digest = release["release"].removeprefix("sha256:")
            manifest = json.load(member(tar, f"manifests/sha256/{digest}"))
            for file in manifest["files"]:
                target = folder / digest[:12] / file["path"]
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{file['path']}: it leads out of the folder")
                target.parent.mkdir(parents=True, exist_ok=True)
                data = member(tar, "blobs/sha256/" + file["digest"].removeprefix("sha256:")).read()
                target.write_bytes(data)
                print(f"wrote {target}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    public = load_pem_public_key(Path(sys.argv[2]).read_bytes())
    try:
        found = verify(sys.argv[1], SSlibKey.from_crypto(public))
    except Exception as error:  # noqa: BLE001  (whatever it is, it is not verified)
        sys.exit(f"NOT VERIFIED: {type(error).__name__}: {error}")
    if len(sys.argv) == 4:
        extract(sys.argv[1], found, Path(sys.argv[3]))
    print("VERIFIED")
