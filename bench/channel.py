"""A non-blocking connection on an epoll set: what load generator and stub SuperLink are made of.

Plain sockets, because asyncio would cost both of them more CPU per call than the proxy between them.
"""

import select
import socket
from typing import Final

from bench.wire import Reader

_RECEIVE: Final = memoryview(
    bytearray(1 << 20)
)  # one for the process: nothing is kept in it between two reads

READ: Final = select.EPOLLIN
READ_WRITE: Final = select.EPOLLIN | select.EPOLLOUT


class Channel:
    """Sends whole messages and reads whole messages."""

    __slots__ = ("_epoll", "_out", "reader", "sock")

    def __init__(self, sock: socket.socket, epoll: select.epoll, reader: Reader) -> None:
        """Take over the connected `sock`."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        epoll.register(sock.fileno(), READ)
        self.sock = sock
        self.reader = reader
        self._epoll = epoll
        self._out: list[memoryview] = []

    def send(self, *parts: memoryview) -> None:
        """Send the parts, now or as the peer takes them.

        Raises:
            OSError: the connection is gone.
        """
        self._out = list(parts)
        self.flush()
        if self._out:
            self._epoll.modify(self.sock.fileno(), READ_WRITE)

    def flush(self) -> None:
        """Send what the socket takes of the message under way."""
        try:
            sent = self.sock.sendmsg(self._out)
        except BlockingIOError:
            return
        while self._out and sent >= len(self._out[0]):
            sent -= len(self._out.pop(0))
        if self._out:
            self._out[0] = self._out[0][sent:]

    def ready(self, events: int) -> bool | None:
        """Go on after epoll reported `events`.

        Returns True when a message was completed, False when not, None when the peer closed.

        Raises:
            OSError: the connection broke.
            WireError: the peer sent no HTTP.
        """
        if events & select.EPOLLOUT and self._out:
            self.flush()
            if not self._out:
                self._epoll.modify(self.sock.fileno(), READ)
        if not events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            return False
        try:
            count = self.sock.recv_into(_RECEIVE)
        except BlockingIOError:
            return False
        return self.reader.feed(_RECEIVE[:count]) if count else None

    @property
    def sending(self) -> bool:
        """True while a part of the last message is still to be sent."""
        return bool(self._out)

    def close(self) -> None:
        """Leave the epoll set and close."""
        self._epoll.unregister(self.sock.fileno())
        self.sock.close()
