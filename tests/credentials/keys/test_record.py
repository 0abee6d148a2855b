"""A record is written and read without loss; what cannot be is refused with what would be right."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.credentials.keys.record import (
    _FIRST,
    _LAST,
    LONGEST_LABEL,
    MOST_LABELS,
    KeyRecord,
    RecordError,
    from_json,
    hashed,
    pepper_name,
    show_time,
)

DIGEST = bytes(range(32))
RECORD = KeyRecord("3fGhQ0zL", "hospital-a", DIGEST, 1_767_225_600)

relaxed = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # on a busy machine
names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
times = st.integers(_FIRST, _LAST)
printable = st.text(max_size=LONGEST_LABEL).filter(str.isprintable)
records = st.builds(
    KeyRecord,
    id=st.from_regex(r"\A[0-9A-Za-z]{8}\Z"),
    name=names,
    digest=st.binary(min_size=32, max_size=32),
    created=times,
    tenant=st.just("") | names,
    labels=st.dictionaries(names, printable, max_size=4).map(lambda labels: tuple(sorted(labels.items()))),
    pepper=st.just("") | st.from_regex(r"\A[0-9a-f]{8}\Z"),
    not_before=st.none() | times,
    expires=st.none() | times,
    revoked=st.none() | times,
)


@relaxed
@given(records)
def test_a_record_is_read_as_it_was_written(record: KeyRecord) -> None:
    line = record.to_json()
    assert "\n" not in line
    assert from_json(line.encode()) == record


@relaxed
@given(st.binary(max_size=300))
def test_bytes_that_are_no_record_are_refused_and_nothing_else_happens(line: bytes) -> None:
    with pytest.raises(RecordError):
        from_json(line)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@relaxed
@given(
    st.sampled_from(["id", "name", "tenant", "labels", "hash", "created", "expires", "revoked"]), json_values
)
def test_a_field_of_any_kind_is_read_or_refused(field: str, value: object) -> None:
    fields = {**json.loads(RECORD.to_json()), field: value}
    try:
        record = from_json(json.dumps(fields).encode())
    except RecordError:
        return
    assert from_json(record.to_json().encode()) == record


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(RECORD.to_json()), **fields}).encode()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
        (b"\xff\xfe", "no JSON object"),
        (RECORD.to_json().encode()[:-5], "cut off"),
        (b"[]", "must be a JSON object"),
        (changed(expire="2026-01-01T00:00:00Z"), "unknown field 'expire'"),
        (changed(expires="2026-01-01T00:00:00Z")[:-1] + b', "expires": null}', "has a field twice"),
        (changed(labels={"a": "b"}).replace(b'"a": "b"', b'"a": "b", "a": "c"'), "has a field twice"),
        (b"{}", "no field 'id'"),
        (changed(id="short"), "8 letters and digits"),
        (changed(id=12345678), "8 letters and digits"),
        (changed(name=""), "the name ''"),
        (changed(name="a:b"), "1 to 63 letters"),
        (changed(name="a" * 64), "1 to 63 letters"),
        (changed(tenant="a b"), "the tenant 'a b'"),
        (changed(tenant=None), "the tenant 'None'"),
        (changed(labels=[]), "labels must map"),
        (changed(labels={"site": 1}), "labels must map"),
        (changed(labels={"site": "a\nb"}), "labels must map"),
        (changed(labels={"site": "a" * (LONGEST_LABEL + 1)}), "labels must map"),
        (changed(labels={str(n): "" for n in range(MOST_LABELS + 1)}), "labels must map"),
        (changed(labels={"": "a"}), "the label ''"),
        (changed(hash="sha256:" + "0" * 63), "has a hash"),
        (changed(hash="md5:" + "0" * 64), "has a hash"),
        (changed(hash="sha256:" + "0" * 64 + "\n"), "has a hash"),
        (changed(created=None), "created = 'None'"),
        (changed(created=1_767_225_600), "write a time such as 2026-03-01T08:00:00Z"),
        (changed(expires="2026-01-01T00:00:00"), "expires = '2026-01-01T00:00:00'"),
        (changed(expires="tomorrow"), "expires = 'tomorrow'"),
        (changed(revoked="0001-01-01T00:00:00+14:00"), "revoked = "),
    ],
)
def test_what_is_wrong_is_named(line: bytes, fault: str) -> None:
    with pytest.raises(RecordError) as caught:
        from_json(line)
    assert fault in str(caught.value)


def test_a_fault_does_not_repeat_a_hash() -> None:
    with pytest.raises(RecordError) as caught:
        from_json(changed(hash="sha512:" + "ab" * 32))
    assert "abab" not in str(caught.value)


def test_times_of_other_zones_are_the_same_times() -> None:
    assert from_json(changed(expires="2026-01-01T02:00:00+02:00")).expires == 1_767_225_600
    assert show_time(1_767_225_600) == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("fields", "now", "state"),
    [
        ({}, 0, "valid"),
        ({"expires": 100}, 99.9, "valid"),
        ({"expires": 100}, 100, "expired"),
        ({"not_before": 100}, 99.9, "not_yet_valid"),
        ({"not_before": 100}, 100, "valid"),
        ({"revoked": 100}, 50, "revoked"),
        ({"revoked": 100, "expires": 10}, 50, "revoked"),
        ({"not_before": 100, "expires": 50}, 60, "expired"),
    ],
)
def test_the_state_of_a_key(fields: dict[str, int], now: float, state: str) -> None:
    assert RECORD._replace(**fields).state(now) == state  # type: ignore[arg-type]


def test_what_may_be_shown_of_a_key_holds_nothing_of_its_secret() -> None:
    record = RECORD._replace(tenant="north", labels=(("site", "a"),), expires=1_767_225_601)
    assert record.public() == {
        "id": "3fGhQ0zL",
        "name": "hospital-a",
        "tenant": "north",
        "labels": {"site": "a"},
        "created": "2026-01-01T00:00:00Z",
        "expires": "2026-01-01T00:00:01Z",
    }


def test_a_secret_is_kept_as_its_hash_with_the_pepper_if_there_is_one() -> None:
    assert hashed(b"secret", b"") == hashlib.sha256(b"secret").digest()
    assert hashed(b"secret", b"pepper") == hmac.new(b"pepper", b"secret", "sha256").digest()


def test_a_pepper_has_a_name_that_does_not_tell_it() -> None:
    assert pepper_name(b"") == ""
    assert len(pepper_name(b"pepper")) == 8
    assert pepper_name(b"pepper") != pepper_name(b"Pepper")
