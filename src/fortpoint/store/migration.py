"""Applies the steps in ``store/migrations`` with Alembic, without its command line.

There is no ``alembic.ini`` and no ``env.py``: the steps are found beside this module, so that
an installed wheel migrates like a checkout, and the caller's transaction is used, so that two
processes that start together apply each step once or not at all.

Steps form a tree, not a line: two that do not touch the same tables may both follow a third,
and a database that has either of them gets the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from fortpoint.errors import StorageError

_FOLDER = Path(__file__).parent / "migrations"


def upgrade(connection: Connection) -> None:
    """Apply the missing steps in the transaction of ``connection``. Raises ``StorageError``."""
    config = Config()
    # Alembic expands "%" in options; a folder's name may hold one.
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    script = ScriptDirectory.from_config(config)

    def steps(revision: Any, context: MigrationContext) -> Any:
        return script._upgrade_revs("heads", revision)

    with EnvironmentContext(config, script, fn=steps, destination_rev="heads") as environment:
        environment.configure(connection=connection, transactional_ddl=True)
        try:
            environment.run_migrations()
        except CommandError:
            raise StorageError(
                "the database was made by a newer version of Fort Point, or is not one of its"
            ) from None


def heads() -> frozenset[str]:
    """The newest steps: those that no other follows."""
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    return frozenset(ScriptDirectory.from_config(config).get_heads())
