"""A key lets its name in by each header that can carry it; a wrong one is refused, an outage refuses none."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.call import Call, Identity, Metadata
from relay.credentials.api_key import ApiKey
from relay.credentials.keys.key import Key, generate
from relay.credentials.keys.record import KeyRecord, hashed, pepper_name
from relay.credentials.keys.table import KeyTable
from relay.fleet import Method
from relay.refusal import Reason, Refusal
from tests.credentials.keys.test_table import DOWN, Store

MakeCall = Callable[..., Call]

#: On a busy machine everything is slow.
IGNORED = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)
NOW = 1_000_000
PEPPER = b"pepper" * 4
KEY, OTHER, PEPPERED = generate(), generate(), generate()
WHO = Identity("node-a", "north", (("site", "a"),), ("api_key",))


def record(key: Key, name: str = "node-a", pepper: bytes = b"", **more: Any) -> KeyRecord:
    digest = hashed(key.secret, pepper)
    return KeyRecord(key.id.decode(), name, digest, 1, "north", (("site", "a"),), pepper_name(pepper), **more)


async def credential(*records: KeyRecord) -> ApiKey:
    table = KeyTable(Store({record.id: record for record in records}), pepper=PEPPER)
    await table.refresh()
    return ApiKey(table, lambda: NOW)


def basic(user: str, key: object) -> bytes:
    return b"Basic " + base64.b64encode(f"{user}:{key}".encode())


def bearer(key: object) -> bytes:
    return f"Bearer {key}".encode()


@dataclass
class Shown:
    """A way to present a key: its name, and the headers for it."""

    name: str
    headers: Callable[[Key], Metadata]

    def __str__(self) -> str:
        return self.name


WAYS = [
    Shown("basic", lambda key: [(b"Authorization", basic("node-a", key))]),
    Shown("basic without a name", lambda key: [(b"Authorization", basic("", key))]),
    Shown("bearer", lambda key: [(b"Authorization", bearer(key))]),
    Shown("x-api-key", lambda key: [(b"X-API-Key", str(key).encode())]),
    Shown("other cases", lambda key: [(b"AUTHORIZATION", b"bEARER  " + str(key).encode() + b" ")]),
    Shown("all", lambda key: [
        (b"x-api-key", str(key).encode()),
        (b"authorization", bearer(key)),
        (b"authorization", basic("node-a", key)),
        (b"authorization", basic("", key)),
    ]),
    Shown("beside another scheme", lambda key: [
        (b"authorization", b"Negotiate YII="),
        (b"x-api-key", str(key).encode()),
    ]),
]  # fmt: skip
every_way = pytest.mark.parametrize("way", WAYS, ids=str)


async def check(make_call: MakeCall, credential: ApiKey, headers: Metadata) -> Identity | Refusal | None:
    more = [(b"accept", b"*/*"), (b"flwr-version", b"1.42.0"), (b"x-something", b"else")]
    call = make_call(Method.PULL_MESSAGES, metadata=[*more, *headers, *more])
    try:
        return await credential.check(call)
    except Refusal as refusal:
        return refusal


def is_refused(outcome: object, cause: str, *secrets: Key) -> bool:
    """Whether the outcome is this refusal, and tells nothing of the secrets."""
    assert isinstance(outcome, Refusal), outcome
    assert (outcome.reason, outcome.cause) == (Reason.UNAUTHENTICATED, cause), outcome
    assert not outcome.sent
    assert outcome.by == "api_key"
    for key in secrets:
        pieces = [key.secret[at : at + 6].decode() for at in range(len(key.secret) - 5)]
        assert not any(piece in str(outcome) for piece in pieces)
    return True


@every_way
async def test_a_right_key_is_known_however_it_is_presented(make_call: MakeCall, way: Shown) -> None:
    known = await credential(record(KEY), record(PEPPERED, pepper=PEPPER))
    assert await check(make_call, known, way.headers(KEY)) == WHO
    assert await check(make_call, known, way.headers(PEPPERED)) == WHO


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Negotiate YII=")],
        [(b"authorization", b"Digest username=x")],
        [(b"accept-ran", b"x"), (b"x-api-kex", b"x")],
    ],
)
async def test_a_call_without_a_key_shows_none(make_call: MakeCall, headers: Metadata) -> None:
    assert await check(make_call, await credential(record(KEY)), headers) is None


async def test_a_call_without_a_key_needs_no_store(make_call: MakeCall) -> None:
    assert await check(make_call, ApiKey(KeyTable(Store(DOWN))), []) is None


@every_way
async def test_an_outage_defers_a_call_and_refuses_it_not(make_call: MakeCall, way: Shown) -> None:
    outcome = await check(make_call, ApiKey(KeyTable(Store(DOWN))), way.headers(KEY))
    assert isinstance(outcome, Refusal)
    assert (outcome.reason, outcome.cause) == (Reason.UPSTREAM_DOWN, "keys_unavailable")


@every_way
async def test_a_key_that_nobody_made_is_unknown(make_call: MakeCall, way: Shown) -> None:
    outcome = await check(make_call, await credential(record(KEY)), way.headers(OTHER))
    assert is_refused(outcome, "unknown_key", OTHER)


@every_way
async def test_a_known_id_with_another_secret_is_unknown(make_call: MakeCall, way: Shown) -> None:
    stolen = record(OTHER)._replace(id=KEY.id.decode())
    outcome = await check(make_call, await credential(stolen), way.headers(KEY))
    assert is_refused(outcome, "unknown_key", KEY)


async def test_a_key_made_with_a_pepper_is_not_known_by_its_bare_hash(make_call: MakeCall) -> None:
    outcome = await check(
        make_call,
        await credential(record(KEY)._replace(pepper=pepper_name(PEPPER))),
        [(b"x-api-key", str(KEY).encode())],
    )
    assert is_refused(outcome, "unknown_key", KEY)


async def test_a_mistyped_key_is_told_apart_and_not_named(make_call: MakeCall) -> None:
    text = str(KEY)
    known = await credential(record(KEY))
    for at in (6, 20, 62):
        wrong = text[:at] + ("x" if text[at] != "x" else "y") + text[at + 1 :]
        assert is_refused(await check(make_call, known, [(b"x-api-key", wrong.encode())]), "malformed", KEY)


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({"revoked": 5}, "revoked"),
        ({"expires": NOW}, "expired"),
    ],
)
async def test_a_key_that_is_not_valid_is_refused_by_name(
    make_call: MakeCall, more: dict[str, Any], cause: str
) -> None:
    known = await credential(record(KEY, **more))
    outcome = await check(make_call, known, [(b"x-api-key", str(KEY).encode())])
    assert is_refused(outcome, cause, KEY)
    assert KEY.id.decode() in str(outcome)
    assert "node-a" in str(outcome)


async def test_a_key_that_is_not_valid_yet_ends_no_node(make_call: MakeCall) -> None:
    """It may be this host's clock that is behind."""
    known = await credential(record(KEY, not_before=NOW + 1))
    outcome = await check(make_call, known, [(b"x-api-key", str(KEY).encode())])
    assert isinstance(outcome, Refusal)
    assert (outcome.reason, outcome.cause, outcome.sent) == (Reason.UPSTREAM_DOWN, "not_yet_valid", False)
    wrong = record(generate(), not_before=NOW + 1)._replace(id=KEY.id.decode())
    assert is_refused(
        await check(make_call, await credential(wrong), [(b"x-api-key", str(KEY).encode())]),
        "unknown_key",
        KEY,
    )


@pytest.mark.parametrize("more", [{"expires": NOW + 1}, {"not_before": NOW}])
async def test_a_key_is_valid_to_the_second(make_call: MakeCall, more: dict[str, Any]) -> None:
    known = await credential(record(KEY, **more))
    assert await check(make_call, known, [(b"x-api-key", str(KEY).encode())]) == WHO


@pytest.mark.parametrize("user", ["node-b", "Node-a", "node-a "])
async def test_a_key_under_another_user_name_is_refused(make_call: MakeCall, user: str) -> None:
    outcome = await check(make_call, await credential(record(KEY)), [(b"authorization", basic(user, KEY))])
    assert is_refused(outcome, "wrong_name", KEY)


async def test_a_wrong_key_under_a_wrong_name_is_unknown_first(make_call: MakeCall) -> None:
    """Whoever does not have the key does not learn whose it is."""
    outcome = await check(make_call, await credential(record(KEY)), [(b"authorization", basic("b", OTHER))])
    assert is_refused(outcome, "unknown_key", OTHER)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"hunter2")],
        [(b"x-api-key", str(KEY).encode() + b"," + str(KEY).encode())],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer eyJhbGciOiJIUzI1NiJ9.e30.x")],
        [(b"authorization", b"Basic")],
        [(b"authorization", b"Basic \xff\xff")],
        [(b"authorization", b"Basic " + base64.b64encode(b"nocolon"))],
        [(b"authorization", b"Basic " + base64.b64encode(b"node-a:hunter2"))],
        [(b"authorization", basic("node-a", KEY) + b"!")],
        [(b"authorization", bearer(KEY)), (b"authorization", bearer(OTHER))],
        [(b"authorization", bearer(KEY)), (b"x-api-key", str(OTHER).encode())],
        [(b"x-api-key", str(KEY).encode()), (b"x-api-key", b"")],
        [(b"authorization", basic("node-a", KEY)), (b"authorization", basic("node-b", KEY))],
        [(b"authorization", bearer(KEY)), (b"authorization", b"Basic x")],
    ],
)
async def test_what_is_no_key_or_two_is_malformed(make_call: MakeCall, headers: Metadata) -> None:
    outcome = await check(make_call, await credential(record(KEY), record(OTHER)), headers)
    assert is_refused(outcome, "malformed", KEY, OTHER)
    assert "hunter2" not in str(outcome)


async def test_a_malformed_key_is_refused_in_an_outage_as_well(make_call: MakeCall) -> None:
    outcome = await check(make_call, ApiKey(KeyTable(Store(DOWN))), [(b"x-api-key", b"hunter2")])
    assert is_refused(outcome, "malformed")


header = st.tuples(
    st.sampled_from([b"authorization", b"Authorization", b"x-api-key", b"X-Api-Key", b"accept", b""]),
    st.one_of(
        st.binary(max_size=120),
        st.builds(
            lambda scheme, rest: scheme + rest,
            st.sampled_from([b"Basic ", b"bearer ", b"Bearer\t", b"", b"flwr_"]),
            st.one_of(
                st.binary(max_size=80),
                st.binary(max_size=80).map(base64.b64encode),
                st.just(base64.b64encode(f":{OTHER}".encode())),
                st.just(str(OTHER).encode()),
            ),
        ),
    ),
)


@settings(suppress_health_check=IGNORED, deadline=None, max_examples=300)
@given(st.lists(header, max_size=4))
async def test_no_headers_let_a_stranger_in_or_raise_anything_but_a_refusal(
    make_call: MakeCall, headers: Metadata
) -> None:
    outcome = await check(make_call, await credential(record(KEY)), headers)
    assert outcome is None or is_refused(outcome, outcome.cause if isinstance(outcome, Refusal) else "")
