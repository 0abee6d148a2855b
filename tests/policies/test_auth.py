"""Who is let in: any whole alternative is enough, an outage refuses nobody, and a credential stays here."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from relay.call import Call, Identity, Payload, Reply, Source
from relay.fleet import Method
from relay.policies import Auth
from relay.policies.auth import without_credentials
from relay.refusal import Reason, Refusal

MakeCall = Callable[..., Call]

A = Identity("a", "north", (("site", "1"), ("x", "a")), ("a",))
B = Identity("b", "south", (("x", "b"), ("y", "2")), ("b",))
WRONG_A = Refusal(Reason.UNAUTHENTICATED, "a is wrong", by="a", sent=False, cause="revoked")
WRONG_B = Refusal(Reason.UNAUTHENTICATED, "b is wrong", by="b", sent=False, cause="unknown_key")
DOWN = Refusal(Reason.UPSTREAM_DOWN, "nobody knows", by="b", sent=False, cause="keys_unavailable")

HEADERS = [
    (b"Accept", b"*/*"),
    (b"Authorization", b"Basic c2VjcmV0"),
    (b"flwr-public-key", b"key"),
    (b"flwr-timestamp", b"now"),
    (b"flwr-signature", b"proof"),
    (b"X-API-KEY", b"secret"),
    (b"authorization", b"Bearer secret"),
    (b"x-api-kez", b"stays"),
    (b"authorizatiom", b"stays"),
]


class Given:
    """A credential with a given answer."""

    name: ClassVar[str] = "given"

    def __init__(self, name: str, answer: Identity | Refusal | Exception | None) -> None:
        self.name = name  # type: ignore[misc]
        self.answer = answer
        self.asked = 0

    async def check(self, call: Call) -> Identity | None:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Upstream:
    """What stands behind the policy; notes what came."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    async def __call__(self, call: Call) -> Reply:
        self.calls.append(call)
        return Reply(Payload(), Source.UPSTREAM)


async def outcome(call: Call, auth: Auth) -> Identity | Refusal | None:
    """Return who was let in, or the refusal."""
    upstream = Upstream()
    call.identity = None  # of an earlier outcome
    try:
        await auth.handle(call, upstream)
    except Refusal as refusal:
        assert upstream.calls == []
        assert call.identity is None
        return refusal
    assert upstream.calls == [call]
    return call.identity


def refusals(cause: str, action: str) -> float:
    labels = {"cause": cause, "action": action}
    return REGISTRY.get_sample_value("relay_auth_refusals_total", labels) or 0.0


def let_in(credential: str) -> float:
    return REGISTRY.get_sample_value("relay_auth_calls_total", {"credential": credential}) or 0.0


@pytest.fixture
def call(make_call: MakeCall) -> Call:
    return make_call(Method.PULL_MESSAGES, metadata=list(HEADERS))


def test_with_nothing_accepted_nobody_is_asked() -> None:
    assert not any(Auth().applies(method) for method in Method)
    asking = Auth(((Given("a", A),),))
    assert all(asking.applies(method) for method in Method)


# -- alternatives -------------------------------------------------------------------------------------

ACCEPTED = [
    # what a, b and c say; what is accepted; who is let in, or why nobody is
    ({"a": A}, ["a"], "a"),
    ({"a": None}, ["a"], "missing"),
    ({"a": WRONG_A}, ["a"], "revoked"),
    ({"a": DOWN}, ["a"], "keys_unavailable"),
    ({"a": A, "b": B}, ["a", "b"], "a"),
    ({"a": None, "b": B}, ["a", "b"], "b"),
    ({"a": WRONG_A, "b": B}, ["a", "b"], "b"),
    ({"a": DOWN, "b": B}, ["a", "b"], "b"),
    ({"a": None, "b": None}, ["a", "b"], "missing"),
    ({"a": None, "b": WRONG_B}, ["a", "b"], "unknown_key"),
    ({"a": WRONG_A, "b": WRONG_B}, ["a", "b"], "revoked"),
    ({"a": WRONG_A, "b": DOWN}, ["a", "b"], "keys_unavailable"),
    ({"a": DOWN, "b": WRONG_B}, ["a", "b"], "keys_unavailable"),
    ({"a": DOWN, "b": None}, ["a", "b"], "keys_unavailable"),
    ({"a": A, "b": None}, ["a+b"], "missing"),
    ({"a": None, "b": B}, ["a+b"], "missing"),
    ({"a": A, "b": WRONG_B}, ["a+b"], "unknown_key"),
    ({"a": A, "b": DOWN}, ["a+b"], "keys_unavailable"),
    ({"a": A, "b": B}, ["a+b"], "a"),
    ({"a": A, "b": B}, ["b+a"], "b"),
    ({"a": A, "b": None, "c": A}, ["a+b", "c"], "a"),
    ({"a": A, "b": WRONG_B, "c": None}, ["a+b", "a+c"], "unknown_key"),
    ({"a": A, "b": None, "c": B}, ["a+b", "a+c"], "a"),
]


@pytest.mark.parametrize(("says", "accept", "expected"), ACCEPTED)
async def test_the_first_whole_alternative_lets_a_caller_in(
    call: Call, says: dict[str, Identity | Refusal | None], accept: list[str], expected: str
) -> None:
    credentials = {name: Given(name, answer) for name, answer in says.items()}
    auth = Auth(tuple(tuple(credentials[name] for name in names.split("+")) for names in accept))
    found = await outcome(call, auth)
    assert (found.name if isinstance(found, Identity) else found.cause if found else None) == expected
    assert all(credential.asked <= 1 for credential in credentials.values())


async def test_a_wrong_credential_is_refused_as_it_said_and_a_missing_one_says_what_is_needed(
    call: Call,
) -> None:
    assert await outcome(call, Auth(((Given("a", WRONG_A),),))) is WRONG_A
    missing = await outcome(call, Auth(((Given("a", None),), (Given("b", None), Given("c", None)))))
    assert isinstance(missing, Refusal)
    assert (missing.reason, missing.sent, missing.by) == (Reason.UNAUTHENTICATED, False, "auth")
    assert "a or b+c is needed" in missing.detail


async def test_who_proves_to_be_two_is_the_first_with_what_the_second_adds(call: Call) -> None:
    joined = await outcome(call, Auth(((Given("a", A), Given("b", B)),)))
    assert isinstance(joined, Identity)
    assert (joined.name, joined.tenant, joined.by) == ("a", "north", ("a", "b"))
    assert dict(joined.labels) == {"site": "1", "x": "a", "y": "2"}
    bare = Identity("c", by=("c",))
    joined = await outcome(call, Auth(((Given("c", bare), Given("b", B)),)))
    assert joined == Identity("c", "south", B.labels, ("c", "b"))


async def test_a_bug_in_a_credential_lets_nobody_in_and_is_no_refusal(call: Call) -> None:
    upstream = Upstream()
    with pytest.raises(ZeroDivisionError):
        await Auth(((Given("a", ZeroDivisionError()),),), enforce=False).handle(call, upstream)
    assert upstream.calls == []


# -- what becomes of strangers ------------------------------------------------------------------------


async def test_a_stranger_may_be_dropped_instead_and_an_outage_never_is(call: Call) -> None:
    dropped = await outcome(call, Auth(((Given("a", WRONG_A),),), drop=True))
    assert isinstance(dropped, Refusal)
    assert (dropped.reason, dropped.cause, dropped.detail) == (Reason.STRANGER, "revoked", "a is wrong")
    assert (dropped.by, dropped.sent) == ("a", False)
    assert await outcome(call, Auth(((Given("b", DOWN),),), drop=True)) is DOWN


@pytest.mark.parametrize("answer", [WRONG_A, DOWN, None], ids=["wrong", "down", "missing"])
async def test_without_enforcement_everybody_is_let_in_and_nobody_is_known(
    call: Call, answer: Refusal | None
) -> None:
    with capture_logs() as lines:
        assert await outcome(call, Auth(((Given("a", answer),),), enforce=False, drop=True)) is None
    assert [line["event"] for line in lines] == ["call would be refused"]
    assert "secret" not in repr(lines)
    assert call.metadata == without_credentials(HEADERS)


@pytest.mark.parametrize(
    ("answer", "more", "cause", "action"),
    [
        (WRONG_A, {}, "revoked", "refused"),
        (WRONG_A, {"drop": True}, "revoked", "dropped"),
        (WRONG_A, {"enforce": False}, "revoked", "passed"),
        (None, {}, "missing", "refused"),
        (DOWN, {"drop": True}, "keys_unavailable", "deferred"),
        (Refusal(Reason.UNAUTHENTICATED), {}, "unauthenticated", "refused"),
    ],
)
async def test_every_refusal_is_counted_by_cause_and_by_what_became_of_it(
    call: Call, answer: Refusal | None, more: dict[str, bool], cause: str, action: str
) -> None:
    before = refusals(cause, action)
    await outcome(call, Auth(((Given("a", answer),),), **more))
    assert refusals(cause, action) == before + 1


async def test_calls_are_counted_by_what_let_them_in(call: Call) -> None:
    auth = Auth(((Given("counted", A), Given("too", B)), (Given("never", A),)))
    await outcome(call, auth)
    await outcome(call, auth)
    assert let_in("counted+too") == 0
    auth.sample()
    auth.sample()
    assert let_in("counted+too") == 2
    assert let_in("never") == 0


# -- what goes upstream -------------------------------------------------------------------------------


async def test_what_proved_a_caller_stays_here_and_its_own_proof_passes(call: Call) -> None:
    await outcome(call, Auth(((Given("a", A),),)))
    assert call.metadata == [HEADERS[at] for at in (0, 2, 3, 4, 7, 8)]


async def test_whoever_was_admitted_before_is_not_asked_again_and_what_proved_him_stays_here(
    call: Call,
) -> None:
    credential = Given("a", A)
    auth, upstream = Auth(((credential,),)), Upstream()
    call.metadata = HEADERS
    await auth.admit(call)
    assert (call.identity, call.metadata) == (A, HEADERS)
    await auth.handle(call, upstream)
    assert credential.asked == 1
    assert upstream.calls[0].metadata == without_credentials(HEADERS) != HEADERS


async def test_whoever_passes_without_a_credential_is_counted_once_where_he_was_admitted_before(
    call: Call,
) -> None:
    auth = Auth(((Given("a", WRONG_A),),), enforce=False)
    before = refusals("revoked", "passed")
    await auth.admit(call)
    await auth.handle(call, Upstream())
    assert refusals("revoked", "passed") == before + 1


async def test_a_stranger_is_not_admitted(call: Call) -> None:
    auth = Auth(((Given("a", WRONG_A),),))
    with pytest.raises(Refusal) as caught:
        await auth.admit(call)
    assert caught.value is WRONG_A
    assert call.identity is None


async def test_a_credential_is_sent_on_where_that_is_wanted(call: Call) -> None:
    await outcome(call, Auth(((Given("a", A),),), forward=True))
    assert call.metadata == HEADERS
