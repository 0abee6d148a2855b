"""How the values of settings are written, and what is said of a value that cannot be read."""

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from relay.settings_types import (
    Address,
    BaseUrl,
    Bytes,
    BytesOrZero,
    Flag,
    HostPort,
    Network,
    Rate,
    Seconds,
    SecondsOrZero,
    Share,
    Url,
    show_bytes,
    show_flag,
    show_number,
    show_seconds,
)


def refusal(kind: Any, value: object) -> str:
    """The reason for which the type `kind` refuses `value`."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value)
    [fault] = caught.value.errors()
    return str(fault["ctx"]["error"])


@pytest.mark.parametrize(
    ("text", "host", "port", "written"),
    [
        ("0.0.0.0:8080", "0.0.0.0", 8080, "0.0.0.0:8080"),
        (":8080", "0.0.0.0", 8080, "0.0.0.0:8080"),
        ("[::1]:80", "::1", 80, "[::1]:80"),
        ("[0:0::1]:80", "::1", 80, "[::1]:80"),
        ("relay.example_net:65535", "relay.example_net", 65535, "relay.example_net:65535"),
        ("localhost:0", "localhost", 0, "localhost:0"),
    ],
)
def test_an_address_is_host_and_port(text: str, host: str, port: int, written: str) -> None:
    address = TypeAdapter[HostPort](Address).validate_python(text)
    assert address == HostPort(host, port)
    assert str(address) == written
    assert HostPort.parse(str(address)) == address


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (8080, "must be host:port"),
        (None, "must be host:port"),
        ("localhost", "has no port"),
        ("localhost:", "must be host:port"),
        ("localhost:http", "must be host:port"),
        ("::1:80", "must be host:port"),
        ("fe80::1:80", "must be host:port"),
        ("[::1", "must be host:port"),
        ("[zz]:80", "is no IPv6 address"),
        ("a b:80", "has no valid host"),
        ("a\nb:80", "has no valid host"),
        ("a:80\n", "must be host:port"),
        ("-a:80", "has no valid host"),
        ("1.2.3:80", "is no IPv4 address"),
        ("1.2.3.256:80", "is no IPv4 address"),
        ("a:65536", "above 65535"),
        ("a:٨٠", "must be host:port"),
    ],
)
def test_an_address_that_is_none_is_refused(value: object, reason: str) -> None:
    assert reason in refusal(Address, value)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("0.0.0.0:80", "0.0.0.0:80", True),
        ("0.0.0.0:80", "127.0.0.1:80", True),
        ("[::]:80", "[::1]:80", True),
        ("localhost:80", "localhost:80", True),
        ("0.0.0.0:80", "0.0.0.0:81", False),
        ("127.0.0.1:80", "127.0.0.2:80", False),
        ("0.0.0.0:80", "[::1]:80", False),
        ("0.0.0.0:80", "[::]:80", False),
        ("0.0.0.0:80", "localhost:80", False),
        ("0.0.0.0:0", "0.0.0.0:0", False),
    ],
)
def test_addresses_overlap_when_both_cannot_be_bound(one: str, other: str, overlap: bool) -> None:
    assert HostPort.parse(one).overlaps(HostPort.parse(other)) is overlap
    assert HostPort.parse(other).overlaps(HostPort.parse(one)) is overlap


@pytest.mark.parametrize(
    ("text", "parts", "authority", "written"),
    [
        ("http://superlink:8000", ("http", "superlink", 8000), "superlink:8000", "http://superlink:8000"),
        ("http://superlink/", ("http", "superlink", 80), "superlink", "http://superlink"),
        ("https://superlink", ("https", "superlink", 443), "superlink", "https://superlink"),
        ("https://superlink:80", ("https", "superlink", 80), "superlink:80", "https://superlink:80"),
        ("http://[::1]:8000", ("http", "::1", 8000), "[::1]:8000", "http://[::1]:8000"),
        ("https://[::1]", ("https", "::1", 443), "[::1]", "https://[::1]"),
    ],
)
def test_a_url_is_scheme_host_and_port(
    text: str, parts: tuple[str, str, int], authority: str, written: str
) -> None:
    url = TypeAdapter[BaseUrl](Url).validate_python(text)
    assert url == BaseUrl(*parts)
    assert url.tls is (parts[0] == "https")
    assert url.authority == authority
    assert str(url) == written


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (8000, "must be a URL"),
        ("superlink:8000", "must be a URL"),
        ("grpc://superlink:8000", "must be a URL"),
        ("HTTP://superlink:8000", "must be a URL"),
        ("http://", "has no valid host"),
        ("http://:8000", "has no valid host"),
        ("http://user:key@superlink", "must not hold a user name"),
        ("http://@superlink", "must not hold a user name"),
        ("http://superlink:8000/v1", "must not have a path"),
        ("http://superlink?a=b", "must not have a path"),
        ("http://superlink#a", "must not have a path"),
        ("http://superlink:0", "port from 1"),
        ("http://superlink:65536", "above 65535"),
        ("http://super\nlink", "has no valid host"),
        ("http://superlink\n", "has no valid host"),
    ],
)
def test_a_url_that_is_none_is_refused(value: object, reason: str) -> None:
    assert reason in refusal(Url, value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (1, 1.0),
        (0.5, 0.5),
        ("25", 25.0),
        ("500ms", 0.5),
        ("25s", 25.0),
        ("1.5 m", 90.0),
        ("2h", 7200.0),
        (" 3s ", 3.0),
    ],
)
def test_a_duration_has_a_unit_or_is_in_seconds(value: object, seconds: float) -> None:
    assert TypeAdapter[float](Seconds).validate_python(value) == seconds


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (True, "must be a number of seconds"),
        (None, "must be a number of seconds"),
        ([], "must be a number of seconds"),
        ("", "must be a number of seconds"),
        ("soon", "must be a number of seconds"),
        ("5 days", "must be a number of seconds"),
        ("-5s", "must be a number of seconds"),
        ("1e3", "must be a number of seconds"),
        ("٣s", "must be a number of seconds"),
        (0, "must be above zero"),
        ("0ms", "must be above zero"),
        (-1, "must be above zero"),
        (float("inf"), "must be above zero and finite"),
        (float("nan"), "must be above zero and finite"),
        (10**400, "must be above zero and finite"),
        ("9" * 400, "must be a number of seconds"),
    ],
)
def test_a_duration_that_is_none_is_refused(value: object, reason: str) -> None:
    assert reason in refusal(Seconds, value)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (1, 1),
        ("1024", 1024),
        (4.294967296e9, 4 << 30),
        ("512KiB", 512 << 10),
        ("1.5 GiB", 3 << 29),
        ("7B", 7),
    ],
)
def test_a_size_has_a_unit_or_is_in_bytes(value: object, size: int) -> None:
    parsed = TypeAdapter[int](Bytes).validate_python(value)
    assert parsed == size
    assert isinstance(parsed, int)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("4GB", "must be a number of bytes"),
        ("4gib", "must be a number of bytes"),
        (True, "must be a number of bytes"),
        (0, "must be above zero"),
        (1.5, "must be a whole number of bytes"),
        ("1.5B", "must be a whole number of bytes"),
    ],
)
def test_a_size_that_is_none_is_refused(value: object, reason: str) -> None:
    assert reason in refusal(Bytes, value)


@given(st.integers(min_value=1, max_value=10**18 - 1))
def test_a_size_is_written_as_it_is_read(size: int) -> None:
    assert TypeAdapter[int](Bytes).validate_python(show_bytes(size)) == size


@pytest.mark.parametrize(("value", "size"), [(0, 0), ("0", 0), ("1KiB", 1024), (7, 7)])
def test_a_size_may_be_zero_where_that_means_something(value: object, size: int) -> None:
    assert TypeAdapter[int](BytesOrZero).validate_python(value) == size


@pytest.mark.parametrize("value", [-1, False, "", "none", "0.5"])
def test_a_size_or_zero_is_nothing_else(value: object) -> None:
    assert "must be" in refusal(BytesOrZero, value)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "500ms"), (0.0005, "0.5ms"), (1, "1s"), (25.0, "25s"), (7200, "7200s")]
)
def test_a_duration_is_written_as_it_is_read(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text
    assert TypeAdapter[float](Seconds).validate_python(text) == seconds


@pytest.mark.parametrize("text", ["10.0.0.0/8", "192.0.2.7", "2001:db8::/32", "::1"])
def test_a_network_is_a_network_or_an_address(text: str) -> None:
    assert TypeAdapter(Network).validate_python(text) == ipaddress.ip_network(text)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (5, "must be a network"),
        ("proxy", "must be a network"),
        ("10.0.0.0/33", "must be a network"),
        ("10.0.0.1/8", "write 10.0.0.0/8"),
    ],
)
def test_a_network_that_is_none_is_refused(value: object, reason: str) -> None:
    assert reason in refusal(Network, value)


def test_a_parsed_value_is_taken_as_it_is() -> None:
    address, url, network = HostPort("a", 1), BaseUrl("http", "a", 1), ipaddress.ip_network("10.0.0.0/8")
    assert TypeAdapter(Address).validate_python(address) is address
    assert TypeAdapter(Url).validate_python(url) is url
    assert TypeAdapter(Network).validate_python(network) is network


@pytest.mark.parametrize("value", [0, 0.0, "0", "0s", "0ms"])
def test_a_duration_may_be_zero_where_it_says_so(value: object) -> None:
    assert TypeAdapter[float](SecondsOrZero).validate_python(value) == 0.0
    assert TypeAdapter[float](SecondsOrZero).validate_python("1500ms") == 1.5
    assert show_seconds(0.0) == "0s"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (-1, "must be at least zero and finite: a number of seconds"),
        (float("nan"), "must be at least zero and finite: a number of seconds"),
        ("-1s", "must be a number of seconds"),
        (False, "must be a number of seconds"),
        (None, "must be a number of seconds"),
    ],
)
def test_a_duration_or_zero_that_is_none_is_refused(value: object, reason: str) -> None:
    assert refusal(SecondsOrZero, value).startswith(reason)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Flag, True),
        (Flag, False),
        (Share, 0),
        (Share, 0.2),
        (Share, 1),
        (Rate, 0.001),
        (Rate, 10),
        (Rate, 1e6),
    ],
)
def test_a_switch_or_a_number_is_taken_as_it_is(kind: Any, value: object) -> None:
    assert TypeAdapter(kind).validate_python(value) == value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Flag, 1),
        (Flag, "true"),
        (Flag, None),
        (Share, -0.1),
        (Share, 1.1),
        (Share, True),
        (Share, "0.2"),
        (Share, float("nan")),
        (Rate, 0),
        (Rate, -1),
        (Rate, "10"),
        (Rate, float("inf")),
        (Rate, float("nan")),
    ],
)
def test_a_switch_or_a_number_of_another_kind_is_refused(kind: Any, value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(value)


def test_a_switch_or_a_number_is_written_as_it_is_read() -> None:
    assert (show_flag(True), show_flag(False)) == ("true", "false")
    assert (show_number(10.0), show_number(0.2)) == ("10", "0.2")
