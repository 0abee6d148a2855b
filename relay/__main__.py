"""The command line: flwr-relay serve | check | explain | reload | demo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from relay import __version__
from relay.demo.command import demo
from relay.settings import Settings, SettingsError, load

app = typer.Typer(
    name="flwr-relay",
    help="The relay between Flower SuperNodes and a SuperLink.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="RELAY_CONFIG", help="YAML file with the settings."),
]

#: Exit codes besides 0: what `check` found.
UNREACHABLE = 1
INVALID = 2


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flwr-relay {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Carry the Fleet API between SuperNodes and a SuperLink."""


@app.command()
def serve(
    config: Config = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that serve calls; overrides the settings.")
    ] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; SIGHUP reads the settings again."""
    from relay import server  # noqa: PLC0415 - it imports gunicorn and aiohttp, which no other command needs

    environ = dict(os.environ)
    if workers is not None:
        environ["RELAY_WORKERS"] = str(workers)
    _settings(config, environ)
    server.serve(lambda: load(config, environ))


@app.command()
def check(
    config: Config = None,
    probe: Annotated[bool, typer.Option(help="Also ask the SuperLink whether it is there.")] = True,
) -> None:
    """Report everything that is wrong with the settings, then probe the SuperLink.

    Exit code 0 when all is well, 1 when the SuperLink does not answer, 2 when the settings are wrong.
    """
    from relay.probe import ProbeError, probe_upstream  # noqa: PLC0415 - see `serve`

    settings = _settings(config, os.environ)
    typer.echo(f"settings: ok ({config or 'defaults'})")
    if not probe:
        return
    try:
        answer = probe_upstream(settings.upstream)
    except ProbeError as error:
        typer.echo(f"upstream: {error}", err=True)
        raise typer.Exit(UNREACHABLE) from None
    typer.echo(f"upstream: ok ({answer})")


@app.command()
def explain(config: Config = None) -> None:
    """Print what a call of each method meets between its listener and the SuperLink."""
    from relay.app import chains  # noqa: PLC0415 - see `serve`

    settings = _settings(config, os.environ)
    shown = None
    for listener, wire, method, chain in chains(settings):
        if (listener, wire) != shown:
            shown = (listener, wire)
            typer.echo(f"{listener.address} {wire.value}")
        typer.echo(f"  {method.rpc:<24}{' -> '.join(chain.steps)}")


@app.command()
def reload(config: Config = None) -> None:
    """Have the running relay take these settings over, without a restart and without losing a call.

    Exit code 0 when its workers serve them, 1 when it was not told or refused, 2 when they are wrong.
    """
    from relay.reload import ReloadError  # noqa: PLC0415 - see `serve`
    from relay.reload import reload as tell  # noqa: PLC0415

    settings = _settings(config, os.environ)
    try:
        typer.echo(tell(settings))
    except ReloadError as error:
        typer.echo(f"not reloaded: {error}", err=True)
        raise typer.Exit(UNREACHABLE) from None


app.command()(demo)


def _settings(config: Path | None, environ: dict[str, str] | os._Environ[str]) -> Settings:
    try:
        return load(config, environ)
    except SettingsError as error:
        for problem in error.problems:
            typer.echo(str(problem), err=True)
        raise typer.Exit(INVALID) from None


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
