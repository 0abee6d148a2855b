"""`flwr-relay keys`: make, list, revoke and rotate the API keys of nodes.

A change is effective on all workers of all relays that use the store within 2 s. Exit codes:

    0  done
    1  the store cannot be read or changed
    2  the settings or the arguments are wrong
    3  there is no such key, several answer to the name, or the name is taken

A key itself is printed once, alone on standard output; all that is said about it goes to standard error.
"""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from relay.commands.common import INVALID, TENANT, UNREACHABLE, Config, read_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.credentials.keys.key import Key
    from relay.credentials.keys.record import KeyRecord
    from relay.credentials.keys.stores import KeyStore, Records
    from relay.settings import Settings

NOT_FOUND = 3

app = typer.Typer(help="Make, list, revoke and rotate the API keys of nodes.", no_args_is_help=True)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Who gets it; the user name in the node's address.")
]
IdOrName = Annotated[
    str, typer.Argument(metavar="ID|NAME", help="Which key: its id, or the name it was made for.")
]
Tenant = Annotated[str, typer.Option(help=TENANT)]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class _RefusedError(Exception):
    """The change cannot be made as asked; the text says why."""


@app.command()
def create(
    name: Name,
    *,
    config: Config = None,
    tenant: Tenant = "",
    label: Annotated[
        list[str] | None, typer.Option(help="key=value, kept beside the key; may be repeated.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="When it ends: a time such as 90d, 12h, or 2026-12-31T00:00:00Z.")
    ] = None,
    not_before: Annotated[str | None, typer.Option(help="When it begins, written likewise.")] = None,
    init: Annotated[
        bool, typer.Option("--init", help="Make the file, or the keys in Redis: this is the first key ever.")
    ] = False,
) -> None:
    """Make a key and print it, this once."""
    from relay.credentials.keys.record import KeyRecord, RecordError, checked_labels, checked_name  # noqa: PLC0415

    settings = read_settings(config)
    store, pepper = _store(settings)
    now = int(time.time())
    try:
        template = KeyRecord(
            id="",
            name=checked_name("name", name),
            digest=b"",
            created=now,
            tenant=checked_name("tenant", tenant) if tenant else "",
            labels=checked_labels(dict(_label(text) for text in label or [])),
            not_before=_when("--not-before", not_before, now),
            expires=_when("--expires", expires, now),
        )
    except RecordError as error:
        _end(INVALID, f"the key {error}")
    if template.expires is not None and template.expires <= max(now, template.not_before or 0):
        _end(INVALID, "--expires must be after now, and after --not-before")
    made: list[tuple[Key, KeyRecord]] = []

    def add(records: Records) -> None:
        for record in _of_name(records, name, tenant):
            if record.state(now) in ("valid", "not_yet_valid"):
                raise _RefusedError(
                    f"{name} has the key {record.id}: flwr-relay keys rotate {name} replaces it,"
                    f" flwr-relay keys revoke {name} ends it"
                )
        made[:] = [_made(template, records, pepper)]

    _change(store, add, init=init)
    _hand_out(settings, *made[0])


@app.command("list")
def list_keys(
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the keys, without their secrets."""
    store, _ = _store(read_settings(config))
    now = time.time()
    records = sorted(_read(store).values(), key=lambda record: (record.tenant, record.name, record.created))
    if as_json:
        typer.echo(
            json.dumps([{**record.public(), "state": record.state(now)} for record in records], indent=1)
        )
        return
    rows = [("ID", "NAME", "TENANT", "STATE", "CREATED", "EXPIRES", "LABELS")]
    for record in records:
        shown = record.public()
        labels = " ".join(f"{name}={text}" for name, text in record.labels)
        state = record.state(now).replace("_", " ")
        expires = shown.get("expires", "-")
        rows.append((record.id, record.name, record.tenant or "-", state, shown["created"], expires, labels))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def revoke(
    key: IdOrName,
    config: Config = None,
    tenant: Annotated[str | None, typer.Option(help="Of the name, where several have it.")] = None,
) -> None:
    """End a key, or all keys of a name, at once: nodes that present it are refused, and shut down."""
    store, _ = _store(read_settings(config))
    now = int(time.time())
    ended: list[KeyRecord] = []

    def end(records: Records) -> None:
        found = _found(records, key, tenant)
        ended[:] = [record._replace(revoked=now) for record in found if record.revoked is None]
        if not ended:
            raise _RefusedError(f"{key} is revoked already")
        records.update((record.id, record) for record in ended)

    _change(store, end)
    for record in ended:
        typer.echo(f"revoked {record.id} ({record.name})")


@app.command()
def rotate(
    key: IdOrName,
    *,
    config: Config = None,
    overlap: Annotated[str, typer.Option(help="How long the old key stays valid: 24h, 30m, 0s.")] = "24h",
    expires: Annotated[str | None, typer.Option(help="When the new key ends; as of `create`.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Of the name, where several have it.")] = None,
) -> None:
    """Make a new key for the name of an old one, with its tenant and labels, and print it, this once.

    The old one ends after the overlap, in which nodes can be given the new one.
    """
    settings = read_settings(config)
    store, pepper = _store(settings)
    now = int(time.time())
    until = now + _duration("--overlap", overlap)
    end = _when("--expires", expires, now)
    if end is not None and end <= now:
        _end(INVALID, "--expires must be after now")
    made: list[tuple[Key, KeyRecord]] = []
    old: list[KeyRecord] = []

    def replace(records: Records) -> None:
        live = [r for r in _found(records, key, tenant) if r.state(now) in ("valid", "not_yet_valid")]
        if not live:
            raise _RefusedError(f"{key} is no valid key any more: make one with flwr-relay keys create")
        newest = max(live, key=lambda record: record.created)
        old[:] = [r._replace(expires=until if r.expires is None else min(r.expires, until)) for r in live]
        records.update((record.id, record) for record in old)
        template = newest._replace(created=now, not_before=None, expires=end)
        made[:] = [_made(template, records, pepper)]

    _change(store, replace)
    for record in old:
        typer.echo(f"{record.id} ends at {record.public()['expires']}", err=True)
    _hand_out(settings, *made[0])


def check(settings: Settings, *, probe: bool) -> None:
    """Say how the keys are, for `flwr-relay check`; end it if they cannot be used.

    Args:
        settings: the whole tree.
        probe: whether what is elsewhere (Redis) is asked.
    """
    if settings.keys.file is None and (settings.keys.redis is None or not probe):
        return
    from relay.credentials.keys.file import FileKeys  # noqa: PLC0415
    from relay.credentials.keys.record import pepper_name  # noqa: PLC0415
    from relay.credentials.keys.stores import StoreError  # noqa: PLC0415
    from relay.credentials.keys.table import foreign_pepper  # noqa: PLC0415

    store, pepper = _store(settings)
    try:
        records = store.poll() or {}
    except StoreError as error:
        _end(
            INVALID if isinstance(store, FileKeys) else UNREACHABLE,
            *(f"keys: {text}" for text in error.problems),
        )
    finally:
        store.close()
    ours = pepper_name(pepper)
    foreign = [record for record in records.values() if record.pepper not in ("", ours)]
    if foreign:
        _end(INVALID, *(f"keys: {foreign_pepper(record, ours)}" for record in foreign[:20]))
    valid = sum(record.state(time.time()) == "valid" for record in records.values())
    typer.echo(f"keys: ok ({store.name}: {valid} valid, {len(records) - valid} not)")


# -- what they share ------------------------------------------------------------------------------------


def _store(settings: Settings) -> tuple[KeyStore, bytes]:
    """Return where keys are kept, and the pepper."""
    from relay.credentials.keys.stores import key_store  # noqa: PLC0415 - each command imports what it needs

    section = settings.keys
    store = key_store(section.file, section.redis.text if section.redis else None, str(section.redis))
    if store is None:
        _end(INVALID, "there is no place for keys: set keys.file or keys.redis in the settings (--config)")
    return store, section.pepper_file.read_bytes().strip() if section.pepper_file else b""


def _read(store: KeyStore) -> Records:
    from relay.credentials.keys.stores import StoreError  # noqa: PLC0415

    try:
        return store.poll() or {}
    except StoreError as error:
        _end(UNREACHABLE, *error.problems)


def _change(store: KeyStore, change: Callable[[Records], None], *, init: bool = False) -> None:
    from relay.credentials.keys.stores import StoreError  # noqa: PLC0415

    try:
        store.change(change, init=init)
    except _RefusedError as error:
        _end(NOT_FOUND, str(error))
    except StoreError as error:
        _end(UNREACHABLE, *error.problems)
    finally:
        store.close()


def _made(template: KeyRecord, records: Records, pepper: bytes) -> tuple[Key, KeyRecord]:
    """Make a key after `template` and put its record among the others."""
    from relay.credentials.keys.key import generate  # noqa: PLC0415
    from relay.credentials.keys.record import hashed, pepper_name  # noqa: PLC0415

    key = next(key for key in iter(generate, None) if key.id.decode() not in records)
    record = template._replace(
        id=key.id.decode(), digest=hashed(key.secret, pepper), pepper=pepper_name(pepper)
    )
    records[record.id] = record
    return key, record


def _of_name(records: Records, name: str, tenant: str | None) -> list[KeyRecord]:
    return [r for r in records.values() if r.name == name and tenant in (None, r.tenant)]


def _found(records: Records, key: str, tenant: str | None) -> list[KeyRecord]:
    """Return the keys of an id or of a name."""
    named = _of_name(records, key, tenant)
    if key in records:
        if any(record.id != key for record in named):
            raise _RefusedError(
                f"{key} is the id of one key and the name of another: use the id of the other"
            )
        return [records[key]]
    if not named:
        raise _RefusedError(f"there is no key with the id or the name {key}: see flwr-relay keys list")
    tenants = sorted({record.tenant for record in named})
    if len(tenants) > 1:
        raise _RefusedError(
            f"the tenants {', '.join(map(repr, tenants))} have a {key}: add --tenant, or use an id"
        )
    return named


def _hand_out(settings: Settings, key: Key, record: KeyRecord) -> None:
    """Print the key, and how a node is started with it."""
    shown = record.public()
    whose = f"{record.name} of {record.tenant}" if record.tenant else record.name
    typer.echo(f"key {record.id} for {whose}, valid until {shown.get('expires', 'it is revoked')}:", err=True)
    typer.echo(str(key))
    typer.echo("It is not shown again. A node is started with it like this:", err=True)
    for line in _commands(settings, f"{record.name}:{key}"):
        typer.echo(f"  {line}", err=True)


def _commands(settings: Settings, entry: str) -> list[str]:
    lines = []
    for listener in settings.listeners:
        if not any("api_key" in names for names in listener.auth.accept):
            continue
        host = "RELAY" if listener.address.host in ("0.0.0.0", "::") else listener.address.host  # noqa: S104
        host = f"[{host}]" if ":" in host else host
        flags = " --root-certificates CA.pem" if listener.tls else " --insecure"
        for wire in listener.wires:
            if wire.value == "rest_v0":
                scheme = "https" if listener.tls else "http"
                address = f" --rest --superlink {scheme}://{entry}@{host}:{listener.address.port}"
            else:
                address = f" --superlink {entry}@{host}:{listener.address.port}"
            line = f"flower-supernode{flags}{address}"
            if line not in lines:
                lines.append(line)
    return lines


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        _end(INVALID, f"--label {text}: write key=value")
    return name, value


def _when(option: str, text: str | None, now: int) -> int | None:
    """Return the time that an option names, or what lies a duration ahead."""
    from relay.credentials.keys.record import read_time  # noqa: PLC0415

    if text is None:
        return None
    if re.fullmatch(r"[0-9]+[a-z]", text):
        return now + _duration(option, text)
    try:
        return read_time(text)
    except (ValueError, OverflowError):
        _end(
            INVALID,
            f"{option} {text}: write a duration such as 90d or 12h, or a time such as 2026-12-31T00:00:00Z",
        )


def _duration(option: str, text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
    if match is None or int(match[1]) * _UNITS[match[2]] > 100 * 366 * 86400:
        _end(INVALID, f"{option} {text}: write a duration such as 90d, 12h or 30m, at most 100 years")
    return int(match[1]) * _UNITS[match[2]]


def _end(code: int, *lines: str) -> NoReturn:
    for line in lines:
        typer.echo(line, err=True)
    raise typer.Exit(code)
