"""The sockets that a master holds, and what the addresses of settings come to."""

from __future__ import annotations

import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

import pytest
from gunicorn.config import Config
from gunicorn.glogging import Logger

from relay import listening
from relay.listening import Sockets
from relay.settings import Settings
from tests.certificates import make_pair
from tests.relay_process import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    sockets = Sockets()
    yield sockets
    sockets.close()


@pytest.fixture
def cfg() -> Config:
    config = Config()
    config.set("errorlog", None)
    return config


def settings(*ports: int, admin: int, **more: Any) -> Settings:
    listeners = [{"address": f"127.0.0.1:{port}", **more} for port in ports]
    return Settings.model_validate({"listeners": listeners, "admin": {"address": f"127.0.0.1:{admin}"}})


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_admin_port_comes_last_and_grpc_ports_are_the_workers() -> None:
    chosen = Settings.model_validate(
        {
            "upstream": {"wire": "grpc", "url": "http://127.0.0.1:1"},
            "listeners": [
                {"address": "127.0.0.1:3", "wires": ["grpc"]},
                {"address": "127.0.0.1:2", "wires": ["http_v1"]},
            ],
            "admin": {"address": "127.0.0.1:1"},
        }
    )
    assert [address.port for address in listening.addresses(chosen)] == [2, 1]
    assert [address.port for address in listening.grpc_addresses(chosen)] == [3]


def test_sockets_are_opened_once_and_closed_when_no_settings_name_them(sockets: Sockets, cfg: Config) -> None:
    first, second, third, admin = (free_port() for _ in range(4))
    before, after = settings(first, second, admin=admin), settings(third, first, admin=admin)
    for each in (before, after):
        sockets.open(listening.addresses(each), cfg, Logger(cfg))
        assert sockets.missing(listening.addresses(each)) == []
    old, new = (sockets.of(listening.addresses(each)) for each in (before, after))
    assert (new[1], new[2]) == (old[0], old[2])
    assert [one.sock.getsockname()[1] for one in new] == [third, first, admin]
    sockets.close(but=listening.addresses(after))
    assert [accepts(port) for port in (first, second, third, admin)] == [True, False, True, True]
    sockets.close()
    assert not any(accepts(port) for port in (first, second, third, admin))


def test_an_address_that_is_taken_in_the_meantime_is_an_os_error(
    sockets: Sockets, cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "create_sockets", lambda *_: sys.exit(1))  # as it says so
    bound = cfg.bind
    chosen = settings(free_port(), admin=free_port())
    with pytest.raises(OSError, match="cannot listen on"):
        sockets.open(listening.addresses(chosen), cfg, Logger(cfg))
    assert sockets.missing(listening.addresses(chosen)) == listening.addresses(chosen)
    assert cfg.bind == bound


def test_a_port_resets_handshakes_when_all_settings_in_force_encrypt_it(
    sockets: Sockets, cfg: Config, tmp_path: Path
) -> None:
    certificate, key = make_pair(tmp_path)
    port, admin = free_port(), free_port()
    plain = settings(port, admin=admin)
    encrypted = settings(port, admin=admin, tls={"certificate": str(certificate), "key": str(key)})
    sockets.open(listening.addresses(plain), cfg, Logger(cfg))

    def resets() -> bool:
        listener = sockets.of(listening.addresses(plain))[0].sock
        onoff, seconds = struct.unpack("ii", listener.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        return bool(onoff) and seconds == 0

    for all_of, expected in (
        ([plain], False),
        ([plain, encrypted], False),
        ([encrypted], True),
        ([encrypted, plain], False),
    ):
        sockets.choose_endings(*all_of)
        assert resets() == expected
