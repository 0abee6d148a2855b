"""What the kernel knows of a node's connection and asyncio does not tell: what is on its way, and its end."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

#: Connections that the kernel holds until they are accepted.
BACKLOG = 2048
#: Connections of a port that are accepted in one turn of the loop. uvloop takes one from each handle: those
#: who come to a busy worker all at once, after an outage, would wait a turn for each before them.
ACCEPTS = 8

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def untaken(transport: asyncio.WriteTransport) -> int:
    """Return the bytes of answers that the node has not confirmed: those here, and those in the kernel.

    What the kernel holds counts, because it takes a third of its buffer at a time from us: a slow node that
    takes byte after byte would seem to take nothing for long.
    """
    held = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError, ValueError):  # it may be closed already
            queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
            held += int.from_bytes(queued, sys.byteorder)
    return held


def reset(transport: asyncio.Transport) -> None:
    """End a connection with RST; by itself even `abort` ends one with FIN."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):  # it may be closed already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    transport.abort()
