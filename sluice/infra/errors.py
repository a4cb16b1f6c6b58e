"""Errors that end in a sentence: what went wrong, and the way out.

Every error that a user can cause or can mend is a `SluiceError`. The command line prints its message and hint and
exits with `exit_code`; anything else is a defect and keeps its stack trace in the log. Exit codes are part of the
public interface (docs/cli.md).
"""

from __future__ import annotations


class SluiceError(Exception):
    """A failure with a cause in words and a way out. Exit code 1 unless a subclass says otherwise."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class InputError(SluiceError):
    """A setting, parameter or file given by the user is wrong. The message names the field and the value."""

    exit_code = 2


class UnavailableError(SluiceError):
    """A part we need (server, port, disk, network) is missing, busy or does not answer."""

    exit_code = 3


class IntegrityError(SluiceError):
    """Bytes, a signature or a chain are not what their digest, key or predecessor says."""

    exit_code = 4


class GateRefused(SluiceError):
    """A gate, an approval or an invariant forbids the action. Nothing was changed."""

    exit_code = 5


class ConflictError(SluiceError):
    """Somebody else was first: a compare-and-swap lost, a lease is held, a name exists with another digest."""

    exit_code = 6


class StepFailed(SluiceError):
    """A pipeline step ended without a result. The message carries the step's own cause."""

    exit_code = 7


class AccessRefused(SluiceError):
    """Whoever acts does not hold the role that the action asks for. Nothing was changed."""

    exit_code = 8


class Interrupted(SluiceError):
    """Work was saved after a notice (SIGTERM: eviction, spot, cancel) and ended: run again to continue. EX_TEMPFAIL."""

    exit_code = 75
