"""What is known of nodes: values come back as they were, all workers see them, and nobody can forge them."""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.call import Wire
from relay.fleet import Method
from relay.stores import nodes as nodes_module
from relay.stores.nodes import LIMITS, STRANGER_SECONDS, Facts, NodeRecord, Nodes, Refused, wall_clock
from relay.stores.records import BusyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.stores.records import Kept

PULL = Method.PULL_MESSAGES
ID = (1 << 64) - 3


@pytest.fixture
def nodes() -> Nodes:
    return Nodes(64)


def known(nodes: Nodes, node_id: int = ID) -> NodeRecord:
    record = nodes.get(node_id)
    assert record is not None
    return record


def facts(**values: object) -> Facts:
    values = {"version": "1.42", "peer": "::1", "identity": "b", "accepted": True, "skew": 0.0, **values}
    return Facts(Wire.HTTP_V1, **values)  # type: ignore[arg-type]


TEXTS = st.text(max_size=80)
TIMES = st.floats(0, 1e9)
COUNTS = st.integers(0, (1 << 64) - 1)
FACTS = st.builds(
    Facts,
    st.sampled_from(Wire),
    version=TEXTS,
    peer=TEXTS,
    identity=TEXTS,
    tenant=TEXTS,
    key=st.binary(min_size=32, max_size=32),
    skew=st.floats(width=32, allow_nan=False),
    accepted=st.booleans(),
)
RECORDS = st.builds(
    NodeRecord,
    COUNTS,
    TIMES,
    TIMES,
    st.none() | st.sampled_from(Method),
    COUNTS,
    COUNTS,
    st.none() | st.builds(Refused, TEXTS, st.sampled_from(Method), TIMES),
    st.none() | FACTS,
)


def cut(text: str, most: int) -> str:
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


@given(RECORDS)
def test_a_record_reads_as_it_was_written_but_for_what_is_too_long(record: NodeRecord) -> None:
    data = record.pack()
    assert len(data) <= nodes_module._SIZE
    if record.facts:
        for name in ("version", "peer", "identity", "tenant"):
            setattr(record.facts, name, cut(getattr(record.facts, name), LIMITS[name]))
    if record.refused:
        record.refused.why = cut(record.refused.why, LIMITS["refusal"])
    assert NodeRecord.unpack(data) == record


def test_the_longest_record_fits_and_no_record_of_one_text_can_be_longer() -> None:
    longest = "\U0001f33b" * 80
    whole = Facts(Wire.HTTP_V1, longest, longest, longest, longest)
    record = NodeRecord(ID, 1.0, 1.0, PULL, refused=Refused(longest, PULL, 1.0), facts=whole)
    nodes = Nodes(8)
    assert nodes.note(ID, PULL, 1.0, facts=whole, refused=record.refused)
    assert len(record.pack()) <= nodes_module._SIZE < len(record.pack()) + 20


def test_a_text_is_cut_between_characters() -> None:
    record = NodeRecord(ID, 1.0, 1.0, facts=facts(identity="\u20ac" * 40, version="a\u20ac" * 20))
    read = NodeRecord.unpack(record.pack()).facts
    assert read is not None
    assert (read.identity, read.version) == ("\u20ac" * 21, "a\u20ac" * 8)


def test_a_note_that_comes_late_does_not_set_a_node_back(nodes: Nodes) -> None:
    """A worker that gathers calls may write them down after another one."""
    nodes.note(ID, PULL, 13.0, facts=facts())
    nodes.note(ID, Method.GET_RUN, 12.0, facts=facts(), refusals=1, refused=Refused("x", PULL, 12.0))
    record = known(nodes)
    assert (record.last, record.method, record.calls) == (13.0, PULL, 2)


def test_calls_add_up_and_the_last_one_counts(nodes: Nodes) -> None:
    nodes.note(ID, PULL, 10.0, facts=facts())
    nodes.note(ID, Method.GET_RUN, 13.0, calls=3)
    nodes.note(ID, PULL, 12.0, calls=2)
    record = known(nodes)
    assert (record.first, record.last, record.method, record.calls) == (10.0, 13.0, Method.GET_RUN, 6)
    assert record.facts == facts()
    assert record.refused is None
    refused = Refused("unauthenticated:clock", PULL, 14.0)
    nodes.note(ID, PULL, 14.0, refusals=1, refused=refused)
    nodes.note(ID, PULL, 15.0)
    record = known(nodes)
    assert (record.refusals, record.refused, record.calls, record.last) == (1, refused, 8, 15.0)
    assert nodes.get(1) is None
    assert [record.node_id for record in nodes.all()] == [ID]


def test_a_stranger_cannot_change_what_is_shown_of_a_node(nodes: Nodes) -> None:
    nodes.note(ID, PULL, 1.0, facts=facts(skew=0.5))
    forged = facts(accepted=False, peer="203.0.113.66", identity="evil", version="6.6", skew=1e9)
    nodes.note(ID, PULL, 2.0, facts=forged, refusals=1, refused=Refused("upstream_401", PULL, 2.0))
    assert known(nodes).facts == facts(skew=0.5)
    assert known(nodes).refusals == 1


def test_before_a_call_was_accepted_what_was_said_last_is_shown(nodes: Nodes) -> None:
    nodes.note(ID, PULL, 1.0, facts=facts(accepted=False, version="1"))
    nodes.note(ID, PULL, 2.0, facts=facts(accepted=False, version="2"))
    assert known(nodes).facts == facts(accepted=False, version="2")
    nodes.note(ID, PULL, 3.0, facts=facts(version="3", skew=0.25))
    assert known(nodes).facts == facts(version="3", skew=0.25)


def test_the_clock_skew_is_smoothed_unless_the_clock_was_set(nodes: Nodes) -> None:
    for at, skew, shown in ((1, 1.0, 1.0), (2, 2.0, 1.2), (3, -2.0, 0.56), (4, 60.0, 60.0), (5, 59.0, 59.8)):
        nodes.note(ID, PULL, float(at), facts=facts(skew=skew))
        record = known(nodes)
        assert record.facts is not None
        assert record.facts.skew == pytest.approx(shown, abs=1e-5)
    nodes.note(ID, PULL, 6.0, facts=facts(skew=math.nan))
    nodes.note(ID, PULL, 7.0, facts=facts(skew=3.0))
    record = known(nodes)
    assert record.facts is not None
    assert record.facts.skew == 3.0


def test_a_caller_without_an_id_is_known_by_its_key(nodes: Nodes) -> None:
    refused = Refused("unauthenticated:not_allowed", Method.REGISTER_NODE, 1.0)
    for key in (b"a" * 32, b"b" * 32, b"a" * 32):
        nodes.note(0, Method.REGISTER_NODE, 1.0, refused=refused, refusals=1, facts=facts(key=key))
    assert sorted((r.node_id, r.calls, r.facts and r.facts.key) for r in nodes.all()) == [
        (0, 1, b"b" * 32),
        (0, 2, b"a" * 32),
    ]
    assert nodes.get(0) is None


def test_strangers_and_nodes_that_left_are_not_kept_for_long(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[float] = []

    def update(_: bytes, change: Callable[[bytes | None], Kept | None]) -> None:
        made = change(NodeRecord(ID, 0.0, 0.0, facts=old).pack() if old else None)
        assert made is not None
        kept.append(made.seconds)

    monkeypatch.setattr(nodes._records, "update", update)
    old = None
    nodes.note(ID, PULL, 1.0, facts=facts(accepted=False), keep=5000.0)
    nodes.note(ID, PULL, 1.0, facts=facts(), keep=5000.0)
    nodes.note(ID, PULL, 1.0, keep=5000.0)
    nodes.note(ID, Method.UNREGISTER_NODE, 1.0, facts=facts(), leaves=True, keep=5000.0)
    nodes.note(0, PULL, 1.0, facts=facts(), keep=5000.0)
    old = facts()
    nodes.note(ID, PULL, 1.0, keep=5000.0)
    nodes.note(ID, PULL, 1.0, keep=5.0)
    nodes.note(ID, Method.UNREGISTER_NODE, 1.0, leaves=True, keep=5000.0)
    old = facts(accepted=False)
    nodes.note(ID, PULL, 1.0, keep=5000.0)
    stranger = STRANGER_SECONDS
    assert kept == [stranger, 5000.0, stranger, stranger, stranger, 5000.0, 5.0, stranger, stranger]


def test_a_flood_of_strangers_drives_no_node_out() -> None:
    nodes = Nodes(64)
    for number in range(1, 9):
        nodes.note(number, PULL, 1.0, facts=facts())
    for number in range(1000, 3000):
        nodes.note(number, PULL, 1.0, facts=facts(accepted=False))
    assert all(nodes.get(number) for number in range(1, 9))


def test_all_processes_see_all_nodes() -> None:
    nodes = Nodes(1024)
    pids = []
    for worker in range(2):
        pid = os.fork()
        if pid == 0:
            for number in range(1, 101):
                nodes.note(1000 * worker + number, PULL, 1.0, facts=facts())
                while not nodes.note(5, PULL, 2.0):
                    pass
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    assert {record.node_id for record in nodes.all()} == {*range(1, 101), *range(1001, 1101)}
    assert known(nodes, 5).calls == 201


def test_a_note_that_finds_a_lock_waits_for_nothing(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise BusyError

    assert nodes.note(ID, PULL, 1.0)
    monkeypatch.setattr(nodes._records, "update", busy)
    assert not nodes.note(ID, PULL, 1.0)


def test_a_moment_of_this_host_is_shown_as_a_time_of_day() -> None:
    assert wall_clock(time.monotonic() - 60) == pytest.approx(time.time() - 60, abs=1)
