"""The sockets of a gRPC listener, which grpcio keeps to itself, found among the files of this process.

A worker that ends needs them: shutting a gRPC server down fails the calls that come in that moment with
CANCELLED (measured: 149 of 4800 calls over 25 shutdowns), and a node does not survive that.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import socket
import stat
import struct
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

_FILES = "/proc/self/fd"
_ANY = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
#: `tcpi_bytes_received` in Linux's `struct tcp_info` (include/uapi/linux/tcp.h), since Linux 4.1.
_BROUGHT = struct.Struct("=128xQ")

#: A descriptor that is kept for a look when this process may open no more files, and what is behind it else.
_NOTHING = os.open(os.devnull, os.O_RDONLY)
_SPARE = os.open(os.devnull, os.O_RDONLY)
_spare_is_free = threading.Lock()


class Place(NamedTuple):
    """Where a listener is. Another one may have the same port at another address.

    Attributes:
        hosts: its addresses as numbers; None if they are not known, and any may be its own.
        port: of all.
    """

    hosts: frozenset[str] | None
    port: int

    @classmethod
    def of(cls, address: str, port: int) -> Place:
        """Return the place of what listens on `address`, which is `host:port`, and got `port` there."""
        host = address.rpartition(":")[0].strip("[]")
        try:
            found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        except OSError:
            return cls(None, port)
        hosts = frozenset(_plain(each) for each in found)
        # gRPC listens on all of IPv6, too, when it is told to listen on all of IPv4.
        return cls(hosts if hosts.isdisjoint(_ANY) else _ANY, port)

    def has(self, at: tuple[Any, ...], *, listening: bool) -> bool:
        """Return whether a socket that is bound to `at` may be of this listener."""
        if at[1] != self.port:
            return False
        return self.hosts is None or _plain(at[0]) in self.hosts or (not listening and self.hosts is _ANY)


def close_listening(place: Place) -> None:
    """Have the sockets that listen there accept nothing more; gRPC then gives them up by itself."""
    for number in _numbers():
        with _inspected(number) as found:
            if found is not None and _is_at(found, place, listening=True):
                with suppress(OSError):
                    found.shutdown(socket.SHUT_RDWR)


def cut_connections(place: Place, below: float = math.inf) -> None:
    """End the connections that came there if they have brought less than `below` bytes.

    Their calls fail with UNAVAILABLE, which nodes survive.
    """
    for number in _numbers():
        with _inspected(number) as found:
            if found is not None and _is_at(found, place, listening=False):
                with suppress(OSError, struct.error):
                    if below == math.inf or _brought(found) < below:
                        found.shutdown(socket.SHUT_RDWR)


def count_connections(place: Place) -> int:
    """Return how many connections that came there are open."""
    count = 0
    for number in _numbers():
        with _inspected(number) as found:
            count += found is not None and _is_at(found, place, listening=False)
    return count


class Connections:
    """Finds the connections of peers, in gRPC's words, and remembers where they are."""

    def __init__(self) -> None:
        """Know of none."""
        self._at: dict[str, int] = {}
        self._seen: dict[int, int] = {}

    def brought(self, peers: Collection[str]) -> dict[str, int]:
        """Return how many bytes the connections of these peers have brought so far, where that is known."""
        if any(peer not in self._at for peer in peers):
            self._search()
        found: dict[str, int] = {}
        for peer in peers:
            number = self._at.get(peer)
            if number is None:
                continue
            with _inspected(number) as connection:
                if connection is not None and _peer(connection) == peer:
                    # The kernel may be too old to say, or the connection has ended.
                    with suppress(OSError, struct.error):
                        found[peer] = _brought(connection)
                else:
                    del self._at[peer]
        return found

    def _search(self) -> None:
        """Look at the files that were not there before."""
        seen, self._seen = self._seen, {}
        for number in _numbers():
            with suppress(OSError):
                inode = os.fstat(number).st_ino
                self._seen[number] = inode
                if seen.get(number) == inode:
                    continue
            with _inspected(number) as connection:
                if connection is not None and (peer := _peer(connection)) is not None:
                    self._at[peer] = number
        numbers = self._seen.keys()
        self._at = {peer: number for peer, number in self._at.items() if number in numbers}


def brought(peers: Collection[str]) -> dict[str, int]:
    """Return how many bytes the connections of these peers, in gRPC's words, have brought so far."""
    return Connections().brought(peers)


def _brought(connection: socket.socket) -> int:
    told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BROUGHT.size)
    count: int = _BROUGHT.unpack(told)[0]
    return count


def _peer(connection: socket.socket) -> str | None:
    """Return whose connection it is, in gRPC's words; None if it is none."""
    if connection.family not in _FAMILIES or connection.type != socket.SOCK_STREAM:
        return None
    try:
        return _words(connection.getpeername())
    except OSError:
        return None


def _words(peer: tuple[Any, ...]) -> str:
    """Return a peer as gRPC's contexts call it."""
    host, port = _plain(peer[0]), peer[1]
    return f"ipv6:%5B{host.replace('%', '%25')}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"


def _plain(host: str) -> str:
    """Return an address of IPv4 as such: gRPC has sockets of IPv6 for both."""
    return host.removeprefix("::ffff:")


def _numbers() -> Iterable[int]:
    """Return the descriptors of this process; when they cannot be listed, all that there may be."""
    try:
        return [int(name) for name in os.listdir(_FILES)]  # noqa: PTH208 - a name is the number
    except OSError:  # to list them takes one more, and then all below the limit are in use
        return range(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


@contextmanager
def _inspected(number: int) -> Iterator[socket.socket | None]:
    """Give the socket behind a file descriptor, whoever owns that; None if it is no socket."""
    copy = _copy(number)
    if copy is None:
        yield None
        return
    found = None
    try:
        with suppress(OSError):  # another file
            found = socket.socket(fileno=copy)
        yield found
    finally:
        if found is not None:
            found.detach()
        if copy == _SPARE:
            os.dup2(_NOTHING, _SPARE, inheritable=False)
            _spare_is_free.release()
        else:
            os.close(copy)


def _copy(number: int) -> int | None:
    """Return a copy of a descriptor, so that it stays the same socket; None if it is no socket."""
    try:
        # Nothing else may be copied: to close a copy of a file takes the record locks of this process off it
        # (fcntl(2)), and with them whatever `stores/records` was about to write.
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return None
        return os.dup(number)
    except OSError as error:
        if error.errno != errno.EMFILE:  # it was closed meanwhile
            return None
    _spare_is_free.acquire()
    try:
        return os.dup2(number, _SPARE, inheritable=False)
    except OSError:
        _spare_is_free.release()
        return None


def _is_at(found: socket.socket, place: Place, *, listening: bool) -> bool:
    if found.family not in _FAMILIES or found.type != socket.SOCK_STREAM:
        return False
    try:
        if not place.has(found.getsockname(), listening=listening):
            return False
        if listening:
            return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        found.getpeername()  # one that has listened has none, nor one that is over
    except OSError:
        return False
    return True
