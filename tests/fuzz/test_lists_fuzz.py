"""Whatever the command line is asked for, and whatever people write: a list holds what it held.

A walk begins with what somebody wrote by hand, and goes on with commands. After each the file is read as the
workers read it. Either the command was refused and not a byte has changed, or exactly the line in question
has come or gone.
"""

from __future__ import annotations

import io
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.commands import nodes
from relay.commands.common import INVALID
from relay.commands.listed import NOT_FOUND
from relay.credentials import allowed_keys
from relay.credentials.node_keys import read_key
from relay.settings import NodeKeys, Quarantine, Settings
from relay.stores import lists, quarantine_list
from tests.signing import Node

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

#: All that some tool takes for the end of a line, and other characters that mean something to somebody.
SPECIAL = [*"\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", *"\x00\x1b\x7f \t#%/:=,\"'\\", "\udcff", "\ufeff", "é"]
TEXTS = st.text(st.sampled_from([*SPECIAL, "a", "b"]) | st.characters(), max_size=8)
#: Of these several commands will speak.
NAMES = st.sampled_from(["17", "018", "site-a", "north/site b", "identity:17"]) | TEXTS

walks = settings(max_examples=150, deadline=None, derandomize=True)


def run(chosen: Settings, command: Callable[[], None]) -> int:
    """Run a command with these settings; return its exit code."""
    with (
        patch.object(nodes, "read_settings", lambda _: chosen),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        try:
            command()
        except typer.Exit as end:
            return end.exit_code
    return 0


def lines(path: Path) -> list[bytes]:
    """Return the lines of a file, the last of which may lack its end."""
    data = path.read_bytes() if path.exists() else b""
    return data.removesuffix(b"\n").split(b"\n") if data else []


def by_hand(texts: list[str]) -> bytes:
    """Return some lines without an entry, or with one, as people and editors on any system write them."""
    return "\n".join(text.replace("\n", " ") for text in texts).encode("utf-8", "replace")


# -- quarantine -----------------------------------------------------------------------------------------

WHO = st.one_of(
    NAMES.map(lambda name: f"identity:{name}"),
    NAMES,
    st.integers(0, 1 << 65).map(str),
    st.binary(min_size=32, max_size=32).map(allowed_keys.fingerprint),
)
COMMENTS = TEXTS.map(lambda text: f"#{text}")
WRITTEN = st.lists(
    COMMENTS
    | st.sampled_from(["", "  ", "\r", "node 17", "node 19\r", "identity site%20c 2026-11-23 why"])
    | TEXTS.map(lambda text: f"node 20 {text}"),
    max_size=4,
)


@walks
@given(written=WRITTEN, ended=st.booleans(), asked=st.lists(st.tuples(st.booleans(), WHO, TEXTS), max_size=6))
@example(written=["node 1 a\u2028b", "node 17"], ended=True, asked=[(False, "17", "")])
@example(written=[], ended=True, asked=[(True, "444", "a\u2028b"), (True, "5", ""), (False, "5", "")])
def test_the_quarantine_is_what_was_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
    written: list[str],
    ended: bool,
    asked: list[tuple[bool, str, str]],
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "quarantine"
    if written:
        path.write_bytes(by_hand(written) + b"\n" * ended)
    chosen = Settings.model_construct(quarantine=Quarantine.model_construct(file=path))
    for adding, who, reason in asked:
        before, entries = lines(path), _entries(path)
        bytes_before = path.read_bytes() if path.exists() else b""
        if adding:
            code = run(chosen, lambda who=who, reason=reason: nodes.quarantine(who, None, reason))  # type: ignore[misc]
        else:
            code = run(chosen, lambda who=who: nodes.release(who, None))  # type: ignore[misc]
        after = lines(path)
        assert code == _expected(who, entries, adding=adding)
        if code:
            assert (path.read_bytes() if path.exists() else b"") == bytes_before
            continue
        target = quarantine_list.target(who)[:2]
        if adding:
            assert target not in [entry[:2] for entry in entries]
            assert after[:-1] == before
            assert after[-1].decode().isprintable()
            (*same, entry) = _entries(path)
            assert (same, entry[:2]) == (entries, target)
            shown = "".join(c if c.isprintable() else " " for c in reason).strip()
            assert (entry.since[:2], entry.reason) == ("20", shown)
        else:
            assert target in [entry[:2] for entry in entries]
            assert _entries(path) == [entry for entry in entries if entry[:2] != target]
            gone = len(entries) - len(_entries(path))
            assert len(before) - gone == len(after)
            assert not Counter(after) - Counter(before)


def _expected(who: str, entries: list[quarantine_list.Entry], *, adding: bool) -> int:
    """Return how a command must end, given what stood in the list."""
    try:
        target = quarantine_list.target(who)
    except ValueError:
        return INVALID
    return 0 if adding != (target[:2] in [entry[:2] for entry in entries]) else NOT_FOUND


def _entries(path: Path) -> list[quarantine_list.Entry]:
    try:
        return list(quarantine_list.parse(lists.read(path)).entries)
    except FileNotFoundError:
        return []


# -- keys -----------------------------------------------------------------------------------------------

KEYS = [Node().ssh for _ in range(4)]
FINGERPRINTS = [read_key(key.encode())[0].fingerprint for key in KEYS]
ALLOWING = st.tuples(
    st.just("allow"),
    st.integers(0, 3),
    st.none() | NAMES,
    st.binary(max_size=8) | TEXTS.map(lambda text: text.encode("utf-8", "replace")),
    st.just("") | NAMES,
    st.lists(st.sampled_from(["room=1", "a=b"]) | TEXTS | TEXTS.map(lambda text: f"a={text}"), max_size=2),
)
TAKING = st.tuples(st.just("disallow"), NAMES | st.sampled_from(FINGERPRINTS))


@walks
@given(written=st.lists(COMMENTS, max_size=3), asked=st.lists(ALLOWING | TAKING, max_size=6))
@example(
    written=["# by\u2028hand"],
    asked=[("allow", 0, "a", b"", "", []), ("allow", 1, "b", b"", "", []), ("disallow", "a")],
)
def test_the_allowed_keys_are_what_was_asked_for(
    tmp_path_factory: pytest.TempPathFactory, written: list[str], asked: list[tuple[Any, ...]]
) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    path, public = directory / "allowed", directory / "key.pub"
    path.write_bytes(by_hand([*written, f"{KEYS[3]} the first"]))
    chosen = Settings.model_construct(node_keys=NodeKeys.model_construct(allow=path))
    for what, *words in asked:
        before, bytes_before = allowed_keys.numbered(lists.read(path)), path.read_bytes()
        if what == "allow":
            number, name, comment, tenant, labels = words
            public.write_bytes(KEYS[number].encode() + b" " + comment)
            code = run(
                chosen,
                lambda name=name, tenant=tenant, labels=labels: nodes.allow(  # type: ignore[misc]
                    public, config=None, name=name, tenant=tenant, label=labels
                ),
            )
        else:
            code = run(chosen, lambda words=words: nodes.disallow(words[0], None))  # type: ignore[misc]
        if code:
            assert path.read_bytes() == bytes_before
            assert not _must_be_done(what, words, [key for _, key in before])
            continue
        known = allowed_keys.parse(lists.read(path))
        keys = [key for _, key in before]
        if what == "allow":
            assert path.read_bytes().startswith(bytes_before)
            assert path.read_bytes()[len(bytes_before) :].strip(b"\n").decode().isprintable()
            (*same, added) = known.values()
            assert same == keys
            assert added.fingerprint == FINGERPRINTS[number] not in [key.fingerprint for key in keys]
            assert name in (None, "", added.name)
            assert (added.tenant, [f"{key}={text}" for key, text in added.labels]) == (tenant, labels)
        else:
            (gone,) = (key for key in keys if words[0] in (key.fingerprint, key.name))
            assert list(known.values()) == [key for key in keys if key != gone]
            assert [key for key in bytes_before.split(b"\n") if key.startswith(b"#")] == [
                key for key in path.read_bytes().split(b"\n") if key.startswith(b"#")
            ]


def _must_be_done(what: str, words: list[Any], keys: list[allowed_keys.AllowedKey]) -> bool:
    """Return whether there is no reason at all to refuse this."""
    if what == "disallow":
        named = [key for key in keys if words[0] in (key.fingerprint, key.name)]
        return len(named) == 1 and len(keys) > 1
    number, name, _, tenant, labels = words
    plain = name is not None and name.isascii() and name.isalnum()
    there = FINGERPRINTS[number] in [key.fingerprint for key in keys]
    return plain and not there and not tenant and labels in ([], ["room=1"], ["a=b"], ["room=1", "a=b"])
