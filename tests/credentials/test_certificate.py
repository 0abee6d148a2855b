"""Which client certificates are let in, and as whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.call import Certificate, Identity
from relay.certificates import UNREADABLE
from relay.credentials.certificate import CAUSE, CertificateCredential, Pattern, Rule, check_template
from relay.fleet import Method
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.call import Call

FINGERPRINT = "ab" * 32
NODE = Certificate(
    "CN=node-7,O=Clinic\\, North,C=DE",
    (
        "DNS:Node-7.north.example",
        "DNS:second.example",
        "URI:spiffe://example/site/7",
        "IP:10.0.0.7",
        "email:a@b.example",
    ),
    FINGERPRINT,
    "7",
)


@pytest.fixture
def identify(make_call: Callable[..., Call]) -> Callable[..., Any]:
    """Return a function that says whom a certificate stands for under some rules, each a text or a Rule."""

    async def identify(certificate: Certificate | None, *rules: str | Rule) -> Identity | None:
        parsed = [rule if isinstance(rule, Rule) else Rule(Pattern.parse(rule)) for rule in rules]
        call = make_call(Method.PULL_MESSAGES)
        call.certificate = certificate
        return await CertificateCredential(parsed).check(call)

    return identify


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("DNS:node-7.north.example", "Node-7.north.example"),
        ("DNS:*.NORTH.example", "Node-7.north.example"),
        ("DNS:second.example", "second.example"),
        ("DNS:*", "Node-7.north.example"),
        ("URI:spiffe://example/site/*", "spiffe://example/site/7"),
        ("IP:10.0.0.7", "10.0.0.7"),
        ("IP:10.0.*", "10.0.0.7"),
        ("email:*@B.example", "a@b.example"),
        ("CN:node-7", "node-7"),
        ("CN:node-*", "node-7"),
        ("subject:CN=node-7,O=Clinic\\, North,C=DE", "CN=node-7,O=Clinic\\, North,C=DE"),
        ("subject:*,C=DE", "CN=node-7,O=Clinic\\, North,C=DE"),
        (f"fingerprint:{FINGERPRINT}", FINGERPRINT),
        ("fingerprint:" + ":".join(["AB"] * 32), FINGERPRINT),
    ],
)
async def test_a_certificate_that_matches_stands_for_what_it_matched(
    identify: Callable[..., Any], rule: str, name: str
) -> None:
    assert await identify(NODE, rule) == Identity(name, by=("certificate",))


@pytest.mark.parametrize(
    "rule",
    [
        "DNS:north.example",
        "DNS:Node-7",
        "DNS:node-7.north.exampleX",
        "DNS:node-7xnorth.example",
        "DNS:spiffe://example/site/7",
        "URI:SPIFFE://example/site/7",
        "IP:10.0.0.70",
        "CN:NODE-7",
        "CN:Clinic, North",
        "CN:node-7,O=Clinic\\, North",
        "subject:CN=node-7",
        f"fingerprint:{'ac' * 32}",
    ],
)
async def test_a_certificate_that_no_rule_matches_is_refused(identify: Callable[..., Any], rule: str) -> None:
    with pytest.raises(Refusal) as caught:
        await identify(NODE, rule)
    refusal = caught.value
    assert (refusal.reason, refusal.cause, refusal.by) == (Reason.UNAUTHENTICATED, CAUSE, "certificate")
    assert "CN=node-7" in refusal.detail
    assert not refusal.sent


async def test_the_first_rule_that_matches_counts(identify: Callable[..., Any]) -> None:
    rules = (
        Rule(Pattern.parse("CN:other"), "other"),
        Rule(Pattern.parse("CN:node-*"), "{CN} of {DNS}", "north", (("site", "7"),)),
        Rule(Pattern.parse("subject:*"), "late"),
    )
    found = await identify(NODE, *rules)
    assert found == Identity("node-7 of Node-7.north.example", "north", (("site", "7"),), ("certificate",))


async def test_a_rule_does_not_match_what_has_none_of_the_names_in_its_template(
    identify: Callable[..., Any],
) -> None:
    bare = Certificate("CN=bare", fingerprint=FINGERPRINT)
    rules = (Rule(Pattern.parse("subject:*"), "{URI}"), Rule(Pattern.parse("subject:*"), "{CN}"))
    assert (await identify(bare, *rules)).name == "bare"
    with pytest.raises(Refusal):
        await identify(bare, rules[0])


@pytest.mark.parametrize("rule", ["DNS:", "CN:*", f"fingerprint:{FINGERPRINT}", "DNS:*"])
async def test_an_empty_certificate_matches_nothing_by_accident(
    identify: Callable[..., Any], rule: str
) -> None:
    if rule == "DNS:":
        with pytest.raises(ValueError, match="must be one of"):
            Pattern.parse(rule)
        return
    with pytest.raises(Refusal):
        await identify(Certificate("O=nobody"), rule)


async def test_a_common_name_in_a_strange_subject_is_not_made_up(identify: Callable[..., Any]) -> None:
    for subject in ("O=CN\\=admin", "O=x\\,CN=admin", 'O="CN=admin"', "=,CN=admin"):
        with pytest.raises(Refusal):
            await identify(Certificate(subject), "CN:admin")


async def test_no_certificate_is_no_credential(identify: Callable[..., Any]) -> None:
    assert await identify(None, "subject:*") is None


async def test_what_a_proxy_garbled_puts_the_call_off_and_shuts_no_node_down(
    identify: Callable[..., Any],
) -> None:
    with pytest.raises(Refusal) as caught:
        await identify(UNREADABLE, "subject:*")
    assert caught.value.reason is Reason.UPSTREAM_DOWN


async def test_a_certificate_that_is_known_is_looked_up_once(make_call: Callable[..., Call]) -> None:
    credential = CertificateCredential([Rule(Pattern.parse("CN:*"))])
    for _ in range(3):
        call = make_call(Method.PULL_MESSAGES)
        call.certificate = Certificate(*NODE)
        assert await credential.check(call) is not None
    assert credential._known.cache_info().misses == 1


@pytest.mark.parametrize(
    "text",
    ["", "node", "node.example", "cn:x", "CN:", "CN: ", "SAN:x", "fingerprint:ab", f"fingerprint:{'g' * 64}"],
)
def test_what_is_no_pattern_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"must (be one of|have a fingerprint)"):
        Pattern.parse(text)


def test_a_pattern_is_written_as_it_is_read() -> None:
    assert str(Pattern.parse("DNS:*.example")) == "DNS:*.example"
    assert str(Pattern.parse("URI:urn:x:y")) == "URI:urn:x:y"


@pytest.mark.parametrize("name", ["", " ", "{cn}", "{CN", "CN}", "{}", "{CN} {OU}", "{{CN}}"])
def test_a_template_with_an_unknown_field_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="nothing in braces but"):
        check_template(name)


def test_a_template_may_be_a_plain_text() -> None:
    for name in ("north", "{match}", "{CN}@{DNS}"):
        check_template(name)


@given(glob=st.text(alphabet="ab*.\\[]?+()^$|", min_size=1), value=st.text(alphabet="ab.\\[]?+()^$|"))
def test_a_star_stands_for_any_run_and_nothing_else_for_anything_but_itself(glob: str, value: str) -> None:
    def matches(glob: str, value: str) -> bool:
        if not glob:
            return not value
        if glob[0] == "*":
            return any(matches(glob.lstrip("*"), value[at:]) for at in range(len(value) + 1))
        return bool(value) and glob[0] == value[0] and matches(glob[1:], value[1:])

    assert bool(Pattern("subject", glob).compiled().fullmatch(value)) == matches(glob, value)
