"""What a relay listens on: addresses of its settings, and the sockets of them that its master holds."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from gunicorn.sock import create_sockets

from relay import tls

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from relay.settings import HostPort, Listener, Settings


def addresses(settings: Settings) -> list[HostPort]:
    """Return what the master listens on, the admin port last: workers find their sockets by this order."""
    return [*(listener.address for listener in http(settings)), settings.admin.address]


def grpc_addresses(settings: Settings) -> list[HostPort]:
    """Return what each worker listens on by itself (see `relay.wires.grpc_server`)."""
    return [listener.address for listener in settings.listeners if listener.speaks_grpc]


def http(settings: Settings) -> list[Listener]:
    """Return the listeners whose sockets the master makes."""
    return [listener for listener in settings.listeners if not listener.speaks_grpc]


def unbindable(wanted: Iterable[HostPort]) -> Iterator[str]:
    """Yield what is wrong with addresses that cannot be listened on; gunicorn would end for it."""
    for address in wanted:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address.host, address.port))
            except OSError as error:
                yield f"{address} cannot be listened on: {error.strerror}"


class Sockets:
    """The listening sockets that a master holds, by address."""

    def __init__(self) -> None:
        """Hold none."""
        self._held: dict[str, Any] = {}

    def hold(self, sockets: dict[str, Any]) -> None:
        """Hold more of them."""
        self._held |= sockets

    def missing(self, wanted: list[HostPort]) -> list[HostPort]:
        """Return the addresses of which no socket is held."""
        return [address for address in wanted if str(address) not in self._held]

    def open(self, wanted: list[HostPort], cfg: Any, log: Any) -> None:
        """Listen on those of `wanted` of which none is held. Raises OSError."""
        names = [str(address) for address in self.missing(wanted)]
        bound = cfg.bind
        cfg.set("bind", names)
        try:
            self._held |= zip(names, create_sockets(cfg, log), strict=True)
        except SystemExit:  # that is how gunicorn says so
            raise OSError(f"cannot listen on {', '.join(names)}") from None
        finally:
            cfg.set("bind", bound)

    def of(self, wanted: list[HostPort]) -> list[Any]:
        """Return the sockets of these addresses, in their order."""
        return [self._held[str(address)] for address in wanted]

    def close(self, *, but: Iterable[HostPort] = ()) -> None:
        """Close the sockets of all other addresses."""
        staying = {str(address) for address in but}
        for name in self._held.keys() - staying:
            self._held.pop(name).close()

    def choose_endings(self, *all_of: Settings) -> None:
        """Choose how connections end, before a worker accepts one: they inherit it as they arrive.

        A port that is encrypted by some of the settings alone has connections that are none of TLS.
        """
        plain = {str(port.address) for settings in all_of for port in http(settings) if port.tls is None}
        for listener in http(all_of[-1]):
            listening = self._held[str(listener.address)].sock
            if str(listener.address) in plain:
                tls.close_in_good_order(listening)
            else:
                tls.reset_unfinished_handshakes(listening)
