"""Keeps the gateway's access log from growing without bound, without losing a line.

A large log is renamed, and Envoy told to open its name anew. Envoy goes on writing to the renamed file until it has;
readers follow the file they have open to its end before they turn to the next (`access_log.AccessLog`). Should Envoy
not be told, it just writes on, and the next rotation tells it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.infra.errors import UnavailableError
from sluice.infra.file_lock import held_if_free

if TYPE_CHECKING:
    from sluice.serving.envoy import GatewaySettings
    from sluice.serving.envoy_admin import EnvoyAdmin


def rotate(settings: GatewaySettings, admin: EnvoyAdmin) -> None:
    """Put the log aside if it is larger than `max_log_bytes`. Raises `UnavailableError` when Envoy does not answer."""
    log = settings.access_log
    if log.exists() and log.stat().st_size <= settings.max_log_bytes:
        return
    with held_if_free(log.with_suffix(".lock")) as free:
        if not free:
            return
        try:
            if log.exists():
                if log.stat().st_size <= settings.max_log_bytes:
                    return
                for old in rotated_logs(log)[: -settings.kept_logs + 1 or None]:
                    old.unlink(missing_ok=True)
                log.rename(log.with_name(f"{log.stem}.{time.time_ns()}{log.suffix}"))
            elif not rotated_logs(log):
                return
        except OSError as error:
            raise UnavailableError(f"The access log {str(log)!r} cannot be put aside: {error}.") from error
        admin.reopen_logs()


def rotated_logs(log: Path) -> list[Path]:
    """The logs that were put aside, oldest first."""
    return sorted(log.parent.glob(f"{log.stem}.*{log.suffix}"))


def put_aside_at(file: Path) -> int:
    """When a log of `rotated_logs` was put aside, nanoseconds since the epoch; 0 for a name of somebody else's."""
    digits = file.stem.rpartition(".")[2]
    return int(digits) if digits.isdigit() else 0
