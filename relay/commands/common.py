"""What the commands share: the settings file, and how they end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relay.settings import Settings, SettingsError, load

if TYPE_CHECKING:
    from collections.abc import Mapping

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="RELAY_CONFIG", help="YAML file with the settings."),
]

#: What is said of `--tenant` wherever a credential is made.
TENANT = "Group that the node is of, beside its name in logs, nodes and quarantine."

#: Exit codes besides 0: what must answer or be written to does not or cannot; the settings are wrong.
UNREACHABLE = 1
INVALID = 2


def read_settings(config: Path | None, environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings; print what is wrong with them and end with INVALID if they cannot be used.

    Args:
        config: the file.
        environ: the variables; those of this process if None.
    """
    try:
        return load(config, os.environ if environ is None else environ)
    except SettingsError as error:
        for problem in error.problems:
            typer.echo(str(problem), err=True)
        raise typer.Exit(INVALID) from None
