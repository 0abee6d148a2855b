"""`flwr-relay nodes`: see the nodes of this host, allow their keys, and put them into quarantine.

`list` and `show` ask the admin port of the running relay. The others change a file that its workers look at
once a second: a change is effective within 2 s. Exit codes:

    0  done
    1  the relay does not answer, or the file cannot be read or changed
    2  the settings or the arguments are wrong
    3  there is no such node, key or entry, or it is there already
"""

from __future__ import annotations

import http.client
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlencode

import typer
from click.core import ParameterSource

from relay.commands.common import INVALID, TENANT, UNREACHABLE, Config, read_settings
from relay.commands.listed import (
    NOT_FOUND,
    RefusedError,
    added,
    edit,
    end,
    print_table,
    read,
    removed,
)
from relay.credentials import allowed_keys
from relay.stores import quarantine_list

if TYPE_CHECKING:
    from relay.settings import Settings

#: Nodes that the relay is asked for at once.
_PAGE = 10_000
_HEADINGS = (
    *("NODE", "SEEN", "CALL", "WIRE", "FLWR", "IDENTITY"),
    *("ADDRESS", "CLOCK", "CALLS", "REFUSED", "LAST REFUSAL"),
)

#: What is told of each node; what else a newer relay tells is only in the JSON.
_SHOWN = {
    *("node_id", "key", "silent_for", "last_method", "wire", "version", "identity", "tenant", "accepted"),
    *("address", "clock_skew", "calls", "refusals", "last_refusal"),
}

app = typer.Typer(help="See the nodes, allow their keys, and put them into quarantine.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Who = Annotated[
    str,
    typer.Argument(
        metavar="ID|KEY|NAME",
        help="A node id, the fingerprint of a key (SHA256:...), or an identity ([TENANT/]NAME);"
        " node:, key: or identity: before it says which.",
    ),
]


@app.callback(invoke_without_command=True)
def nodes(context: typer.Context, config: Config = None) -> None:
    """See the nodes, allow their keys, and put them into quarantine. Without a command: `list`."""
    if context.invoked_subcommand is None:
        list_nodes(config=config)
    elif context.get_parameter_source("config") is ParameterSource.COMMANDLINE:
        end(INVALID, f"write --config behind the command: nodes {context.invoked_subcommand} --config PATH")


@app.command("list")
def list_nodes(
    *,
    config: Config = None,
    as_json: AsJson = False,
    silent_for: Annotated[
        str | None, typer.Option(help="Only those that have not called for so long, such as 60s.")
    ] = None,
    identity: Annotated[str | None, typer.Option(help="Only those of this identity.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant.")] = None,
    version: Annotated[str | None, typer.Option(help="Only those whose flwr version begins so.")] = None,
    wire: Annotated[str | None, typer.Option(help="Only those on this wire: http_v1 or rest_v0.")] = None,
    strangers: Annotated[
        bool, typer.Option(help="Also those of which the SuperLink has not accepted a call.")
    ] = True,
) -> None:
    """List the nodes that the relay on this host has seen, the latest call first."""
    settings = read_settings(config)
    filters = {
        "silent_for": silent_for,
        "identity": identity,
        "tenant": tenant,
        "version": version,
        "wire": wire,
        "accepted": None if strangers else "true",
    }
    query = {name: value for name, value in filters.items() if value is not None}
    found: list[dict[str, Any]] = []
    while True:
        page = _ask(settings, "/nodes", {**query, "limit": _PAGE, "offset": len(found)})
        found += page
        if len(page) < _PAGE:
            break
    found.sort(key=lambda node: float(node["silent_for"]))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    listed = _quarantined(settings)
    rows: list[tuple[str, ...]] = [_HEADINGS]
    rows += [_row(node, listed) for node in found]
    print_table(rows)


@app.command()
def show(
    node_id: Annotated[str, typer.Argument(metavar="ID", help="The node id.")], config: Config = None
) -> None:
    """Print all that is known of one node, as JSON."""
    (node,) = _ask(read_settings(config), f"/nodes/{quote(node_id, safe='')}")
    typer.echo(json.dumps(node, indent=1))


@app.command()
def allow(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Public key of a node (.pub or PEM); - for standard input.")
    ],
    *,
    config: Config = None,
    name: Annotated[str | None, typer.Option(help="Who the node is; the key's comment by default.")] = None,
    tenant: Annotated[str, typer.Option(help=TENANT)] = "",
    label: Annotated[
        list[str] | None, typer.Option(help="key=value, kept beside the key; may be repeated.")
    ] = None,
) -> None:
    """Allow the key of a node: nodes that sign with it are let in."""
    from relay.credentials.node_keys import KeyFormatError, read_key  # noqa: PLC0415 - it imports cryptography

    path = _allow_file(read_settings(config))
    try:
        text = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        key, key_type, blob = read_key(text.strip())
    except OSError as error:
        end(INVALID, f"{file}: {error.strerror}")
    except KeyFormatError as error:
        end(INVALID, f"{file} {error}")
    labels = tuple(_label(given) for given in label or ())
    owner = allowed_keys.AllowedKey(
        key.fingerprint, name or _comment(text) or key.fingerprint, tenant, labels
    )
    try:
        line = allowed_keys.line(key_type, blob, owner)
    except ValueError as error:
        end(INVALID, f"cannot be written down: {error}")

    def add(before: str) -> str:
        if any(known.fingerprint == key.fingerprint for _, known in allowed_keys.numbered(before)):
            raise RefusedError(f"{key.fingerprint} is allowed already")
        return added(before, line, allowed_keys.numbered, owner)

    edit(path, add)
    typer.echo(f"allowed {key.fingerprint} ({owner.name})")


@app.command()
def disallow(
    key: Annotated[
        str, typer.Argument(metavar="KEY|NAME|FILE", help="Its fingerprint, its name, or the public key.")
    ],
    config: Config = None,
) -> None:
    """Take a key off the list: nodes that sign with it are refused, and shut down."""
    path = _allow_file(read_settings(config))
    wanted = _fingerprint_of(key)
    gone: list[allowed_keys.AllowedKey] = []

    def remove(before: str) -> str:
        entries = allowed_keys.numbered(before)
        found = [entry for entry in entries if wanted in (entry[1].fingerprint, entry[1].name)]
        if not found:
            raise RefusedError(f"{key} is no key of {path}: see flwr-relay nodes allowed")
        if len(found) > 1:
            raise RefusedError(f"{len(found)} keys have the name {key}: use a fingerprint")
        if len(entries) == 1:
            raise RefusedError(
                "it is the last key, and a list without one cannot be used: allow another one first, or"
                " take node_keys.allow out of the settings to let any key in"
            )
        gone.append(found[0][1])
        return removed(before, {found[0][0]}, allowed_keys.numbered)

    edit(path, remove)
    typer.echo(f"no longer allowed: {gone[0].fingerprint} ({gone[0].name})")


@app.command()
def allowed(config: Config = None, as_json: AsJson = False) -> None:
    """List the keys that are allowed."""
    keys = read(_allow_file(read_settings(config)), allowed_keys.numbered)
    if as_json:
        typer.echo(json.dumps([{**key._asdict(), "labels": dict(key.labels)} for _, key in keys], indent=1))
        return
    rows: list[tuple[str, ...]] = [("KEY", "NAME", "TENANT", "LABELS")]
    rows += [
        (
            key.fingerprint,
            key.name,
            key.tenant or "-",
            " ".join(f"{name}={text}" for name, text in key.labels),
        )
        for _, key in keys
    ]
    print_table(rows)


@app.command()
def quarantine(
    who: Who,
    config: Config = None,
    reason: Annotated[str, typer.Option(help="Why, for the logs and for `quarantined`.")] = "",
) -> None:
    """Keep a node out without ending it, until it is released."""
    path = _quarantine_file(read_settings(config))
    since = datetime.now(UTC).isoformat(timespec="seconds")
    line = quarantine_list.line(_target(who)._replace(since=since, reason=reason))
    (entry,) = quarantine_list.parse(line).entries

    def add(before: str) -> str:
        if any(known[:2] == entry[:2] for _, known in quarantine_list.numbered(before)):
            raise RefusedError(f"{entry.kind} {entry.value} is in quarantine already")
        return added(before, line, quarantine_list.numbered, entry)

    edit(path, add)
    typer.echo(f"in quarantine: {entry.kind} {entry.value}")


@app.command()
def release(who: Who, config: Config = None) -> None:
    """Let a node go on that was in quarantine."""
    path = _quarantine_file(read_settings(config))
    entry = _target(who)

    def remove(before: str) -> str:
        numbers = {number for number, known in quarantine_list.numbered(before) if known[:2] == entry[:2]}
        if not numbers:
            raise RefusedError(
                f"{entry.kind} {entry.value} is not in quarantine: see flwr-relay nodes quarantined"
            )
        return removed(before, numbers, quarantine_list.numbered)

    edit(path, remove)
    typer.echo(f"released: {entry.kind} {entry.value}")


@app.command()
def quarantined(config: Config = None, as_json: AsJson = False) -> None:
    """List who is in quarantine."""
    path = _quarantine_file(read_settings(config))
    entries = read(path, quarantine_list.parse, absent=quarantine_list.QuarantineList()).entries
    if as_json:
        typer.echo(json.dumps([entry._asdict() for entry in entries], indent=1))
        return
    rows: list[tuple[str, ...]] = [("KIND", "WHO", "SINCE", "REASON")]
    rows += [(entry.kind, entry.value, entry.since or "-", entry.reason) for entry in entries]
    print_table(rows)


def check(settings: Settings) -> None:
    """Say how the lists are, for `flwr-relay check`; what is wrong in them was found with the settings."""
    path = settings.node_keys.allow
    if path is not None and not path.exists():
        typer.echo(
            f"node keys: warning: {path} is not there: nodes are told to come back later until"
            " `flwr-relay nodes allow FILE` makes it",
            err=True,
        )
    elif path is not None:
        typer.echo(f"node keys: ok ({path}: {len(read(path, allowed_keys.parse))} allowed)")
    if (listed := _quarantined(settings)) is not None:
        typer.echo(f"quarantine: ok ({settings.quarantine.file}: {len(listed.entries)} in it)")


# -- the running relay ----------------------------------------------------------------------------------


def _ask(settings: Settings, path: str, query: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the nodes that the relay tells of; ends the command if it does not."""
    address = settings.admin.address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - compared
    connection = http.client.HTTPConnection(host, address.port, timeout=10)
    try:
        connection.request("GET", f"{path}?{urlencode(query)}" if query else path)
        response = connection.getresponse()
        said = json.loads(response.read())
        if response.status != 200:
            end(NOT_FOUND if response.status == 404 else INVALID, str(said["error"]))
        nodes = said["nodes"] if query else [said]
        if not all(node.keys() >= _SHOWN for node in nodes):
            raise ValueError("no nodes")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, http.client.HTTPException) as error:
        end(UNREACHABLE, f"the admin port {address} does not answer as a relay's: {error!r}")
    finally:
        connection.close()
    return nodes


def _row(node: dict[str, Any], listed: quarantine_list.QuarantineList | None) -> tuple[str, ...]:
    tenant = f"{node['tenant']}/" if node["tenant"] else ""
    refusal = node["last_refusal"]
    why = f"{refusal['reason']} {refusal['method']} {refusal['at'][:19]}Z" if refusal else "-"
    if listed is not None and _is_listed(node, tenant + node["identity"], listed):
        why = f"IN QUARANTINE; {why}"
    skew = node["clock_skew"]
    return (
        node["node_id"] or node["key"] or "-",
        _ago(node["silent_for"]),
        node["last_method"] or "-",
        node["wire"] or "-",
        node["version"] or "-",
        (tenant + node["identity"] or "-") + ("" if node["accepted"] else " (stranger)"),
        node["address"] or "-",
        "-" if skew is None else f"{skew:+.1f}s",
        str(node["calls"]),
        str(node["refusals"]),
        why,
    )


def _is_listed(node: dict[str, Any], identity: str, listed: quarantine_list.QuarantineList) -> bool:
    node_id = int(node["node_id"]) if node["node_id"] else None
    return node_id in listed.nodes or node["key"] in listed.keys or identity in listed.identities


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit} ago"
    return f"{seconds:.0f}s ago"


# -- the files ------------------------------------------------------------------------------------------


def _allow_file(settings: Settings) -> Path:
    path = settings.node_keys.allow
    if path is None:
        end(INVALID, "there is no place for allowed keys: set node_keys.allow in the settings (--config)")
    return path


def _quarantine_file(settings: Settings) -> Path:
    path = settings.quarantine.file
    if path is None:
        end(INVALID, "there is no place for a quarantine: set quarantine.file in the settings (--config)")
    return path


def _quarantined(settings: Settings) -> quarantine_list.QuarantineList | None:
    path = settings.quarantine.file
    if path is None:
        return None
    return read(path, quarantine_list.parse, absent=quarantine_list.QuarantineList())


def _target(who: str) -> quarantine_list.Entry:
    try:
        return quarantine_list.target(who)
    except ValueError as error:
        end(INVALID, f"{who}: {error}")


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name == "tenant":
        end(INVALID, f"--label {text}: write key=value (a tenant is given by --tenant)")
    return name, value


def _comment(text: bytes) -> str:
    """Return what stands behind the key in a .pub file: user@host, or whatever was asked of ssh-keygen."""
    parts = text.decode("utf-8", "replace").split(None, 2)
    return parts[2].strip() if len(parts) == 3 and parts[0] in allowed_keys.CURVES else ""


def _fingerprint_of(key: str) -> str:
    """Return the fingerprint of a public key file; what is none is a fingerprint or a name already."""
    from relay.credentials.node_keys import KeyFormatError, read_key  # noqa: PLC0415 - see `allow`

    try:
        return read_key(Path(key).read_bytes().strip())[0].fingerprint
    except (OSError, ValueError, KeyFormatError):
        return key
