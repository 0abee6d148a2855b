"""The pid file, and what stands beside it."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from relay.pid_file import PidFile, admin_of, taken
from relay.settings import HostPort

if TYPE_CHECKING:
    from pathlib import Path

ADMIN = HostPort("127.0.0.1", 9090)


def test_it_says_who_the_relay_is_and_where_its_admin_port_is_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "relay.pid"
    assert admin_of(path) is None
    file = PidFile(path, ADMIN)
    file.write()
    assert path.read_text() == f"{os.getpid()}\n"
    assert admin_of(path) == ADMIN
    file.admin = HostPort("::1", 9091)
    file.write()
    assert admin_of(path) == HostPort("::1", 9091)
    file.unlink()
    assert list(tmp_path.iterdir()) == []


def test_one_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone/relay\.pid cannot be written: "):
        PidFile(tmp_path / "gone" / "relay.pid", ADMIN).write()


def test_one_of_another_process_is_neither_written_nor_removed(tmp_path: Path) -> None:
    path = tmp_path / "relay.pid"
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        path.write_text(f"{other.pid}\n")
        file = PidFile(path, ADMIN)
        with pytest.raises(OSError, match=f"Already running on PID {other.pid}"):
            file.write()
        assert taken(path) == [f"{path} is the pid file of process {other.pid}"]
        file.unlink()
        assert path.read_text() == f"{other.pid}\n"
        other.kill()
    assert taken(path) == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"no port\n", b"a:99999999\n"])
def test_a_file_that_says_no_address_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "relay.pid.admin").write_bytes(content)
    assert admin_of(tmp_path / "relay.pid") is None
