"""keys list, rotate, revoke: who signs here, whose signatures count, and how a key ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sluice.infra.access import acting_as
from sluice.infra.errors import InputError
from sluice.infra.settings import load_settings
from sluice.pipelines.cli.output import JsonFlag, console, show_json, show_table

if TYPE_CHECKING:
    from sluice.components.workspace import Workspace
    from sluice.provenance.keys import PublicKey

keys_app = typer.Typer(no_args_is_help=True, help="Who signs here, whose signatures count, and how a key ends.")


def add_to(app: typer.Typer) -> None:
    app.add_typer(keys_app, name="keys")


@keys_app.command("list")
def list_keys(as_json: JsonFlag = False) -> None:
    """Show every known key: its names, since when and until when it counts, what introduced it, what ended it.

    Rules (who may sign which steps, ledger entries and models) come from the trust policy; see docs/trust.md.
    """
    from sluice.components.workspace import open_workspace

    workspace = open_workspace()
    trust = workspace.trust
    own = workspace.signer.public_key.key_id
    rows: list[dict[str, Any]] = []
    for one in trust.policy.known(trust.history):
        introduced = trust.history.successors.get(one.key.key_id)
        revoked = trust.history.revocations.get(one.key.key_id)
        rows.append(
            {
                "key": one.key.key_id,
                "name": one.name,
                "signs_here": one.key.key_id == own,
                "not_before": one.not_before.isoformat() if one.not_before else None,
                "not_after": one.not_after.isoformat() if one.not_after else None,
                "introduced_by": introduced[1] if introduced else None,
                "revoked": {"time": revoked.time, "by": revoked.by, "reason": revoked.reason} if revoked else None,
                "pem": one.key.pem,
            }
        )
    rules = [{rule.scope: rule.pattern, "signers": list(rule.signers)} for rule in trust.policy.rules]
    if as_json:
        show_json({"keys": rows, "rules": rules})
        return
    show_table(
        "keys",
        ["key", "name", "", "valid", "introduced by", "revoked"],
        [
            [
                row["key"][:12],
                row["name"],
                "signs here" if row["signs_here"] else "",
                f"{(row['not_before'] or '')[:10]} to {(row['not_after'] or '')[:10]}"
                if row["not_before"] or row["not_after"]
                else "always",
                (row["introduced_by"] or "")[:12],
                f"{row['revoked']['time'][:19]} by {row['revoked']['by']}: {row['revoked']['reason']}"
                if row["revoked"]
                else "",
            ]
            for row in rows
        ],
    )
    show_table(
        "rules (the first that matches decides)",
        ["may sign", "who"],
        [[" ".join(f"{k} {v}" for k, v in r.items() if k != "signers"), ", ".join(r["signers"])] for r in rules],
        empty="none: every key above may sign everything",
    )


@keys_app.command()
def rotate(
    by: Annotated[str, typer.Option("--by", help="Who rotates; your login by default")] = "", as_json: JsonFlag = False
) -> None:
    """Put a new key in the place of the one that signs here. The old one introduces it, in the ledger.

    The old public key stays trusted, the old private key is gone. After a theft, `sluice keys revoke` the old one.
    """
    from sluice.components.workspace import open_workspace
    from sluice.provenance.key_changes import rotate as rotate_key

    settings = load_settings()
    actor = acting_as(settings, "keys rotate", "", by)
    workspace = open_workspace(settings)
    old = workspace.signer.public_key
    new = rotate_key(workspace.ledger, workspace.signer, workspace.trusted, actor)
    if as_json:
        show_json({"key": new.key_id, "previous": old.key_id, "pem": new.pem})
    else:
        console.print(f"key {new.short} signs here now; {old.short} introduced it and stays trusted")


@keys_app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key's id, or its first digits (`sluice keys list`)")],
    reason: Annotated[str, typer.Option(help="Kept in the ledger, and told to everybody whom it stops")],
    by: Annotated[str, typer.Option("--by", help="Who revokes; your login by default")] = "",
    as_json: JsonFlag = False,
) -> None:
    """End the trust in a key. What the ledger referred to before goes on counting; nothing else that it signed does.

    Steps whose record no longer counts are computed again when they are needed next.
    """
    from sluice.components.workspace import open_workspace
    from sluice.provenance.key_changes import revoke as revoke_key

    settings = load_settings()
    actor = acting_as(settings, "keys revoke", key, by)
    workspace = open_workspace(settings)
    found = find_key(workspace, key)
    entry = revoke_key(
        workspace.ledger,
        workspace.artifacts,
        workspace.steps.records,
        found,
        signer=workspace.signer,
        reason=reason,
        actor=actor,
    )
    if as_json:
        show_json({"key": found.key_id, "entry": entry.sequence, "time": entry.time, "reason": entry.body["reason"]})
    else:
        console.print(
            f"key {found.short} revoked by {escape(entry.actor)} at {entry.time[:19]} (entry {entry.sequence})"
        )


def find_key(workspace: Workspace, prefix: str) -> PublicKey:
    """The known key whose id starts with `prefix`. Raises `InputError` when there is none, or more than one."""
    found = [one for one in workspace.trust.keys if prefix and one.key_id.startswith(prefix)]
    if len(found) != 1:
        problem = "no key" if not found else f"{len(found)} keys"
        raise InputError(f"KEY = {prefix!r} names {problem}.", hint="`sluice keys list` lists them.")
    return found[0]
