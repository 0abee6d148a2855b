"""nginx, started with the shipped configuration in a directory and on ports of the test's own."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import urllib.request
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.certificates import make_pair
from tests.nginx.edge import PATIENCE, Certificates, Edge, replace, shipped, wait
from tests.relay_process import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from pathlib import Path


def _unavailable(why: str) -> str:
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session")
def nginx() -> str:
    """Path of nginx: $NGINX_BINARY, or the one that is installed."""
    # Not everybody's PATH has the directory where Debian keeps it.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
    found = os.environ.get("NGINX_BINARY") or shutil.which("nginx", path=path)
    return found or _unavailable("no nginx on the PATH (Debian: apt-get install nginx-light)")


@pytest.fixture(scope="session")
def version(nginx: str) -> tuple[int, ...]:
    """Version of that nginx."""
    done = subprocess.run([nginx, "-v"], capture_output=True, text=True, timeout=PATIENCE, check=True)
    found = re.search(r"nginx/([\d.]+)", done.stderr)
    assert found is not None, done.stderr
    return tuple(int(part) for part in found[1].split("."))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(*make_pair(tmp_path_factory.mktemp("tls")))


def launch(
    nginx: str,
    certificates: Certificates,
    folder: Path,
    relays: Iterable[int],
    *,
    server: str = "",
    http: str = "",
    workers: int = 2,
    connections: int = 512,
    grpc: Sequence[int] = (),
    grpc_server: str = "",
) -> Edge:
    """Start nginx in an empty folder, and wait until it serves; the arguments are those of `start_edge`."""
    config = shipped(folder, certificates)
    ports = [free_port() for _ in range(5)]
    _edit(config.parent / "site", relays, ports, server, http)
    if grpc:
        _edit_grpc(config.parent / "site", grpc, ports[3:], grpc_server)
    replace(
        config.parent / "site" / "host.conf",
        ("worker_processes auto;", f"worker_processes {workers};"),
        ("worker_rlimit_nofile 65536;", f"worker_rlimit_nofile {connections};"),
        ("worker_connections 65536;", f"worker_connections {connections};"),
    )
    log = folder / "log" / "start.log"
    command = [nginx, "-p", str(folder), "-e", str(log), "-c", str(config), "-g", "daemon off;"]
    plain, tls, status, grpc_plain, grpc_tls = ports
    process = subprocess.Popen(command)
    edge = Edge(folder, certificates, process, plain, tls, status, grpc_plain, grpc_tls)
    try:
        wait(lambda: _serves(edge, log), "answer of /livez")
    except BaseException:
        edge.stop()
        raise
    return edge


@pytest.fixture
async def start_edge(
    nginx: str, certificates: Certificates, tmp_path: Path
) -> AsyncIterator[Callable[..., Edge]]:
    """A function that starts nginx in front of the relays on these ports.

    Its further arguments: lines for site/server.d and site/http.d, workers, connections of a worker, and the
    ports of gRPC relays and lines for site/grpc/server.d.
    """
    edges: list[Edge] = []
    with ExitStack() as stack:

        def start(
            *relays: int,
            server: str = "",
            http: str = "",
            workers: int = 2,
            connections: int = 512,
            grpc: tuple[int, ...] = (),
            grpc_server: str = "",
        ) -> Edge:
            folder = tmp_path / f"edge-{free_port()}"
            folder.mkdir()
            edge = launch(
                nginx,
                certificates,
                folder,
                relays,
                server=server,
                http=http,
                workers=workers,
                connections=connections,
                grpc=grpc,
                grpc_server=grpc_server,
            )
            stack.callback(edge.stop)
            edges.append(edge)
            return edge

        yield start
        for edge in edges:
            edge.hang_up()
        await asyncio.sleep(0)


def _edit_grpc(site: Path, relays: Iterable[int], ports: Iterable[int], server: str) -> None:
    replace(site / "http.d" / "grpc.conf", ("# include grpc.conf;", "include grpc.conf;"))
    plain, tls = ports
    listen = "listen 127.0.0.1:{} {}http2 default_server reuseport backlog=1024;\n"
    (site / "grpc" / "listen.conf").write_text(listen.format(plain, "") + listen.format(tls, "ssl "))
    lines = [f"server 127.0.0.1:{port} max_fails=0;\n" for port in relays]
    (site / "grpc" / "relays.conf").write_text("".join(lines))
    (site / "grpc" / "server.d" / "test.conf").write_text(server)


def _edit(site: Path, relays: Iterable[int], ports: Iterable[int], server: str, http: str) -> None:
    """Do what an operator does: say where to listen, and where the relays are."""
    plain, tls, status, *_ = ports
    listen = "listen 127.0.0.1:{} {}default_server reuseport backlog=1024;\n"
    (site / "listen.conf").write_text(listen.format(plain, "") + listen.format(tls, "ssl "))
    lines = [f"server 127.0.0.1:{port} max_fails=0;\n" for port in relays]
    (site / "relays.conf").write_text("".join(lines))
    replace(site / "status.conf", ("127.0.0.1:8081", f"127.0.0.1:{status}"))
    (site / "server.d" / "test.conf").write_text(server)
    with (site / "http.d" / "test.conf").open("a") as file:
        file.write(http)


def _serves(edge: Edge, log: Path) -> bool:
    if edge.process.poll() is not None:
        pytest.fail(f"nginx did not start: {log.read_text()}")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{edge.status_port}/livez", timeout=2) as got:
            return bool(got.read() == b"ok\n")
    except OSError:
        return False
