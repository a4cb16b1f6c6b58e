"""The text and the script that a bundle carries for somebody who has never heard of this program."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from sluice.provenance.attestation import PublicKey
from sluice.registry.transfer.snapshot import LedgerHead, ReleaseEntry

README_FILE = "README.md"
SCRIPT_FILE = "verify_bundle.py"
_HERE = "sluice.registry.transfer"


def readme(
    site: str, application: str, releases: Sequence[ReleaseEntry], ledger: LedgerHead, keys: Sequence[PublicKey]
) -> bytes:
    """The bundle's README: what it is, how to verify it without trusting it, what lies where.

    `keys` signed something in it; the first one the list of its files.
    """
    from jinja2 import Environment, StrictUndefined

    template = files(_HERE).joinpath("bundle_readme.md.j2").read_text()
    page = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)
    return page.render(site=site, application=application, releases=releases, ledger=ledger, keys=keys).encode()


def script() -> bytes:
    """The script that verifies a bundle with public tools, without this program."""
    return files(_HERE).joinpath(SCRIPT_FILE).read_bytes()
