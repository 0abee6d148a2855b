"""aiohttp's low-level server of one listener: its connections as a whole."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from relay.refusal import Reason, Refusal
from relay.wires.http_connection import NodeConnection

if TYPE_CHECKING:
    from relay.tls_files import ListenerTls
    from relay.wires.http import Front

log = structlog.get_logger("relay.wires.http")

#: Beyond this multiple of `limits.connections` a connection is reset before it has said anything.
_FAR = 2


class NodeServer(web.Server):
    """The low-level server of one listener.

    Attributes:
        tls: what it has of TLS; None for a plain port.
    """

    def __init__(self, front: Front, keepalive: float) -> None:
        """Serve `front`; close a node's connection after `keepalive` seconds without a request."""
        super().__init__(_unused)
        self.front = front
        self.keepalive = keepalive
        self.tls: ListenerTls | None = None
        self._open = 0

    def enter(self, connection: NodeConnection) -> Refusal | None:
        """Count a connection; return why its calls are refused if there are too many.

        Far too many are reset at once: they would cost what the limit is there to save.
        """
        limits, peer = self.front.limits, connection.peer
        self._open += 1
        excess = None
        if limits.connections and self._open > limits.connections:
            detail = f"{self._open} connections, limits.connections is {limits.connections}"
            excess = Refusal(Reason.OVERLOADED, detail, by="wire", sent=False)
            if self._open > _FAR * limits.connections:
                connection.reset()
        peers = self.front.peers
        if peers is not None and not self.front.trusts(peer):
            excess = peers.enter(peer) or excess
        return excess

    def leave(self, connection: NodeConnection) -> None:
        """Count one less."""
        self._open -= 1
        peers = self.front.peers
        if peers is not None and not self.front.trusts(connection.peer):
            peers.leave(connection.peer)

    def check_certificates(self) -> None:
        """Reset the connections whose client's certificate has ended or was revoked; for once a second."""
        files = self.tls
        if files is None or not files.asks:
            return
        now = time.time()
        for connection in self.connections:
            if not isinstance(connection, NodeConnection) or connection.shown is None:
                continue
            if not files.holds(connection.shown, now):
                why = "it has expired, or was revoked"
                log.info("client certificate refused", peer=connection.peer, problem=why)
                connection.reset()

    def close_idle(self) -> None:
        """Close the connections on which no request is here."""
        for connection in self.connections:
            if isinstance(connection, NodeConnection) and connection.idle:
                connection.force_close()

    def __call__(self) -> web.RequestHandler:
        """Return the protocol of one new connection."""
        return NodeConnection(self, self._loop)


async def _unused(_: web.BaseRequest) -> web.StreamResponse:
    """aiohttp wants a handler; ours is the front."""
    raise AssertionError
