"""The end of a release: the ledger's promotion and the gateway's new stable, or the retired canary."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from sluice.components.task import Task, component


@component
def conclude(adapter: str, previous: str, outcome: str, policy: str, allow_override: bool) -> str:
    """Promote by compare-and-swap on the previous champion, or retire what did not pass: `promoted`, `rolled-back`
    (it failed) or `withdrawn` (nothing could be said)."""
    from sluice.components.conclude import conclude_step
    from sluice.components.task import task

    with task("conclude") as running:
        return conclude_step(
            running,
            adapter=adapter,
            previous=previous,
            outcome=outcome,
            policy=policy,
            allow_override=allow_override,
        )


def conclude_step(
    running: Task, *, adapter: str, previous: str, outcome: str, policy: str, allow_override: bool
) -> str:
    """`promoted`, `rolled-back` or `withdrawn`. The ledger first: gateway and MLflow follow, now or at the next run."""
    from sluice.components.aliases import follow_ledger
    from sluice.components.retiring import hand_over, retire, retire_due
    from sluice.components.rollout import ACTOR, find_policy, open_rollout
    from sluice.components.rollout_report import show_rollout
    from sluice.infra.errors import ConflictError, GateRefused, InputError, UnavailableError
    from sluice.provenance.canonical import short
    from sluice.provenance.releases import promote, read_state

    workspace = running.workspace
    settings = workspace.settings
    if outcome == "promote":
        hand_over(workspace, to=adapter, previous=previous, window_s=find_policy(policy).rollback_window_s)
        with open_rollout(workspace, adapter, policy=policy, allow_override=allow_override) as rollout:
            if read_state(workspace.ledger).champion() != adapter:
                try:
                    promote(
                        workspace.ledger,
                        release=adapter,
                        expected_champion=previous,
                        actor=ACTOR,
                        allow_override=allow_override and settings.release.allow_override,
                    )
                except (GateRefused, ConflictError) as error:
                    # Expired or rejected while it baked, or another release was promoted: nobody stays on this one.
                    rollout.step_aside(error)
                    follow_ledger(workspace)
                    raise
            rollout.finish()
        told = f"{short(adapter)} is the champion; {short(previous)} stays loaded for rollback"
        ended = "promoted"
    elif outcome in ("failed", "inconclusive"):
        told = f"{short(adapter)} was rolled back; {short(previous)} answers everybody"
        if outcome == "inconclusive":
            told += "; nothing was shown against it, and it may be tried again when it is approved again"
        try:
            retire(workspace, adapter)
        except (ConflictError, UnavailableError) as error:
            # Its last answers are still being written: they may end. It has no weight, and no way back to any.
            told += f" (still loaded: {error.message})"
        ended = "rolled-back" if outcome == "failed" else "withdrawn"
    else:
        raise InputError(f"outcome = {outcome!r} is none of 'promote', 'failed' and 'inconclusive'.")
    repairs = follow_ledger(workspace)
    page = show_rollout(settings, adapter)
    running.state.values.update(outcome=ended, repairs=repairs, page=page, retired=list(retire_due(workspace)))
    running.say(told)
    return ended
