"""The ``fortpoint`` command: every noun's commands under one roof.

Errors that the product raises become one line on standard error and exit code 1; with
``--json`` that line is an object in the form of the HTTP API's errors. No stack traces.
"""

from __future__ import annotations

import json
import sys

import typer

import fortpoint
from fortpoint.cli import audit, doctor, features, guard, key, model, preset, serve, steer, vault
from fortpoint.errors import FortPointError

app = typer.Typer(
    name="fortpoint",
    help="Serve open-weight models, watch them from inside, prove what happened.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("serve")(serve.serve)
app.add_typer(model.app, name="model")
app.add_typer(key.app, name="key")
app.add_typer(features.app, name="features")
app.command("steer")(steer.steer)
app.add_typer(preset.app, name="preset")
app.add_typer(guard.app, name="guard")
app.add_typer(vault.app, name="vault")
app.add_typer(audit.app, name="audit")
app.command("doctor")(doctor.doctor)


@app.command("version")
def version() -> None:
    """Print the version."""
    typer.echo(fortpoint.__version__)


def main() -> None:
    """The console script."""
    try:
        app()
    except FortPointError as error:
        if "--json" in sys.argv:
            fault = {"message": error.message, "type": error.type, "code": error.code}
            print(json.dumps({"error": fault}), file=sys.stderr)
        else:
            print(f"error: {error.message}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
