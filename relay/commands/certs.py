"""`flwr-relay certs`: make certificates for development, and see which ones are in use and until when."""

from __future__ import annotations

import time
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from relay import certificates
from relay.authority import AUTHORITY, LEAF_DAYS, RELAY, Authority, AuthorityError
from relay.commands.common import UNREACHABLE, Config, read_settings
from relay.tls_files import End, ListenerTls, UpstreamTls

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from relay.settings import Settings

app = typer.Typer(help="Make certificates for development, and look at those in use.", no_args_is_help=True)

#: `show` ends with 1 if something ends within so many days; a relay begins to warn of it then, too.
SOON_DAYS = 14
_PORT = 8443


@app.command()
def create(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the files go, and the authority is.")
    ],
    name: Annotated[
        list[str] | None,
        typer.Option(help="Host name or IP address that nodes connect to; repeat it for several."),
    ] = None,
    client: Annotated[
        list[str] | None, typer.Option(help="Also make a client certificate of this name; may be repeated.")
    ] = None,
    days: Annotated[
        int, typer.Option(min=1, max=3650, help="How long the certificates are valid.")
    ] = LEAF_DAYS,
    force: Annotated[
        bool, typer.Option("--force", help="Replace certificates that are there; the authority stays.")
    ] = False,
) -> None:
    """Make an authority, the relay's certificate and clients' ones, and print how they are used.

    An authority that DIR has already is used again. Exit code 1 if a file would be overwritten or cannot be
    written.
    """
    names, clients = name or [], client or []
    if not names and not clients:
        raise typer.BadParameter(
            "give --name for the relay's certificate, --client for others", param_hint="--name"
        )
    try:
        authority = Authority(directory, overwrite=force)
        if names:
            authority.issue_relay(names, days)
        for each in dict.fromkeys(clients):
            authority.issue_client(each, days)
    except (AuthorityError, OSError) as error:
        typer.echo(f"not made: {error}", err=True)
        raise typer.Exit(UNREACHABLE) from None
    for line in _instructions(directory, authority, names, clients):
        typer.echo(line)


def _instructions(
    directory: Path, authority: Authority, names: Sequence[str], clients: Sequence[str]
) -> Iterator[str]:
    ca = authority.files(AUTHORITY)[0]
    host = names[0] if names else "RELAY"
    at = f"[{host}]" if ":" in host else host
    if names:
        certificate, key = authority.files(RELAY)
        yield "# The relay:"
        yield "listeners:"
        yield f"  - address: :{_PORT}"
        yield "    tls:"
        yield f"      certificate: {certificate}"
        yield f"      key: {key}"
        if clients:
            yield "      client_certificates: wanted"
            yield f"      client_ca: {ca}"
            yield "    auth:"
            yield "      accept: [certificate]"
            yield "client_certificates:"
            yield "  allow:"
            yield from (f"    - match: CN:{each}" for each in clients)
        yield ""
        yield f"# Nodes, which need {ca} and no other file of {directory}:"
        command = f"flower-supernode --root-certificates {ca}"
        yield f"{command} --superlink {at}:{_PORT}"
        yield f"{command} --rest --superlink https://{at}:{_PORT}  # flwr <= 1.32"
        yield ""
    for each in clients:
        certificate, key = authority.files(each)
        yield f"# The relay of {each}, before this one; its nodes have no certificates of their own:"
        yield "upstream:"
        yield f"  url: https://{at}:{_PORT}"
        yield f"  ca_file: {ca}"
        yield f"  certificate: {certificate}"
        yield f"  key: {key}"
        yield ""
    key = authority.files(AUTHORITY)[1]
    yield f"# Who has {key} can pass for any relay to these nodes: keep it off the relay's host."


@app.command()
def show(config: Config = None) -> None:
    """List the certificates of the listeners and of the upstream, with their names and when they end.

    Exit code 1 if one has ended or ends within 14 days, 2 if the settings are wrong.
    """
    now = time.time()
    soonest = float("inf")
    for line, end in _report(read_settings(config), now):
        typer.echo(line)
        soonest = min(soonest, end)
    if soonest == float("inf"):
        typer.echo("no certificates in use")
    elif soonest < now + SOON_DAYS * 86_400:
        raise typer.Exit(UNREACHABLE)


def _report(settings: Settings, now: float) -> Iterator[tuple[str, float]]:
    for listener in settings.listeners:
        section = listener.tls
        if section is None:
            continue
        names = {"certificate": section.certificate}
        names |= {f"certificates[{at}]": pair.certificate for at, pair in enumerate(section.certificates)}
        for end in ListenerTls(str(listener.address), section).ends:
            yield _line(str(listener.address), end, names.get(end.file), now), end.at
    if settings.upstream.url.tls:
        for end in UpstreamTls(settings.upstream).ends:
            own = settings.upstream.certificate if end.file == "certificate" else None
            yield _line("upstream", end, own, now), end.at


def _line(where: str, end: End, path: Path | None, now: float) -> str:
    left = (end.at - now) / 86_400
    when = f"{left:.0f} days left" if left > 0 else "has ended"
    names = ""
    if path is not None:
        leaf = certificates.load(path)[0]
        names = f"  {', '.join(certificates.all_names(leaf)) or leaf.subject.rfc4514_string()}"
    return f"{where}  {end.file}  {certificates.show_time(end.at)}  {when}{names}"
