"""Who the node is, if proxies of ours say so; and what the SuperLink is told of the way (RFC 7239)."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from typing import TYPE_CHECKING

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from hypothesis import given
from hypothesis import strategies as st

from relay.wires.forwarded import NO_CLAIMS, Claims, Forwarding

if TYPE_CHECKING:
    from relay.call import Metadata

NODE = "203.0.113.9"
PROXIES = ("10.0.0.0/8", "2001:db8:aaaa::/48")

#: What a header value can hold after aiohttp's parser let it through; see the last test.
VALUE = st.binary(max_size=60).map(lambda raw: bytes(byte for byte in raw if byte >= 0x20 and byte != 0x7F))
ADDRESS = st.ip_addresses().map(str)

# RFC 7239 section 4, with token and quoted-string of RFC 9110 section 5.6.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_PAIR = rb"(?P<name>%b)=(?P<value>%b|%b)" % (_TOKEN, _TOKEN, _QUOTED)
PAIR = re.compile(_PAIR)
ELEMENT = re.compile(rb"%b(?:;%b)*" % ((re.sub(rb"\?P<\w+>", b"?:", _PAIR),) * 2))
# RFC 7239 section 6: an IPv6 address stands in brackets, and needs quotes for them.
NODE_ID = re.compile(rb"[0-9.]+|\[[0-9a-fA-F:.]+\]|unknown")


def resolve(
    direct: str = NODE,
    host: bytes = b"relay:8080",
    claims: Claims = NO_CLAIMS,
    *,
    tls: bool = False,
    trusted: tuple[str, ...] = PROXIES,
) -> tuple[str, dict[bytes, bytes]]:
    """Return the node's address, and the headers by name: there must be one of each."""
    peer, headers = Forwarding([ipaddress.ip_network(net) for net in trusted]).resolve(
        direct, host, claims, tls=tls
    )
    return peer, by_name(headers)


def by_name(headers: Metadata) -> dict[bytes, bytes]:
    names = [name for name, _ in headers]
    assert sorted(names) == [b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"]
    return dict(headers)


def unquoted(value: bytes) -> bytes:
    return re.sub(rb"\\(.)", rb"\1", value[1:-1], flags=re.DOTALL) if value.startswith(b'"') else value


def parsed(element: bytes) -> dict[bytes, bytes]:
    """Parse one forwarded-element as the RFC writes it."""
    assert ELEMENT.fullmatch(element), element
    return {match["name"]: unquoted(match["value"]) for match in PAIR.finditer(element)}


# -- without a proxy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize(
    ("direct", "element", "plain"),
    [
        ("203.0.113.9", b"203.0.113.9", b"203.0.113.9"),
        ("2001:db8::1", b'"[2001:db8::1]"', b"2001:db8::1"),
        ("", b"unknown", b"unknown"),
    ],
    ids=["IPv4", "IPv6", "Unix socket"],
)
def test_a_node_that_comes_directly_is_who_its_connection_says(
    direct: str, element: bytes, plain: bytes, tls: bool
) -> None:
    proto = b"https" if tls else b"http"
    peer, headers = resolve(direct, tls=tls)
    assert peer == direct
    assert headers == {
        b"forwarded": b'for=%b;host="relay:8080";proto=%b' % (element, proto),
        b"x-forwarded-for": plain,
        b"x-forwarded-proto": proto,
        b"x-forwarded-host": b"relay:8080",
    }


@given(direct=ADDRESS, host=VALUE, tls=st.booleans())
def test_the_forwarded_header_is_in_the_syntax_of_its_rfc_whatever_the_host_is(
    direct: str, host: bytes, tls: bool
) -> None:
    _, headers = resolve(direct, host, tls=tls)
    element = parsed(headers[b"forwarded"])
    assert list(element) == ([b"for", b"host", b"proto"] if host else [b"for", b"proto"])
    assert NODE_ID.fullmatch(element[b"for"])
    assert element[b"for"].strip(b"[]").decode() == direct
    assert element.get(b"host", b"") == host
    assert element[b"proto"] == (b"https" if tls else b"http")


def test_nothing_is_said_of_a_host_that_nobody_knows() -> None:
    _, headers = resolve(host=b"")
    assert headers[b"forwarded"] == b"for=203.0.113.9;proto=http"


@pytest.mark.parametrize("host", [b'a";for="127.0.0.1', b"a;for=127.0.0.1", b"a, for=127.0.0.1", b'\\";by=x'])
def test_a_host_header_cannot_add_to_what_is_said_of_the_way(host: bytes) -> None:
    _, headers = resolve(host=host)
    assert parsed(headers[b"forwarded"]) == {b"for": NODE.encode(), b"host": host, b"proto": b"http"}


def test_what_is_said_of_one_call_is_not_changed_by_what_is_done_with_that_of_another() -> None:
    forwarding = Forwarding([])
    _, first = forwarding.resolve(NODE, b"relay", NO_CLAIMS, tls=False)
    expected = list(first)
    first.append((b"x-added", b"later"))
    _, second = forwarding.resolve(NODE, b"relay", NO_CLAIMS, tls=False)
    assert second == expected


@pytest.mark.parametrize(
    ("direct", "host", "tls"),
    [("203.0.113.8", b"relay", False), (NODE, b"other", False), (NODE, b"relay", True)],
    ids=["another node", "another host", "TLS"],
)
def test_calls_that_differ_in_one_thing_are_told_apart(direct: str, host: bytes, tls: bool) -> None:
    forwarding = Forwarding([])
    first = forwarding.resolve(NODE, b"relay", NO_CLAIMS, tls=False)
    assert forwarding.resolve(direct, host, NO_CLAIMS, tls=tls)[1] != first[1]


# -- spoofing -----------------------------------------------------------------------------------------

LIE = Claims(b"for=10.9.9.9;proto=https", b"10.9.9.9", b"https", b"admin.internal")


@pytest.mark.parametrize(
    "direct", [NODE, "11.0.0.1", "2001:db8:bbbb::1", "::ffff:203.0.113.9", "", "garbage"]
)
@pytest.mark.parametrize(
    "claims",
    [
        LIE,
        *(Claims()._replace(**{name: getattr(LIE, name)}) for name in Claims._fields),
    ],
    ids=["all", *Claims._fields],
)
def test_nothing_is_believed_of_a_peer_that_is_no_proxy_of_ours(direct: str, claims: Claims) -> None:
    assert resolve(direct, claims=claims) == resolve(direct)


@pytest.mark.parametrize("direct", ["10.1.2.3", "2001:db8:aaaa::1"])
def test_nobody_is_believed_if_no_proxy_is_trusted(direct: str) -> None:
    assert resolve(direct, claims=LIE, trusted=()) == resolve(direct, trusted=())


def test_a_node_that_writes_itself_a_way_is_found_behind_it() -> None:
    """The proxy adds the node it saw at the right; what the node wrote stands to the left of that."""
    peer, _ = resolve("10.0.0.1", claims=Claims(for_=b"10.9.9.9, 1.1.1.1, 203.0.113.9"))
    assert peer == NODE


# -- behind proxies of ours ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direct", "hops", "peer"),
    [
        ("10.0.0.1", b"203.0.113.9", NODE),
        ("10.0.0.1", b"203.0.113.9, 10.0.0.2", NODE),
        ("10.0.0.1", b"203.0.113.9,10.0.0.3 ,  10.0.0.2", NODE),
        ("10.0.0.1", b"198.51.100.1, 203.0.113.9, 10.0.0.2", NODE),
        ("10.0.0.1", b", ,203.0.113.9,", NODE),
        ("10.0.0.1", b"10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", b"2001:db8::9", "2001:db8::9"),
        ("2001:db8:aaaa::1", b"2001:db8::9, 2001:db8:aaaa::2", "2001:db8::9"),
        ("2001:db8:aaaa::1", b"203.0.113.9, 10.0.0.2", NODE),
        ("::ffff:10.0.0.1", b"203.0.113.9", NODE),
        ("10.0.0.1", b"203.0.113.9, ::ffff:10.0.0.2", NODE),
        ("10.0.0.1", b"", "10.0.0.1"),
    ],
    ids=[
        "one proxy",
        "two proxies",
        "three proxies and odd spaces",
        "a node behind a proxy that is not ours",
        "empty elements",
        "a node within the network of the proxies",
        "an IPv6 node",
        "IPv6 all the way",
        "from IPv4 to IPv6",
        "an IPv4 proxy on an IPv6 socket",
        "a hop that is written as mapped IPv4",
        "a proxy that says nothing",
    ],
)
def test_the_node_is_the_last_hop_that_is_no_proxy_of_ours(direct: str, hops: bytes, peer: str) -> None:
    assert resolve(direct, claims=Claims(for_=hops, proto=b"https"))[0] == peer


@pytest.mark.parametrize(
    "garbage", [b"unknown", b"_hidden", b"999.1.1.1", b"<script>", b"\xff", b"10.0.0.0/8"]
)
@pytest.mark.parametrize(
    ("hops", "peer"),
    [
        (b"%b", "10.0.0.1"),
        (b"%b, 10.0.0.2", "10.0.0.2"),
        (b"198.51.100.1, %b, 10.0.0.2", "10.0.0.2"),
        (b"%b, 203.0.113.9", NODE),
    ],
    ids=["alone", "before a proxy", "between", "before the node"],
)
def test_a_hop_that_is_no_address_ends_what_is_believed(garbage: bytes, hops: bytes, peer: str) -> None:
    assert resolve("10.0.0.1", claims=Claims(for_=hops % garbage))[0] == peer


@pytest.mark.parametrize(
    ("claims", "peer"),
    [
        (Claims(for_=b"203.0.113.9:4711"), "203.0.113.9"),
        (Claims(for_=b"[2001:db8::1]:4711"), "2001:db8::1"),
        (Claims(for_=b"2001:db8::1, 10.0.0.2:80"), "2001:db8::1"),
        (Claims(forwarded=b"for=203.0.113.9;proto=https"), "203.0.113.9"),
        (Claims(forwarded=b'proto=https;For="[2001:db8::1]:80", for=10.0.0.2'), "2001:db8::1"),
        (Claims(forwarded=b"for=_hidden, for=10.0.0.2"), "10.0.0.2"),
        (Claims(forwarded=b"for=unknown"), "10.0.0.1"),
    ],
)
def test_the_forms_that_proxies_write_are_read(claims: Claims, peer: str) -> None:
    assert resolve("10.0.0.1", claims=claims)[0] == peer


def test_a_long_host_is_not_remembered() -> None:
    forwarding = Forwarding(())
    for number in range(2000):
        forwarding.resolve("203.0.113.9", b"h" * 1000 + b"%d" % number, NO_CLAIMS, tls=False)
    assert forwarding._cached_hop.cache_info().currsize == 0


def test_each_hop_is_added_to_what_the_proxies_said() -> None:
    claims = Claims(b"for=203.0.113.9;proto=https", b"203.0.113.9,10.0.0.2", b"https", b"relay.example")
    _, headers = resolve("10.0.0.1", b"relay:8080", claims)
    assert headers == {
        b"forwarded": b'for=203.0.113.9;proto=https, for=10.0.0.1;host="relay:8080";proto=http',
        b"x-forwarded-for": b"203.0.113.9, 10.0.0.2, 10.0.0.1",
        b"x-forwarded-proto": b"https",
        b"x-forwarded-host": b"relay.example",
    }


@pytest.mark.parametrize("missing", Claims._fields)
def test_what_a_proxy_did_not_say_is_what_this_connection_says(missing: str) -> None:
    full = Claims(b"for=203.0.113.9", b"203.0.113.9", b"https", b"relay.example")
    _, headers = resolve("10.0.0.1", b"relay", full._replace(**{missing: b""}))
    name = {"forwarded": b"forwarded", "for_": b"x-forwarded-for"}.get(
        missing, b"x-forwarded-" + missing.encode()
    )
    expected = {
        "forwarded": b"for=10.0.0.1;host=relay;proto=http",
        "for_": b"10.0.0.1",
        "proto": b"http",
        "host": b"relay",
    }
    assert headers[name] == expected[missing]


def test_a_proxy_on_a_unix_socket_is_not_believed() -> None:
    assert resolve("", claims=LIE, trusted=("0.0.0.0/0", "::/0")) == resolve("")


# -- nothing here makes a header of its own -----------------------------------------------------------


@given(
    direct=st.sampled_from(["10.0.0.1", NODE, ""]) | ADDRESS,
    host=VALUE,
    claims=st.builds(Claims, VALUE, VALUE, VALUE, VALUE),
)
def test_whatever_is_claimed_four_headers_without_control_bytes_come_of_it(
    direct: str, host: bytes, claims: Claims
) -> None:
    peer, headers = resolve(direct, host, claims)
    assert not any(byte < 0x20 or byte == 0x7F for value in headers.values() for byte in value)
    assert peer == direct or ipaddress.ip_address(peer)


@pytest.mark.parametrize("header", [b"host", b"x-forwarded-for", b"forwarded"])
@pytest.mark.parametrize("byte", [*range(0x09), *range(0x0A, 0x20), 0x7F], ids=hex)
async def test_the_parser_lets_no_control_byte_into_a_header(header: bytes, byte: int) -> None:
    """What the module takes for granted; a TAB may stand in a quoted string."""
    assert HttpRequestParser is not HttpRequestParserPy
    loop = asyncio.get_running_loop()
    parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16)
    with pytest.raises(BadHttpMessage):
        parser.feed_data(b"POST / HTTP/1.1\r\nhost: x\r\n%b: a%cb\r\n\r\n" % (header, byte))
