"""MLflow's SQLite database for a new installation, without its minute of migrations.

MLflow builds its schema by running every migration of its history (15 to 55 s). The result depends on its version
only, so one empty, migrated database is kept for each version and copied into every new home.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sluice.infra.errors import UnavailableError
from sluice.infra.home import publish_once, writing
from sluice.infra.progress import Report, no_report

ARTIFACT_ROOT = "mlflow-artifacts:/"
"""Where experiments put artifacts: through the server, which alone knows the object store's keys."""

_CREATE = """
import sys
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
SqlAlchemyStore("sqlite:///" + sys.argv[1], sys.argv[2]).engine.dispose()
"""
_UPGRADE = """
import sys
from mlflow.store.db.utils import _upgrade_db, create_sqlalchemy_engine_with_retry
engine = create_sqlalchemy_engine_with_retry("sqlite:///" + sys.argv[1])
_upgrade_db(engine)
engine.dispose()
"""
_TIMEOUT_S = 300.0


def default_cache() -> Path:
    """The user's own cache folder, shared by all installations of this user."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sluice"


def ensure_database(database: Path, cache: Path, report: Report = no_report) -> None:
    """Make `database` exist with the installed MLflow's schema. One of an older version is copied, then migrated.

    Raises `UnavailableError` when it cannot be made. Killed at any moment it leaves no half-made database behind.
    """
    with writing(database.parent):
        database.parent.mkdir(parents=True, exist_ok=True)
        for left in database.parent.glob(".preparing-*"):
            if time.time() - left.stat().st_mtime > 2 * _TIMEOUT_S:
                left.unlink(missing_ok=True)
    template = _template(cache, report)
    if not database.exists():
        report(0, 0, "preparing MLflow's database")
        with writing(database.parent):
            staging = _staging(database)
            if template is None:
                _run(_CREATE, staging, ARTIFACT_ROOT)
            else:
                shutil.copyfile(template, staging)
            # Never over a database that appeared meanwhile: a server may be writing to it.
            publish_once(staging, database)
        return
    found, wanted = revision(database), revision(template) if template else None
    if found is not None and wanted is not None and found != wanted:
        report(0, 0, f"migrating MLflow's database from {found} to {wanted}")
        with writing(database.parent):
            shutil.copyfile(database, database.with_name(f"{database.name}.{found}"))
            staging = _staging(database)
            shutil.copyfile(database, staging)
            _run(_UPGRADE, staging)
            staging.replace(database)


def revision(database: Path) -> str | None:
    """The schema's revision; None for a file that is not a migrated database."""
    try:
        with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            row = connection.execute("select version_num from alembic_version").fetchone()
    except sqlite3.Error:
        return None
    return str(row[0]) if row else None


def _template(cache: Path, report: Report) -> Path | None:
    """The migrated database of the installed version; None where the cache cannot be written (it is a convenience)."""
    template = cache / "mlflow" / f"{importlib.metadata.version('mlflow')}.db"
    if revision(template) is not None:
        return template
    try:
        template.parent.mkdir(parents=True, exist_ok=True)
        staging = _staging(template)
    except OSError:
        return None
    report(0, 0, "building MLflow's database (once for each version, up to a minute)")
    try:
        _run(_CREATE, staging, ARTIFACT_ROOT)
        # Two installations may build at once: both are the same, the last one stays.
        staging.replace(template)
    finally:
        staging.unlink(missing_ok=True)
    return template


def _staging(target: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".preparing-")
    os.close(handle)
    return Path(name)


def _run(code: str, *arguments: object) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"MLflow did not prepare its database within {_TIMEOUT_S:g} s.") from error
    if ended.returncode != 0:
        said = ended.stdout.decode(errors="replace").strip()[-2000:]
        raise UnavailableError(
            f"MLflow could not prepare its database: {said}.",
            hint="Check the disk; `sluice doctor` checks the machine.",
        )
