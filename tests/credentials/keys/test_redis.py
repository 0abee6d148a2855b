"""Keys in a real Redis: changes are whole, an outage is one, and a server that forgot is no empty table."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from drills import certificates
from relay.credentials.keys import redis as module
from relay.credentials.keys.record import KeyRecord
from relay.credentials.keys.redis import KEYS, VERSION, RedisKeys
from relay.credentials.keys.stores import Records, StoreError
from relay.credentials.keys.table import KeyTable
from relay.refusal import Reason, Refusal
from tests.redis_server import RedisServer
from tests.relay_process import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

A = KeyRecord("aaaaaaaa", "a", bytes(32), 1)
B = KeyRecord("bbbbbbbb", "b", bytes(32), 2, "north", (("site", "b"),))
PASSWORD = "hunter2hunter2"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), password=PASSWORD) as server:
        yield server


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    with running.client() as client:
        client.flushall()
    return running


@pytest.fixture
def keys(server: RedisServer) -> Iterator[RedisKeys]:
    store = RedisKeys(server.url, "redis://shown")
    yield store
    store.close()


@pytest.fixture
def other(server: RedisServer) -> Iterator[RedisKeys]:
    store = RedisKeys(server.url, "redis://shown")
    yield store
    store.close()


def add(store: RedisKeys, *records: KeyRecord) -> None:
    store.change(lambda present: present.update((record.id, record) for record in records), init=True)


def test_what_was_written_is_read_once(keys: RedisKeys, other: RedisKeys) -> None:
    add(other, A, B)
    assert keys.poll() == {"aaaaaaaa": A, "bbbbbbbb": B}
    assert keys.poll() is None


def test_a_change_is_seen_and_what_stayed_is_the_same_object(keys: RedisKeys, other: RedisKeys) -> None:
    add(other, A, B)
    before = keys.poll()

    def change(records: Records) -> None:
        del records["bbbbbbbb"]
        records["cccccccc"] = B._replace(id="cccccccc")

    other.change(change)
    after = keys.poll()
    assert before is not None
    assert after == {"aaaaaaaa": A, "cccccccc": B._replace(id="cccccccc")}
    assert after["aaaaaaaa"] is before["aaaaaaaa"]


def test_a_server_without_keys_is_an_outage_and_no_empty_table(keys: RedisKeys, server: RedisServer) -> None:
    with pytest.raises(StoreError, match="redis://shown holds no keys: restore"):
        keys.poll()
    add(keys, A)
    assert keys.poll() == {"aaaaaaaa": A}
    with server.client() as client:
        client.flushall()
    with pytest.raises(StoreError, match="restore what it lost"):
        keys.poll()


def test_a_server_without_keys_is_begun_only_if_that_is_meant(keys: RedisKeys, server: RedisServer) -> None:
    """Whoever lost them would have the relays forget all other keys."""
    with pytest.raises(StoreError, match="holds no keys: restore what it lost"):
        keys.change(lambda records: records.update(aaaaaaaa=A))
    with server.client() as client:
        assert client.dbsize() == 0


def test_the_last_key_may_be_taken_away(keys: RedisKeys) -> None:
    add(keys, A)
    keys.change(lambda records: records.clear())
    assert keys.poll() == {}


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (KEYS, "holds 0 keys where there were 2: restore what it lost, and have it evict nothing"),
        (VERSION, "holds 2 keys and no flwr-relay:keys:version: restore it, and have it evict nothing"),
    ],
)
def test_keys_that_were_evicted_are_an_outage_for_who_knew_them_and_for_who_starts(
    keys: RedisKeys, other: RedisKeys, server: RedisServer, lost: str, said: str
) -> None:
    """A worker that took them for none would shut the whole fleet down."""
    add(keys, A, B)
    assert len(keys.poll() or ()) == 2
    with server.client() as client:
        kept = client.dump(lost)
        client.delete(lost)
    for store in (keys, other):
        with pytest.raises(StoreError, match=said):
            store.poll()
    with pytest.raises(StoreError, match=said):
        keys.change(lambda records: records.update(cccccccc=A))
    with server.client() as client:
        assert client.dbsize() == 1, "whoever finds keys lost writes nothing"
        client.restore(lost, 0, kept)
    assert keys.poll() is None, "they are the ones that it knows"
    assert len(other.poll() or ()) == 2


def test_one_key_that_was_deleted_by_hand_is_an_outage(keys: RedisKeys, server: RedisServer) -> None:
    add(keys, A, B)
    with server.client() as client:
        client.hdel(KEYS, B.id)
    with pytest.raises(StoreError, match="holds 1 keys where there were 2"):
        keys.poll()


def test_to_begin_anew_where_keys_are_missing_is_no_accident(keys: RedisKeys, server: RedisServer) -> None:
    """`--init` in a script would make all relays forget all keys."""
    add(keys, A, B)
    with server.client() as client:
        client.delete(KEYS)
        with pytest.raises(StoreError, match="if they are lost for good, delete flwr-relay:keys and"):
            add(keys, A)
        client.delete(VERSION)
    add(keys, A)
    assert keys.poll() == {"aaaaaaaa": A}


def test_keys_without_their_version_are_kept_by_who_begins_anew(keys: RedisKeys, server: RedisServer) -> None:
    add(keys, A)
    with server.client() as client:
        client.delete(VERSION)
    add(keys, B)
    assert keys.poll() == {"aaaaaaaa": A, "bbbbbbbb": B}


def test_a_version_without_a_number_stands_for_some_keys(keys: RedisKeys, server: RedisServer) -> None:
    """Releases before this one wrote none."""
    add(keys, A)
    with server.client() as client:
        client.set(VERSION, "0123456789abcdef")
        assert keys.poll() == {"aaaaaaaa": A}
        assert keys.poll() is None
        client.delete(KEYS)
    with pytest.raises(StoreError, match="holds 0 keys where there were some"):
        keys.poll()


async def test_a_worker_that_starts_with_lost_keys_refuses_nobody(server: RedisServer) -> None:
    store = RedisKeys(server.url, "redis://shown")
    table = KeyTable(store)
    for prepared in (lambda client: None, lambda client: client.set(VERSION, "2:x")):
        with server.client() as client:
            prepared(client)
        await table.refresh()
        with pytest.raises(Refusal) as caught:
            table.find(b"aaaaaaaa")
        assert caught.value.reason is Reason.UPSTREAM_DOWN
    await table.close()


def test_a_server_that_was_restored_from_an_older_copy_is_read_anew(
    keys: RedisKeys, server: RedisServer
) -> None:
    add(keys, A)
    with server.client() as client:
        version, rows = client.get(VERSION), client.hgetall(KEYS)
        add(keys, B)
        assert len(keys.poll() or ()) == 2
        client.delete(KEYS)
        client.hset(KEYS, mapping=rows)
        client.set(VERSION, version)
    assert keys.poll() == {"aaaaaaaa": A}


@pytest.mark.parametrize(
    ("field", "line", "fault"),
    [
        ("aaaaaaaa", b"garbage", "field b'aaaaaaaa' of flwr-relay:keys: is no JSON object"),
        ("cccccccc", A.to_json().encode(), "has another id than its field"),
    ],
)
def test_a_broken_record_is_named_and_stops_changes(
    keys: RedisKeys, server: RedisServer, field: str, line: bytes, fault: str
) -> None:
    add(keys, A)
    with server.client() as client:
        client.hset(KEYS, field, line)
    with pytest.raises(StoreError) as caught:
        keys.poll()
    assert fault in str(caught.value)
    with pytest.raises(StoreError):
        add(keys, B)


def test_garbage_of_another_kind_is_a_store_error(keys: RedisKeys, server: RedisServer) -> None:
    with server.client() as client:
        client.set(KEYS, "text")
        client.set(VERSION, "1")
    with pytest.raises(StoreError, match="WRONGTYPE"):
        keys.poll()


def test_of_very_many_broken_records_the_first_are_named(keys: RedisKeys, server: RedisServer) -> None:
    with server.client() as client:
        client.hset(KEYS, mapping={str(number): "x" for number in range(1000)})
        client.set(VERSION, "1")
    with pytest.raises(StoreError) as caught:
        keys.poll()
    assert len(caught.value.problems) == module._MOST_FAULTS


def test_changes_at_once_lose_nothing(server: RedisServer) -> None:
    def many(name: str) -> None:
        store = RedisKeys(server.url, "redis://shown")
        for number in range(20):
            add(store, A._replace(id=f"{name}{number:07}"))
        store.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many, "wxyz"))
    store = RedisKeys(server.url, "redis://shown")
    assert len(store.poll() or ()) == 80
    store.close()


def test_a_change_that_is_always_overtaken_is_given_up(
    keys: RedisKeys, other: RedisKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 3)
    overtaken = []

    def change(records: Records) -> None:
        overtaken.append(1)
        add(other, A._replace(created=len(overtaken)))
        records["bbbbbbbb"] = B

    with pytest.raises(StoreError, match="3 other changes came between"):
        keys.change(change, init=True)
    assert keys.poll() == {"aaaaaaaa": A._replace(created=3)}


def test_a_change_that_fails_changes_nothing(keys: RedisKeys) -> None:
    add(keys, A)

    def failing(records: Records) -> None:
        records.clear()
        raise LookupError

    with pytest.raises(LookupError):
        keys.change(failing)
    assert keys.poll() == {"aaaaaaaa": A}


def test_an_outage_is_told_soon_without_the_password_and_ends_by_itself(
    tmp_path: object, server: RedisServer
) -> None:
    with RedisServer(server._directory, password=PASSWORD) as mortal:
        keys = RedisKeys(mortal.url, "redis://shown")
        add(keys, A)
        assert keys.poll() == {"aaaaaaaa": A}
        for outage in (mortal.freeze, mortal.kill):
            outage()
            began = time.monotonic()
            for call in (keys.poll, lambda: add(keys, B)):
                with pytest.raises(StoreError, match="redis://shown does not answer") as caught:
                    call()
                assert PASSWORD not in str(caught.value)
            assert time.monotonic() - began < 10
            if outage == mortal.freeze:
                mortal.thaw()
                assert keys.poll() is None  # it has the same keys
        mortal.start()
        with pytest.raises(StoreError, match="holds no keys"):
            keys.poll()
        add(keys, B)
        assert keys.poll() == {"bbbbbbbb": B}
        keys.close()


def test_a_wrong_password_is_told_without_it(server: RedisServer) -> None:
    keys = RedisKeys(f"redis://:wrong-one@127.0.0.1:{server.port}/0", "redis://shown")
    with pytest.raises(StoreError, match="does not answer") as caught:
        keys.poll()
    assert "wrong-one" not in str(caught.value)
    keys.close()


def test_a_host_that_cannot_be_a_name_is_an_outage() -> None:
    keys = RedisKeys(f"redis://{'a' * 300}:1/0", "redis://shown")
    with pytest.raises(StoreError, match="does not answer"):
        keys.poll()
    keys.close()


def test_authorities_that_are_not_there_are_an_outage(server: RedisServer) -> None:
    keys = RedisKeys(f"rediss://127.0.0.1:{server.port}/0?ssl_ca_certs=/nowhere.pem", "rediss://shown")
    with pytest.raises(StoreError, match="rediss://shown does not answer"):
        keys.poll()
    keys.close()


def test_redis_is_reached_over_tls_and_over_a_unix_socket(tmp_path: Path) -> None:
    made, port, socket = certificates.make(tmp_path), free_port(), tmp_path / "s"
    options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--unixsocket", str(socket)]
    options += ["--tls-cert-file", str(made.certificate), "--tls-key-file", str(made.key)]
    options += ["--tls-ca-cert-file", str(made.authority)]
    with RedisServer(tmp_path, *options, password=PASSWORD):
        for url in (
            f"rediss://:{PASSWORD}@127.0.0.1:{port}/0?ssl_ca_certs={made.authority}",
            f"unix://:{PASSWORD}@{socket}?db=0",
        ):
            reached = RedisKeys(url, "shown")
            add(reached, A)
            assert reached.poll() == {"aaaaaaaa": A}
            reached.close()
        unknown = RedisKeys(f"rediss://:{PASSWORD}@127.0.0.1:{port}/0", "shown")
        with pytest.raises(StoreError, match="certificate verify failed"):
            unknown.poll()
        unknown.close()


def test_the_documented_rights_are_enough_and_those_of_a_relay_change_nothing(server: RedisServer) -> None:
    documented = " ".join((module.__doc__ or "").split())
    reading = re.search(r"user of a relay needs (.*?) on `(.*?)`", documented)
    writing = re.search(r"that of `flwr-relay keys` also (.*?)\.", documented)
    assert reading is not None
    assert writing is not None
    rights = [f"+{name.lower()}" for name in re.findall(r"`(\w+)`", reading[1])]
    more = [f"+{name.lower()}" for name in re.findall(r"`(\w+)`", writing[1])]
    with server.client() as client:
        for user, allowed in (("relay", rights), ("keys", rights + more)):
            client.execute_command("ACL", "SETUSER", user, "on", f">{PASSWORD}", f"~{reading[2]}", *allowed)
    relay, writer = (
        RedisKeys(f"redis://{user}:{PASSWORD}@127.0.0.1:{server.port}/0", "shown")
        for user in ("relay", "keys")
    )
    add(writer, A)
    assert relay.poll() == {"aaaaaaaa": A}
    with pytest.raises(StoreError, match="no permissions"):
        add(relay, B)
    assert relay.poll() is None
    relay.close()
    writer.close()
