"""The command line: flwr-relay serve | check | explain | reload | keys | nodes | certs | demo."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from relay import __version__
from relay.commands import certs, exposed, keys, nodes
from relay.commands.common import UNREACHABLE, Config, read_settings
from relay.demo.command import demo
from relay.settings import load
from relay.settings_unused import idle

app = typer.Typer(
    name="flwr-relay",
    help="The relay between Flower SuperNodes and a SuperLink.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    read_settings(config, environ)
    try:
        server.serve(lambda: load(config, environ))
    except server.UnsafeParserError as error:
        typer.echo(f"not started: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def check(
    config: Config = None,
    probe: Annotated[bool, typer.Option(help="Also ask the SuperLink whether it is there.")] = True,
) -> None:
    """Report everything that is wrong with the settings and the API keys, then probe the SuperLink.

    Exit code 0 when all is well, 1 when the SuperLink or Redis does not answer, 2 when the settings or the
    keys are wrong.
    """
    from relay.probe import ProbeError, probe_upstream  # noqa: PLC0415 - see `serve`

    settings = read_settings(config)
    typer.echo(f"settings: ok ({config or 'defaults'})")
    keys.check(settings, probe=probe)
    nodes.check(settings)
    exposed.check(settings, config)
    for line in idle(settings):
        typer.echo(f"warning: {line}", err=True)
    if not probe:
        return
    upstream = settings.upstream
    reachable = True
    for url in (upstream.url, *upstream.addresses, *upstream.standby):
        # One that stands by need not run yet.
        name = "standby" if url in upstream.standby else "upstream"
        try:
            typer.echo(f"{name}: ok ({probe_upstream(upstream, url)})")
        except ProbeError as error:
            typer.echo(f"{name}: {error}", err=True)
            reachable = reachable and name == "standby"
    if not reachable:
        raise typer.Exit(UNREACHABLE)


@app.command()
def explain(config: Config = None) -> None:
    """Print what a call of each method meets between its listener and the SuperLink."""
    from relay.app import chains  # noqa: PLC0415 - see `serve`

    settings = read_settings(config)
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

    settings = read_settings(config)
    try:
        typer.echo(tell(settings))
    except ReloadError as error:
        typer.echo(f"not reloaded: {error}", err=True)
        raise typer.Exit(UNREACHABLE) from None


app.command()(demo)
app.add_typer(keys.app, name="keys")
app.add_typer(nodes.app, name="nodes")
app.add_typer(certs.app, name="certs")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
