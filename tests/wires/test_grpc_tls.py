"""Which certificate a gRPC client gets, and that it gets a new one without a restart."""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
from typing import TYPE_CHECKING

import pytest
import structlog.testing
from cryptography import x509
from grpc import aio

from relay.wires.grpc_tls import server_credentials
from tests.certificates import make_pair

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    Shown = Callable[[str | None], Awaitable[int]]

pytestmark = pytest.mark.timeout(60)


def serial(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[Shown]]]:
    servers: list[aio.Server] = []

    async def serve(pairs: Sequence[tuple[Path, Path]]) -> Shown:
        server = aio.server()
        port = server.add_secure_port("127.0.0.1:0", server_credentials(pairs))
        await server.start()
        servers.append(server)

        async def shown(name: str | None) -> int:
            """Return the serial number of the certificate that a client gets who asks for `name`."""
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.set_alpn_protocols(["h2"])
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=context, server_hostname=name or ""
            )
            der = writer.get_extra_info("ssl_object").getpeercert(True)
            writer.transport.abort()
            await asyncio.sleep(0)
            return x509.load_der_x509_certificate(der).serial_number

        return shown

    yield serve
    for server in servers:
        await server.stop(None)


async def test_the_certificate_is_the_one_for_the_name(
    serve: Callable[..., Awaitable[Shown]], tmp_path: Path
) -> None:
    first = make_pair(tmp_path, "first", host="a.example")
    second = make_pair(tmp_path, "second", host="b.example")
    shown = await serve([first, second])
    assert await shown("a.example") == serial(first[0])
    assert await shown("b.example") == serial(second[0])
    assert await shown("c.example") == serial(first[0])


async def test_a_new_certificate_is_taken_up(serve: Callable[..., Awaitable[Shown]], tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    shown = await serve([pair])
    before = serial(pair[0])
    assert await shown("localhost") == before
    make_pair(tmp_path)
    after = serial(pair[0])
    with structlog.testing.capture_logs() as logs:
        assert await shown("localhost") == after != before
        assert await shown("localhost") == after
    assert [line["event"] for line in logs] == ["certificates changed"]


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("gone", "No such file"),
        ("no certificate", "relay-key.pem: [SSL]"),
        ("no key", "relay-key.pem: [SSL]"),
        ("of another key", "KEY_VALUES_MISMATCH"),
        ("encrypted", "is encrypted"),
        ("expired", "has expired at"),
    ],
)
async def test_files_that_cannot_be_used_leave_the_old_ones_until_they_are_repaired(
    serve: Callable[..., Awaitable[Shown]], tmp_path: Path, how: str, problem: str
) -> None:
    certificate, key = make_pair(tmp_path)
    shown = await serve([(certificate, key)])
    before = serial(certificate)
    match how:
        case "gone":
            certificate.unlink()
        case "no certificate":
            certificate.write_text("no certificate")
        case "no key":
            key.write_text("no key")
        case "of another key":
            other, _ = make_pair(tmp_path, "other")
            other.replace(certificate)
        case "encrypted":
            make_pair(tmp_path, password=b"secret")
        case _:
            make_pair(tmp_path, expired=True)
    with structlog.testing.capture_logs() as logs:
        assert await shown("localhost") == before
        assert await shown("localhost") == before
    (line,) = logs
    assert line["event"] == "certificates cannot be used; the old ones stay"
    assert problem in line["problem"]
    make_pair(tmp_path)
    with structlog.testing.capture_logs() as logs:
        assert await shown("localhost") == serial(certificate) != before
    assert [line["event"] for line in logs] == ["certificates changed"]


async def test_a_certificate_waits_for_its_key(
    serve: Callable[..., Awaitable[Shown]], tmp_path: Path
) -> None:
    """Who renews one writes a file after the other."""
    certificate, key = make_pair(tmp_path)
    shown = await serve([(certificate, key)])
    before = serial(certificate)
    others = make_pair(tmp_path, "other")
    others[0].replace(certificate)
    assert await shown("localhost") == before
    others[1].replace(key)
    assert await shown("localhost") == serial(certificate) != before


async def test_files_that_are_put_back_are_no_change(
    serve: Callable[..., Awaitable[Shown]], tmp_path: Path
) -> None:
    certificate, key = make_pair(tmp_path)
    shown = await serve([(certificate, key)])
    text = certificate.read_bytes()
    certificate.write_text("no certificate")
    await shown("localhost")
    certificate.write_bytes(text)
    with structlog.testing.capture_logs() as logs:
        assert await shown("localhost") == serial(certificate)
    assert logs == []


async def test_an_expired_certificate_is_taken_in_place_of_an_expired_one(
    serve: Callable[..., Awaitable[Shown]], tmp_path: Path
) -> None:
    certificate, key = make_pair(tmp_path, expired=True)
    shown = await serve([(certificate, key)])
    make_pair(tmp_path, expired=True)
    assert await shown("localhost") == serial(certificate)


async def test_a_certificate_that_could_not_be_read_once_is_taken_up_at_the_next_look(
    serve: Callable[..., Awaitable[Shown]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = make_pair(tmp_path)
    shown = await serve([(certificate, key)])
    before = serial(certificate)
    make_pair(tmp_path)

    def no_more_files(_: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(type(certificate), "read_bytes", no_more_files)
        assert await shown("localhost") == before
    assert await shown("localhost") == serial(certificate) != before


async def test_a_certificate_of_the_same_size_and_date_is_taken_up(
    serve: Callable[..., Awaitable[Shown]], tmp_path: Path
) -> None:
    """As a copy that keeps the times of its original."""
    pair, others = make_pair(tmp_path), make_pair(tmp_path, "other")
    for mine in pair:  # what is longer by chance is shorter than this
        mine.write_bytes(mine.read_bytes() + b"\n" * 100)
    shown = await serve([pair])
    before = serial(pair[0])
    for mine, other in zip(pair, others, strict=True):
        was = mine.stat()
        mine.write_bytes(other.read_bytes().ljust(was.st_size, b"\n"))
        assert mine.stat().st_size == was.st_size
        os.utime(mine, ns=(was.st_atime_ns, was.st_mtime_ns))
        assert (mine.stat().st_mtime_ns, mine.stat().st_ino) == (was.st_mtime_ns, was.st_ino)
    assert await shown("localhost") == serial(others[0]) != before


def test_a_pair_that_is_none_is_an_error(tmp_path: Path) -> None:
    certificate, _ = make_pair(tmp_path)
    _, key = make_pair(tmp_path, "other")
    with pytest.raises(ValueError, match="KEY_VALUES_MISMATCH"):
        server_credentials([(certificate, key)])


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        server_credentials([(tmp_path / "nowhere.pem", tmp_path / "nowhere.pem")])
