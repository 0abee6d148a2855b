"""A running nginx with the shipped configuration, and the answers that nodes get of it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from relay.call import Wire
from relay.fleet import Method
from tests.sockets import CutError, Listener, Message, Peer, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

SHIPPED = Path(__file__).parents[2] / "nginx"
#: How long a start, a reload or a stop may take on a busy machine.
PATIENCE = 20.0
#: Where nginx would write bodies that it does not stream.
SPOOLS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
PREFIX = {Wire.HTTP_V1: "/v1/fleet/", Wire.REST_V0: "/api/v0/fleet/"}
#: Every path that a node may call; None is a method that the relay does not know.
CALLS: list[tuple[Wire, Method | None]] = [(wire, method) for wire in PREFIX for method in (*Method, None)]
PULL = "/v1/fleet/pull-messages"
PUSH = "/v1/fleet/push-object"


def path_of(wire: Wire, method: Method | None) -> str:
    return PREFIX[wire] + (method.path if method else "of-tomorrow")


def request(path: str, body: bytes = b"", *, more: bytes = b"", verb: str = "POST") -> bytes:
    """Return the bytes of a call; `more` are further header lines."""
    head = f"{verb} {path} HTTP/1.1\r\nhost: edge.example\r\ncontent-type: application/protobuf\r\n"
    return head.encode() + more + b"content-length: %d\r\n\r\n" % len(body) + body


# -- answers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node got: a response, or a closed connection (status 0)."""

    status: int
    body: bytes = b""
    content_type: bytes = b""


OK = Answer(200, b"ok", b"application/protobuf")
EMPTY = Answer(200, b"", b"application/protobuf")
COME_BACK = Answer(503, b"come back later\n", b"text/plain")
GIVE_UP = Answer(403, b"too large\n", b"text/plain")
CLOSED = Answer(0)
NOT_FOUND = Answer(404, b"Not Found\n", b"text/plain")


async def answer(peer: Peer) -> Answer:
    """Read the answer to what `peer` has sent."""
    try:
        message = await peer.message()
    except CutError as error:
        if error.partial:
            raise
        return CLOSED
    return Answer(message.status, message.body, message.one(b"content-type"))


# -- a relay that is played -----------------------------------------------------------------------------


@dataclass
class Played(Listener):
    """A relay whose connections are all played by one function; `seen` are the calls that it noted."""

    seen: list[Message] = field(default_factory=list)


@asynccontextmanager
async def play(part: Callable[[Played, Peer], Awaitable[object]]) -> AsyncIterator[Played]:
    """Play `part` on each connection until the end of the block."""

    async def one(relay: Played, peer: Peer) -> None:
        # These say that the edge has closed the connection.
        with suppress(CutError, ConnectionError, TimeoutError):
            await part(relay, peer)

    async def everyone(relay: Played) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(one(relay, await relay._new.get()))

    async with Played() as relay:
        playing = asyncio.create_task(everyone(relay))
        try:
            yield relay
        finally:
            playing.cancel()
            with suppress(asyncio.CancelledError):
                await playing


def answers(data: bytes) -> Callable[[Played, Peer], Awaitable[None]]:
    """A part: answer each call with `data`."""

    async def part(relay: Played, peer: Peer) -> None:
        while True:
            relay.seen.append(await peer.message())
            await peer.send_all(data)

    return part


async def drops(relay: Played, peer: Peer) -> None:
    """Read a call and reset the connection: what the relay does where any answer would end the node."""
    relay.seen.append(await peer.message())
    peer.reset()


async def never_answers(relay: Played, peer: Peer) -> None:
    relay.seen.append(await peer.message())
    await peer.reader.read()


# -- TLS ------------------------------------------------------------------------------------------------


class Certificates(NamedTuple):
    """PEM files of a certificate for `localhost`, which is its own authority."""

    chain: Path
    key: Path

    def client(self, *protocols: str) -> ssl.SSLContext:
        """Return the side of a node that trusts it and offers these protocols (ALPN)."""
        context = ssl.create_default_context(cafile=str(self.chain))
        if protocols:
            context.set_alpn_protocols(protocols)
        return context


def _ends(worker: psutil.Process) -> bool:
    try:
        return "shutting down" in " ".join(worker.cmdline())
    except psutil.NoSuchProcess:
        return True


# -- nginx ----------------------------------------------------------------------------------------------


def wait(condition: Callable[[], object], what: str) -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"no {what} within {PATIENCE:g} s"
        time.sleep(0.01)


def replace(file: Path, *pairs: tuple[str, str]) -> None:
    """Replace texts that must be in `file`."""
    text = file.read_text()
    for old, new in pairs:
        assert old in text, f"{file.name} has no {old!r} any more"
        text = text.replace(old, new)
    file.write_text(text)


def shipped(folder: Path, certificates: Certificates) -> Path:
    """Copy the shipped configuration into `folder` and change its absolute paths, and nothing else."""
    config = folder / "nginx" / "nginx.conf"
    site = config.parent / "site"
    shutil.copytree(SHIPPED, config.parent)
    for name in ("log", "run", *SPOOLS):
        (folder / name).mkdir()
    # Debian's account need not be here, and could not write to this directory.
    user = "user root;" if os.geteuid() == 0 else ""
    logs = ("/var/log/nginx/", f"{folder}/log/")
    replace(site / "host.conf", logs, ("/run/", f"{folder}/run/"), ("user www-data;", user))
    replace(site / "log.conf", logs)
    replace(
        site / "tls.conf",
        ("/etc/nginx/tls/fullchain.pem", str(certificates.chain)),
        ("/etc/nginx/tls/privkey.pem", str(certificates.key)),
    )
    spools = "".join(f"{name}_temp_path {folder / name};\n" for name in SPOOLS)
    (site / "http.d" / "test.conf").write_text(spools)
    return config


@dataclass
class Edge:
    """A running nginx.

    Attributes:
        folder: where it keeps everything.
        port: of its plain listener.
        tls_port: of the other one.
        status_port: of site/status.conf.
        grpc_port, grpc_tls_port: of the listeners of grpc.conf, if it is used.
        peers: all connections that were made to it.
    """

    folder: Path
    certificates: Certificates
    process: subprocess.Popen[bytes]
    port: int
    tls_port: int
    status_port: int
    grpc_port: int = 0
    grpc_tls_port: int = 0
    peers: list[Peer] = field(default_factory=list)

    async def connect(self) -> Peer:
        peer = await connect(self.port)
        self.peers.append(peer)
        return peer

    async def connect_tls(self, context: ssl.SSLContext | None = None) -> Peer:
        context = context or self.certificates.client("http/1.1")
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.tls_port, ssl=context, server_hostname="localhost"
        )
        peer = Peer(reader, writer)
        self.peers.append(peer)
        return peer

    def hang_up(self) -> None:
        """Close all connections to it."""
        for peer in self.peers:
            peer.writer.transport.abort()

    async def ask(self, data: bytes, *, tls: bool = False) -> Answer:
        """Send these bytes on a connection of their own; return the answer."""
        peer = await (self.connect_tls() if tls else self.connect())
        peer.send(data)
        try:
            return await answer(peer)
        finally:
            peer.writer.transport.abort()

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def reload(self) -> None:
        """Have the configuration read again; return when the old workers have begun to end."""
        old = self.workers()
        self.process.send_signal(signal.SIGHUP)
        wait(lambda: all(_ends(worker) for worker in old), "end of the old workers")

    def errors(self) -> str:
        return (self.folder / "log" / "error.log").read_text()

    def access_log(self, *lines: str) -> list[dict[str, Any]]:
        """Return the entries of the access log once it has one for each of these request ids."""
        file = self.folder / "log" / "relay.json"
        wait(lambda: all(line in file.read_text() for line in lines), f"log of {lines}")
        return [json.loads(line) for line in file.read_text().splitlines()]

    def spooled(self) -> list[Path]:
        """Return what nginx made to spool bodies; the files are gone at once, their directories stay."""
        return [path for name in SPOOLS for path in (self.folder / name).iterdir()]

    def resident(self) -> int:
        """Return the memory of the largest worker, in bytes."""
        return max(int(worker.memory_info().rss) for worker in self.workers())

    def stop(self) -> None:
        if self.process.poll() is not None:
            return
        workers = self.workers()
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            for worker in workers:
                worker.kill()
            self.process.kill()
            self.process.wait()
            raise
