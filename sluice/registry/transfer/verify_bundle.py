"""Verify a bundle with public tools alone: python verify_bundle.py BUNDLE.tar SITE.pub [SITE-OLD.pub ...] [FOLDER]

Needs Python 3.11 and securesystemslib (the DSSE and signing library of in-toto and TUF) with cryptography. Each *.pub
is a key of the site: one that changed its key signed older entries with the one before. Exits with 0 when everything
holds; FOLDER then gets the files of the released models. Not checked here: what the gate decided (read the ledger
entries that are printed), that statements follow each other, and which statements of a revoked key still count
(`sluice verify` does all three).
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


def opened(data: bytes, keys: list[SSlibKey], payload_type: str, name: str) -> tuple[Any, set[str]]:
    """The JSON inside a DSSE envelope, and the ids of the keys whose signature on it holds, at least one."""
    envelope = Envelope.from_dict(json.loads(data))
    if envelope.payload_type != payload_type:
        raise ValueError(f"{name}: its payload is {envelope.payload_type}, not {payload_type}")
    signers = {key.keyid for key in envelope.verify(keys, threshold=1).values()}
    return json.loads(envelope.payload), signers


def member(tar: tarfile.TarFile, name: str) -> Any:
    """The bytes of a plain file in the archive, as a stream."""
    stream = tar.extractfile(name)
    if stream is None:
        raise ValueError(f"{name}: not a plain file")
    return stream


def sha256(stream: Any) -> str:
    return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def verify(bundle: str, keys: list[SSlibKey]) -> Any:
    """The signed list, after everything was checked; raises at the first thing that does not hold."""
    with tarfile.open(bundle, "r:") as tar:
        names = tar.getnames()

        def read(name: str) -> bytes:
            return bytes(member(tar, name).read())

        snapshot, signers = opened(read("bundle.json"), keys, SNAPSHOT, "bundle.json")
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

        statements = [opened(read(n), keys, STATEMENT, n)[0] for n in sorted(listed) if n.startswith("attestations/")]
        print(f"{len(statements)} in-toto statements: signatures hold")
        made = {"sha256:" + subject["digest"]["sha256"] for one in statements for subject in one["subject"]}

        previous: str | None = None
        entries: dict[str, Any] = {}
        revoked: set[str] = set()
        for name in sorted(n for n in listed if n.startswith("ledger/")):
            entry, by = opened(read(name), keys, ENTRY, name)
            if not by - revoked:
                raise ValueError(f"{name}: it is signed by a key that was revoked before")
            if entry["previous"] != previous or entry["sequence"] != len(entries) + 1:
                raise ValueError(f"{name}: it does not follow the entry before it")
            previous = listed[name]
            entries[previous] = entry
            if entry["kind"] == "revocation":
                revoked.add(entry["body"]["key"])
        if previous != snapshot["ledger"]["head"]:
            raise ValueError("ledger: it ends elsewhere than bundle.json says")
        if not signers - revoked:
            raise ValueError("bundle.json: it is signed by a key that the ledger revokes")
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
    public = sys.argv[2:3] + [name for name in sys.argv[3:] if name.endswith(".pub")]
    folders = [name for name in sys.argv[3:] if not name.endswith(".pub")]
    if not public or len(folders) > 1:
        sys.exit(__doc__)
    try:
        loaded = [SSlibKey.from_crypto(load_pem_public_key(Path(name).read_bytes())) for name in public]
        found = verify(sys.argv[1], loaded)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is not verified)
        sys.exit(f"NOT VERIFIED: {type(error).__name__}: {error}")
    if folders:
        extract(sys.argv[1], found, Path(folders[0]))
    print("VERIFIED")
