"""Whatever a node sends, the SuperLink sees one well-formed request that the relay knows of, or nothing.

Each case of the corpus goes to a real relay, alone and behind a real nginx with the shipped configuration, in
front of a SuperLink that notes every byte. The next call, on a fresh connection, must be answered right: it
goes over the connections that the case has left behind.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.certificates import make_pair
from tests.fuzz.test_http_fuzz import read_strictly
from tests.nginx.conftest import launch, nginx  # noqa: F401 - a fixture
from tests.nginx.edge import Certificates
from tests.relay_process import RelayProcess
from tests.security.corpus import BODY, CASES, PULL, SMUGGLED, Case, call, length, push
from tests.security.recorder import ANSWER, IllFormedError, Recorder, Seen, parse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(60)

#: Silence after which a node that got no end of its answer leaves.
QUIET = 0.25
PATIENCE = 10.0
#: No SuperNode of any generation is harmed by these; 404 and 405 are for what is no Fleet call.
HARMLESS = {100, 200, 403, 404, 405, 503}


class Path_(NamedTuple):  # noqa: N801 - not pathlib's
    """A way to the recording SuperLink.

    Attributes:
        port: where nodes connect.
        relay, upstream: what stands behind it.
        behind: whether nginx stands before the relay.
    """

    port: int
    relay: RelayProcess
    upstream: Recorder
    behind: bool

    def accounted(self, since: int) -> list[dict[str, Any]]:
        """Return the calls that the relay has sent to the upstream, as it wrote them down."""
        with self.relay.log.open("rb") as log:
            log.seek(since)
            lines = [json.loads(line) for line in log.read().splitlines() if line.startswith(b"{")]
        calls = [line for line in lines if line.get("logger") == "relay.access"]
        return [line for line in calls if line["source"] == "upstream" or line["outcome"] == "ok"]


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory, upstream: Recorder) -> Iterator[RelayProcess]:
    relay = RelayProcess(
        tmp_path_factory.mktemp("relay"),
        upstream.port,
        workers=1,
        log={"format": "json", "level": "debug"},
        limits={},
    )
    relay.settings["upstream"]["idle_timeout"] = 2
    with relay:
        yield relay


@pytest.fixture(scope="module", params=["relay", "nginx and relay"])
def way(request: pytest.FixtureRequest, relay: RelayProcess, upstream: Recorder) -> Iterator[Path_]:
    if request.param == "relay":
        yield Path_(relay.port, relay, upstream, behind=False)
        return
    folder: Path = request.getfixturevalue("tmp_path_factory").mktemp("edge")
    pair = Certificates(*make_pair(folder))
    edge = launch(request.getfixturevalue("nginx"), pair, folder, (relay.port,), workers=1)
    try:
        yield Path_(edge.port, relay, upstream, behind=True)
    finally:
        edge.stop()


def exchange(port: int, case: Case) -> tuple[bytes, str]:
    """Send the bytes of a case; return what came back, and how it ended: `closed`, `reset` or `quiet`.

    Silence counts once there are as many answers as there should be.
    """
    got = b""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as node:
        node.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for start, end in zip((0, *case.pieces), (*case.pieces, len(case.data)), strict=True):
                node.sendall(case.data[start:end])
                time.sleep(0.02 if case.pieces else 0)
            node.settimeout(PATIENCE if case.passes else QUIET)
            while piece := node.recv(65536):
                got += piece
                if got.count(b"HTTP/1.1 200 ") >= case.passes:
                    node.settimeout(QUIET)
        except TimeoutError:
            # So that nobody waits for the rest of what is no whole request.
            node.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return got, "quiet"
        except ConnectionError:
            return got, "reset"
        return got, "closed"


def good_call(way: Path_, marker: bytes) -> None:
    """Check that a sound call on a connection of its own is answered with what the SuperLink says to it."""
    body = push(marker)
    got, _ = exchange(way.port, Case("", call(length(body), b"Connection: close", body=body), passes=1))
    (answer,) = read_strictly(got, "closed")
    assert (answer.status, answer.body) == (200, b"\x08\x01")
    assert way.upstream.seen[-1].body == body


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_superlink_sees_one_sound_request_or_nothing(way: Path_, case: Case) -> None:
    upstream = way.upstream
    before, log = len(upstream.seen), way.relay.log.stat().st_size
    got, ending = exchange(way.port, case)
    # Asked behind the case, and written down behind it.
    marker = os.urandom(8)
    good_call(way, marker)
    *seen, last = upstream.seen[before:]
    assert last.body == push(marker)

    assert upstream.wrong == []
    if way.behind:
        assert len(seen) <= case.edge
    else:
        assert len(seen) == case.passes
        assert not any(one.method == "unregister-node" for one in seen)
        assert not any(b"x-injected" in one.headers for one in seen)
    accounted: list[dict[str, Any]] = []
    end = time.monotonic() + PATIENCE
    while len(accounted) < len(seen) + 1 and time.monotonic() < end:
        accounted = way.accounted(log)
        time.sleep(0.005)
    assert [(line["request_id"], line["bytes_in"]) for line in accounted] == [
        (one.request_id, len(one.body)) for one in (*seen, last)
    ]

    if not case.framed:
        assert got.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405", b"Not Found")) or not got
        return
    statuses = [answer.status for answer in read_strictly(got, "reset" if ending == "quiet" else ending)]
    assert set(statuses) <= HARMLESS
    assert statuses.count(200) <= max(len(seen), way.behind)


def test_the_corpus_is_large_and_has_both_kinds() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 200
    assert sum(case.passes > 0 for case in CASES) >= 30
    assert SMUGGLED.startswith(b"POST /v1/fleet/unregister-node")


# -- the recorder itself --------------------------------------------------------------------------------

_HEAD = b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: 127.0.0.1:1\r\n"


@pytest.mark.parametrize(
    "data",
    [
        _HEAD + b"content-length: 3\r\n\r\nabc",
        _HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ],
)
def test_the_recorder_reads_a_sound_request_and_no_part_of_one(data: bytes) -> None:
    assert parse(data) == (Seen("push-object", parse(data)[0].headers, b"abc"), len(data))  # type: ignore[index]
    assert all(parse(data[:size]) is None for size in range(len(data)))


@pytest.mark.parametrize(
    "data",
    [
        _HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
        _HEAD + b"content-length: 3\r\ncontent-length: 3\r\n\r\nabc",
        _HEAD + b"content-length: +3\r\n\r\nabc",
        _HEAD + b"\r\n",
        _HEAD + b"x: a\rb\r\ncontent-length: 0\r\n\r\n",
        _HEAD + b"x: a\r\n b\r\ncontent-length: 0\r\n\r\n",
        _HEAD + b"x: \x00\r\ncontent-length: 0\r\n\r\n",
        _HEAD.replace(b"\r\n", b"\n") + b"content-length: 0\n\n",
        _HEAD.replace(b"fleet", b"control") + b"content-length: 0\r\n\r\n",
        _HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        _HEAD + b"transfer-encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\n\r\n",
        _HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
        _HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\nX: y\r\n\r\n",
        SMUGGLED,
    ],
)
def test_the_recorder_forgives_nothing(data: bytes) -> None:
    with pytest.raises(IllFormedError):
        parse(data)


def test_the_recorder_notes_what_comes_behind_a_request() -> None:
    sound = _HEAD + b"content-length: 0\r\n\r\n"
    with Recorder() as recorder, socket.create_connection(("127.0.0.1", recorder.port)) as node:
        node.sendall(sound)
        assert node.recv(1000) == ANSWER
        node.sendall(sound + b"x")
        assert node.recv(1000) == b""
        assert len(recorder.seen) == 1
        assert re.match("bytes behind a request", recorder.wrong[0])


def test_the_bodies_are_what_nodes_send() -> None:
    assert len(BODY) > 90
    assert len(PULL) == 13
