"""What is open to everybody and should not be, for `flwr-relay check`: files, and what is said of callers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from relay.settings_source import dotted
from relay.settings_tls import widest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from relay.settings import Settings
    from relay.settings_source import Key

#: What the others of a host may do with a file: read it, or write to it.
_OTHERS = 0o006


def check(settings: Settings, config: Path | None) -> None:
    """Warn of each file that everybody on this host may read or change, and of proxies that anybody may be.

    Args:
        settings: the whole tree.
        config: the file that they came from.
    """
    files = [(dotted(key), path) for key, path in _named(settings) if path is not None]
    if config is not None and _holds_password(settings, config):
        files.append(("settings", config))
    for name, path in files:
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        if mode & _OTHERS:
            done = "changed" if mode & 0o002 else "read"
            typer.echo(
                f"{name}: warning: {path} can be {done} by everybody on this host: chmod o= {path}", err=True
            )

    for index, listener in enumerate(settings.listeners):
        if (network := widest(listener.trusted_proxies)) is not None:
            name = dotted(("listeners", index, "trusted_proxies"))
            typer.echo(
                f"{name}: warning: {network} lets anybody say whose call it is: name the addresses of the"
                " proxies alone",
                err=True,
            )


def _named(settings: Settings) -> Iterator[tuple[Key, Path | None]]:
    for index, listener in enumerate(settings.listeners):
        if listener.tls is not None:
            at: Key = ("listeners", index, "tls")
            yield (*at, "key"), listener.tls.key
            for number, pair in enumerate(listener.tls.certificates):
                yield (*at, "certificates", number, "key"), pair.key
    yield ("upstream", "key"), settings.upstream.key
    yield ("keys", "file"), settings.keys.file
    yield ("keys", "pepper_file"), settings.keys.pepper_file
    yield ("node_keys", "allow"), settings.node_keys.allow
    yield ("quarantine", "file"), settings.quarantine.file


def _holds_password(settings: Settings, config: Path) -> bool:
    """Return whether the file of settings names a Redis server together with its password."""
    text = config.read_text(errors="replace")
    urls = (url.text for url in (settings.keys.redis, settings.redelivery.redis) if url is not None)
    return any("@" in url and url in text for url in urls)
