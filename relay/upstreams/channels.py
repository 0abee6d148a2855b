"""The gRPC channels of one worker to one SuperLink."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import chain, cycle
from typing import TYPE_CHECKING

import grpc
from grpc import aio

from relay.bridge import STATUS
from relay.fleet import Method
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

#: A channel is one connection: with a few of them no long object holds all other calls up.
CHANNELS = 4

#: What gRPC can count: Flower sets the same (`GRPC_MAX_MESSAGE_LENGTH`).
MOST_BYTES = 2**31 - 1

#: A SuperLink that comes back is found within a second; gRPC itself would wait for up to two minutes.
_FIRST_BACKOFF_MS = 100
_MOST_BACKOFF_MS = 1000
# gRPC servers end connections that are pinged more often than every 5 minutes. With pings at all, though, the
# kernel is told how long sent bytes may go without an answer (TCP_USER_TIMEOUT): the time-out below.
_PING_MS = 330_000
_PING_TIMEOUT_MS = 20_000

#: Seconds for the calls of channels whose place others have taken; no call may take longer.
_LAST_CALLS = 180.0


@dataclass(frozen=True, slots=True)
class Secured:
    """How a SuperLink is checked: `ca` holds the PEM certificates of its authorities, None the system's."""

    ca: bytes | None = None


class Channels:
    """Opens a few channels and lends them in turn. Must be made inside the running loop.

    Attributes:
        name: of the SuperLink, for logs.
        failure: why it could not be reached; None once it was again.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: Secured | None,
        *,
        connect_timeout: float,
        max_message: int,
        count: int = CHANNELS,
    ) -> None:
        """Prepare `count` channels; they connect with their first call.

        Args:
            host, port: where the SuperLink is.
            tls: None for a connection that is not encrypted.
            connect_timeout: seconds.
            max_message: longest answer that is accepted, in bytes.
            count: how many.
        """
        self.name = f"{host}:{port}"
        self.failure: str | None = None
        self._connect_timeout = connect_timeout
        self._count = count
        self._leaving: dict[asyncio.Task[None], list[aio.Channel]] = {}
        self._target = f"dns:///[{host}]:{port}" if ":" in host else f"dns:///{host}:{port}"
        self._options = [
            ("grpc.max_receive_message_length", min(max_message, MOST_BYTES)),
            ("grpc.max_send_message_length", MOST_BYTES),
            # Without it all channels of a process to one address are one connection.
            ("grpc.use_local_subchannel_pool", 1),
            # The way is the settings' business, not the environment's or the name server's.
            ("grpc.enable_http_proxy", 0),
            ("grpc.service_config_disable_resolution", 1),
            ("grpc.min_reconnect_backoff_ms", int(connect_timeout * 1000)),
            ("grpc.initial_reconnect_backoff_ms", _FIRST_BACKOFF_MS),
            ("grpc.max_reconnect_backoff_ms", max(_MOST_BACKOFF_MS, int(connect_timeout * 1000))),
            ("grpc.keepalive_time_ms", _PING_MS),
            ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        ]
        self._channels: list[aio.Channel] = []
        self._turns: Mapping[Method, Iterator[tuple[aio.Channel, Any]]] = {}
        self._open(tls)

    def take_up(self, tls: Secured) -> None:
        """Check the SuperLink by others from the next call on; calls that are under way come to their end."""
        left = self._channels
        self._open(tls)
        task = asyncio.get_running_loop().create_task(self._see_out(left))
        self._leaving[task] = left
        task.add_done_callback(self._leaving.pop)

    @staticmethod
    async def _see_out(channels: list[aio.Channel]) -> None:
        await asyncio.gather(*(channel.close(_LAST_CALLS) for channel in channels))

    def _open(self, tls: Secured | None) -> None:
        target, options = self._target, self._options
        if tls is None:
            self._channels = [aio.insecure_channel(target, options) for _ in range(self._count)]
        else:
            credentials = grpc.ssl_channel_credentials(tls.ca)
            self._channels = [aio.secure_channel(target, credentials, options) for _ in range(self._count)]
        self._turns = {
            method: cycle([(channel, channel.unary_unary(method.grpc)) for channel in self._channels])
            for method in Method
        }

    def lend(self, method: Method) -> tuple[aio.Channel, Any]:
        """Return the next channel, and what calls `method` on it: bytes in, bytes out."""
        return next(self._turns[method])

    async def get(self, path: str) -> int:
        """Ask for a path with an empty request; return the HTTP status that means what was answered.

        Raises:
            Refusal: UPSTREAM_DOWN if nothing answers.
        """
        channel = self._channels[0]
        try:
            await channel.unary_unary(path)(b"", timeout=self._connect_timeout)
        except aio.AioRpcError as error:
            status = STATUS[error.code().name]
            if status in (503, 504):
                detail = f"no answer to {path}: {error.details()}"
                raise Refusal(Reason.UPSTREAM_DOWN, detail, by=self.name, sent=False) from error
            return status
        return 200

    def renew(self) -> None:
        """Nothing to give up: gRPC ends a connection that failed, and opens another."""

    def state(self) -> dict[str, object]:
        """Return what an operator wants to see; `last_failure` is None once a call was carried again."""
        states = [channel.get_state().name.lower() for channel in self._channels]
        return {"address": self.name, "connections": states.count("ready"), "last_failure": self.failure}

    async def close(self) -> None:
        """Close all channels; calls that are under way are cut."""
        for task in list(self._leaving):
            task.cancel()
        for channel in (*self._channels, *chain.from_iterable(self._leaving.values())):
            await channel.close(None)


def connected(channel: aio.Channel) -> bool:
    """Return whether the channel has a connection at this moment."""
    ready: bool = channel.get_state() is grpc.ChannelConnectivity.READY
    return ready
