"""The sockets of a port are found among the files of this process, and no others."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from relay.wires.grpc_sockets import (
    Connections,
    Place,
    close_listening,
    count_connections,
    cut_connections,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listen(
    stack: ExitStack, family: socket.AddressFamily = socket.AF_INET, host: str = "", port: int = 0
) -> socket.socket:
    listening = stack.enter_context(socket.socket(family))
    listening.bind((host or ("::1" if family is socket.AF_INET6 else "127.0.0.1"), port))
    listening.listen()
    return listening


def connect(stack: ExitStack, to: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = stack.enter_context(socket.socket(to.family))
    client.settimeout(5)
    client.connect(to.getsockname())
    accepted, _ = to.accept()
    return client, stack.enter_context(accepted)


def place_of(listening: socket.socket) -> Place:
    host, port = listening.getsockname()[:2]
    return Place(frozenset({host}), port)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_connections_that_came_to_a_port_are_counted(stack: ExitStack, family: socket.AddressFamily) -> None:
    mine, other = listen(stack, family), listen(stack, family)
    assert count_connections(place_of(mine)) == 0
    connect(stack, mine)
    connect(stack, mine)
    connect(stack, other)
    assert count_connections(place_of(mine)) == 2
    assert count_connections(place_of(other)) == 1


def test_a_port_is_closed_and_its_connections_and_other_ports_are_not(stack: ExitStack) -> None:
    mine, other = listen(stack), listen(stack)
    client, accepted = connect(stack, mine)
    close_listening(place_of(mine))
    with pytest.raises(OSError, match="refused"):
        connect(stack, mine)
    connect(stack, other)
    client.sendall(b"x")
    assert accepted.recv(1) == b"x"
    assert count_connections(place_of(mine)) == 1


def test_the_connections_of_a_port_are_cut_and_others_are_not(stack: ExitStack) -> None:
    mine, other = listen(stack), listen(stack)
    client, _ = connect(stack, mine)
    kept, end = connect(stack, other)
    cut_connections(place_of(mine))
    with suppress(ConnectionResetError):
        assert client.recv(1) == b""
    kept.sendall(b"x")
    assert end.recv(1) == b"x"


def test_the_same_port_at_another_address_is_another_listener(stack: ExitStack) -> None:
    mine = listen(stack, host="127.0.0.2")
    place = place_of(mine)
    other = listen(stack, host="127.0.0.3", port=place.port)
    client, _ = connect(stack, mine)
    kept, end = connect(stack, other)
    assert count_connections(place) == 1
    close_listening(place)
    connect(stack, other)
    cut_connections(place)
    with suppress(ConnectionResetError):
        assert client.recv(1) == b""
    kept.sendall(b"x")
    assert end.recv(1) == b"x"


@pytest.mark.parametrize(
    ("address", "hosts"),
    [
        ("127.0.0.2:0", {"127.0.0.2"}),
        ("[::1]:0", {"::1"}),
        ("0.0.0.0:0", {"0.0.0.0", "::"}),
        ("[::]:0", {"0.0.0.0", "::"}),
    ],
)
def test_a_listener_is_at_the_addresses_that_it_was_given(address: str, hosts: set[str]) -> None:
    assert Place.of(address, 7) == Place(frozenset(hosts), 7)


def test_a_name_is_all_its_addresses() -> None:
    hosts = Place.of("localhost:0", 7).hosts
    assert hosts is not None
    assert "127.0.0.1" in hosts


def test_where_a_listener_is_that_has_all_addresses() -> None:
    place = Place.of("0.0.0.0:0", 7)
    assert place.has(("::", 7, 0, 0), listening=True)
    assert place.has(("::ffff:127.0.0.5", 7, 0, 0), listening=False)
    assert not place.has(("127.0.0.5", 7), listening=True), "of another one, at an address of its own"
    assert not place.has(("127.0.0.5", 8), listening=False)
    unknown = Place(None, 7)
    assert unknown.has(("127.0.0.5", 7), listening=True)


def test_looking_leaves_no_file_open(stack: ExitStack) -> None:
    listening = listen(stack)
    reader, writer = os.pipe()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        count_connections(place_of(listening))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    os.close(reader)
    os.close(writer)


def test_a_look_at_the_sockets_leaves_the_locks_of_other_files(stack: ExitStack) -> None:
    mine = listen(stack)
    table = stack.enter_context(os.fdopen(os.memfd_create("table"), "r+b"))
    fcntl.lockf(table, fcntl.LOCK_EX, 1, 0)
    assert count_connections(place_of(mine)) == 0
    if (child := os.fork()) == 0:
        try:
            fcntl.lockf(table, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        except OSError:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.fixture
def no_more_files(stack: ExitStack) -> Iterator[Callable[[], None]]:
    """Use up all descriptors that this process may have, when called."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def use_up() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        with suppress(OSError):
            while True:
                stack.callback(os.close, os.dup(0))

    yield use_up
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_sockets_are_found_when_no_more_files_may_be_opened(
    stack: ExitStack, no_more_files: Callable[[], None]
) -> None:
    mine = listen(stack)
    client, accepted = connect(stack, mine)
    client.sendall(b"four")
    caller = socket.socket()
    peer = f"ipv4:127.0.0.1:{client.getsockname()[1]}"
    no_more_files()
    with caller:
        assert count_connections(place_of(mine)) == 1
        assert Connections().brought({peer}) == {peer: 4}
        close_listening(place_of(mine))
        with pytest.raises(OSError, match="refused"):
            caller.connect(mine.getsockname())
    accepted.settimeout(5)
    assert accepted.recv(5) == b"four"
    cut_connections(place_of(mine))
    assert client.recv(1) == b""


def test_a_look_without_a_free_descriptor_keeps_no_socket_open(
    stack: ExitStack, no_more_files: Callable[[], None]
) -> None:
    mine = listen(stack)
    client, accepted = connect(stack, mine)
    no_more_files()
    assert count_connections(place_of(mine)) == 1
    accepted.close()
    client.settimeout(5)
    assert client.recv(1) == b""
