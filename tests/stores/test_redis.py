"""A connection to Redis: nothing is opened before it is needed, and silence is not waited for."""

from __future__ import annotations

import socket
import time

import pytest
import redis

from relay.stores.redis import SECONDS, connect
from tests.relay_process import free_port


def test_nothing_is_opened_before_it_is_needed() -> None:
    client = connect(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(redis.exceptions.ConnectionError):
        client.get("key")
    client.close()


def test_a_server_that_says_nothing_is_given_up_soon_and_asked_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = connect(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        began = time.monotonic()
        with pytest.raises(redis.exceptions.TimeoutError):
            client.get("key")
        assert time.monotonic() - began >= SECONDS
        client.close()
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
