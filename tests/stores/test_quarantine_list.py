"""Who is in quarantine is read as it was written, and every mistake is named with its line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.call import Identity
from relay.stores.lists import ListError
from relay.stores.quarantine_list import Entry, line, parse, target

KEY = "SHA256:" + "aB3/+" * 8 + "xyz"


def test_everybody_is_found_by_what_is_known_of_him() -> None:
    listed = parse(
        "# who\n"
        f"node 17 2026-11-23T12:00:00+00:00 broken data\nnode 018 since\nkey {KEY}\n"
        "identity north/site%20b why not\nidentity site-c\n"
    )
    assert listed.find(node_id=17) == Entry("node", "17", "2026-11-23T12:00:00+00:00", "broken data")
    assert listed.find(node_id=18) == Entry("node", "18", "", "since")
    assert listed.find(fingerprint=KEY) == Entry("key", KEY)
    assert listed.find(identity=Identity("site b", "north")) == Entry(
        "identity", "north/site b", "", "why not"
    )
    assert listed.find(identity=Identity("site-c")) is not None
    for other in (
        listed.find(node_id=19),
        listed.find(node_id=0),
        listed.find(),
        listed.find(fingerprint="SHA256:x"),
        listed.find(identity=Identity("site b")),
        listed.find(identity=Identity("site-c", "north")),
    ):
        assert other is None


def test_nobody_is_a_list_too() -> None:
    assert parse("").entries == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("person 17", "line 1: must be node, key or identity and a value"),
        ("node", "line 1: must be node, key or identity and a value"),
        ("node x", "line 1: must have a node id"),
        ("node -1", "line 1: must have a node id"),
        (f"node {1 << 64}", "line 1: must have a node id"),
        (f"node {'9' * 5000}", "line 1: must have a node id"),
        ("node \u0661", "line 1: must have a node id"),
        ("key abc", "line 1: must have a fingerprint"),
        ("identity a%00b", "line 1: must have a name"),
        (f"identity {'n' * 257}", "line 1: must have a name"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(ListError, match=problem):
        parse(text)


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("17", Entry("node", "17")),
        (str((1 << 64) - 1), Entry("node", str((1 << 64) - 1))),
        (KEY, Entry("key", KEY)),
        ("site-b", Entry("identity", "site-b")),
        ("north/site b", Entry("identity", "north/site b")),
        ("identity:17", Entry("identity", "17")),
        ("node:17", Entry("node", "17")),
        (f"key:{KEY}", Entry("key", KEY)),
        ("CN=site:b", Entry("identity", "CN=site:b")),
    ],
)
def test_a_target_is_known_by_its_form_or_by_its_kind(text: str, entry: Entry) -> None:
    assert target(text) == entry


@pytest.mark.parametrize("text", ["", "node:x", "key:17", "identity:", "\x07", "site-\udcff"])
def test_a_target_that_is_nobody_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must have"):
        target(text)


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=200)


@given(
    who=st.one_of(
        st.integers(0, (1 << 64) - 1).map(lambda number: Entry("node", str(number))),
        NAMES.map(lambda name: Entry("identity", name)),
        st.just(Entry("key", KEY)),
    ),
    since=st.just("") | st.datetimes().map(lambda at: at.isoformat(timespec="seconds")),
    reason=st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
)
def test_a_line_reads_as_it_was_written(who: Entry, since: str, reason: str) -> None:
    text = line(who._replace(since=since, reason=reason))
    assert text.isprintable(), "nothing in it ends a line for anybody"
    (read,) = parse(f"# x\n{text}\n").entries
    assert read[:2] == who[:2]
    if since:
        assert read.since == since
    if since and reason.isprintable():
        assert read.reason == reason.strip()


@given(st.text())
def test_whatever_stands_in_a_list_is_read_or_refused(text: str) -> None:
    for garbage in (text, f"node {text}", f"key {text}", f"identity {text}"):
        try:
            parse(garbage)
        except ListError:
            continue
