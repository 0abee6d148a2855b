"""Value types of the settings: addresses, URLs, durations, sizes, networks, numbers and switches.

Each type is parsed from what a person writes and says, when it cannot be, what would be right.
"""

import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?", re.ASCII)
_HOST_PORT = re.compile(r"(?:\[(?P<v6>[^\[\]]*)\]|(?P<name>[^\[\]:]*))(?::(?P<port>[0-9]{1,5}))?", re.ASCII)
_URL = re.compile(
    r"(?P<scheme>[^:/?#@]+)://(?P<userinfo>[^/?#]*@)?(?P<authority>[^/?#@]*)(?P<rest>.*)", re.DOTALL
)
_QUANTITY = re.compile(r"(?P<number>[0-9]{1,18}(?:\.[0-9]{1,18})?) ?(?P<unit>[A-Za-z]*)", re.ASCII)

_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_A_DURATION = "a number of seconds, or a duration such as 500ms, 25s or 2m"
_DEFAULT_PORTS = {"http": 80, "https": 443}
_ANY_IPV4 = "0.0.0.0"  # noqa: S104 - what `:8080` means; nothing is bound here
_ANY_IPV6 = "::"


@dataclass(frozen=True, slots=True)
class Doc:
    """What the reference page says of a type: its name, and how a value (or the whole default) is written.

    A value that is `secret` is never repeated in a problem.
    """

    kind: str
    show: Callable[..., str] = str
    default: str | None = None
    secret: bool = False


@dataclass(frozen=True, slots=True)
class HostPort:
    """An address to listen on. `host` is a name, or an IP address without brackets; port 0 is a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return _authority(self.host, self.port)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "host:port", "[::1]:port", or ":port" for every IPv4 interface. Raises ValueError."""
        host, port = _host_port(f"{_ANY_IPV4}{text}" if text.startswith(":") else text)
        if port is None:
            raise ValueError("has no port: write host:port, such as 0.0.0.0:8080")
        return cls(host, port)

    def overlaps(self, other: "HostPort") -> bool:
        """Whether both cannot be bound at once: same port, and the same host, or one includes the other."""
        if self.port != other.port or self.port == 0:
            return False
        return self.host == other.host or _includes(self.host, other.host) or _includes(other.host, self.host)


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """Scheme, host (without brackets) and port of a server; the port is always filled in."""

    scheme: str
    host: str
    port: int

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted (https)."""
        return self.scheme == "https"

    @property
    def authority(self) -> str:
        """The value of a Host header: the scheme's own port is left out."""
        return _authority(self.host, None if self.port == _DEFAULT_PORTS[self.scheme] else self.port)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "http://host[:port]" or "https://host[:port]". Raises ValueError."""
        match = _URL.fullmatch(text)
        if match is None or match["scheme"] not in _DEFAULT_PORTS:
            raise ValueError("must be a URL with http or https, such as http://superlink:8000")
        if match["userinfo"]:
            raise ValueError("must not hold a user name or password: write http://host:port")
        if match["rest"] not in ("", "/"):
            raise ValueError("must not have a path, a query or a fragment: write http://host:port")
        host, port = _host_port(match["authority"])
        if port == 0:
            raise ValueError("must have a port from 1 to 65535")
        return cls(match["scheme"], host, _DEFAULT_PORTS[match["scheme"]] if port is None else port)


_REDIS_RIGHT = "must be a URL: redis://redis:6379/0, rediss://... for TLS, or unix:///run/redis.sock"
_REDIS_OPTIONS = {"db", "ssl_ca_certs"}


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """Where a Redis server is, and how it is entered. `text` holds the password; str() does not."""

    text: str = field(repr=False)

    def __str__(self) -> str:
        url = urlsplit(self.text)
        entry = "***@" if "@" in url.netloc else ""
        return f"{url.scheme}://{entry}{url.netloc.rpartition('@')[2]}{url.path}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "redis[s]://[user:password@]host[:port][/db]" or "unix:///path[?db=1]". Raises ValueError."""
        try:
            url = urlsplit(text)
            port, options = url.port, parse_qs(url.query, strict_parsing=True) if url.query else {}
        except ValueError:
            raise ValueError(_REDIS_RIGHT) from None
        schemes = ("redis", "rediss", "unix")
        if url.scheme not in schemes or url.fragment or not options.keys() <= _REDIS_OPTIONS:
            raise ValueError(_REDIS_RIGHT)
        if url.scheme == "unix":
            sound = url.path.startswith("/") and not url.hostname
        else:
            sound = bool(url.hostname) and port != 0 and re.fullmatch(r"(/[0-9]{0,3})?", url.path) is not None
        if not sound:
            raise ValueError(_REDIS_RIGHT)
        return cls(text)


def _authority(host: str, port: int | None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def _host_port(text: str) -> tuple[str, int | None]:
    match = _HOST_PORT.fullmatch(text)
    if match is None:
        raise ValueError("must be host:port, such as 0.0.0.0:8080 or [::1]:8080")
    if match["v6"] is not None:
        try:
            host = str(ipaddress.IPv6Address(match["v6"]))
        except ValueError:
            raise ValueError("has brackets around something that is no IPv6 address") from None
    else:
        host = _host_name(match["name"])
    port = None if match["port"] is None else int(match["port"])
    if port is not None and port > 65535:
        raise ValueError("has a port above 65535")
    return host, port


def _host_name(name: str) -> str:
    if not _HOST_NAME.fullmatch(name):
        raise ValueError("has no valid host: it must be a host name or an IP address")
    if re.fullmatch(r"[0-9.]+", name):
        try:
            ipaddress.IPv4Address(name)
        except ValueError:
            raise ValueError("has a host of digits and dots that is no IPv4 address") from None
    return name


def _includes(wildcard: str, host: str) -> bool:
    """Whether `wildcard` is the any-address of the IP version that `host` is written in."""
    if wildcard not in (_ANY_IPV4, _ANY_IPV6):
        return False
    try:
        return ipaddress.ip_address(host).version == ipaddress.ip_address(wildcard).version
    except ValueError:  # a name: only the system knows what it stands for
        return False


def _quantity(value: object, units: Mapping[str, float], right: str, *, zero: bool = False) -> float:
    """A finite number above zero (or zero) times its unit. Raises ValueError with `right`: what to write."""
    number, unit = value, ""
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value.strip())):
        number = float(match["number"]) if "." in match["number"] else int(match["number"])
        unit = match["unit"]
    if isinstance(number, bool) or not isinstance(number, int | float) or unit not in units:
        raise ValueError(f"must be {right}")
    try:
        amount = number * units[unit]
        usable = math.isfinite(amount) and (amount >= 0 if zero else amount > 0)
    except OverflowError:
        usable = False
    if not usable:
        raise ValueError(f"must be {'at least' if zero else 'above'} zero and finite: {right}")
    return amount


def _parse_seconds(value: object) -> float:
    return float(_quantity(value, _SECONDS, _A_DURATION))


def _parse_seconds_or_zero(value: object) -> float:
    return float(_quantity(value, _SECONDS, _A_DURATION, zero=True))


def _parse_bytes(value: object) -> int:
    right = "a number of bytes, or a size such as 512KiB, 64MiB or 4GiB"
    amount = _quantity(value, _BYTES, right)
    if amount != int(amount):
        raise ValueError(f"must be a whole number of bytes: {right}")
    return int(amount)


def _parse_bytes_or_zero(value: object) -> int:
    return 0 if value in (0, "0") and not isinstance(value, bool) else _parse_bytes(value)


def show_seconds(seconds: float) -> str:
    """Write a duration as the settings accept it: 0.5 is "500ms", 25.0 is "25s"."""
    return f"{seconds * 1000:g}ms" if 0 < seconds < 1 else f"{seconds:g}s"


def show_flag(flag: bool) -> str:
    """Write a switch as YAML does."""
    return "true" if flag else "false"


def show_number(number: float) -> str:
    """Write a number without decimals that say nothing: 10.0 is "10"."""
    return f"{number:g}"


def show_bytes(size: int) -> str:
    """Write a size as the settings accept it, in the largest unit that divides it."""
    unit = max((unit for unit in _BYTES if unit and size % _BYTES[unit] == 0), key=lambda unit: _BYTES[unit])
    return f"{size // _BYTES[unit]}{unit}"


def _parse_address(value: object) -> HostPort:
    if isinstance(value, HostPort):
        return value
    if not isinstance(value, str):
        raise ValueError("must be host:port, such as 0.0.0.0:8080")  # noqa: TRY004 - pydantic collects ValueError
    return HostPort.parse(value)


def _parse_url(value: object) -> BaseUrl:
    if isinstance(value, BaseUrl):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a URL such as http://superlink:8000")  # noqa: TRY004 - pydantic collects ValueError
    return BaseUrl.parse(value)


def _parse_redis(value: object) -> RedisUrl:
    if isinstance(value, RedisUrl):
        return value
    if not isinstance(value, str):
        raise ValueError(_REDIS_RIGHT)  # noqa: TRY004 - pydantic collects ValueError
    return RedisUrl.parse(value)


def _parse_network(value: object) -> IPv4Network | IPv6Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    right = "must be a network or an IP address, such as 10.0.0.0/8"
    if not isinstance(value, str):
        raise ValueError(right)  # noqa: TRY004 - pydantic collects ValueError
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError(right) from None
    try:
        return ipaddress.ip_network(value)
    except ValueError:
        raise ValueError(f"names an address inside a network: write {network}") from None


def below(limit: float, why: str) -> AfterValidator:
    """A check that a duration is shorter than `limit` seconds, which names the reason when it is not."""

    def check(seconds: float) -> float:
        if seconds >= limit:
            raise ValueError(f"must be shorter than {show_seconds(limit)}: {why}")
        return seconds

    return AfterValidator(check)


Address = Annotated[HostPort, PlainValidator(_parse_address), Doc("`host:port`")]
Url = Annotated[BaseUrl, PlainValidator(_parse_url), Doc("URL")]
RedisServer = Annotated[RedisUrl, PlainValidator(_parse_redis), Doc("URL", secret=True)]
Network = Annotated[IPv4Network | IPv6Network, PlainValidator(_parse_network), Doc("network")]
Seconds = Annotated[float, BeforeValidator(_parse_seconds), Doc("duration", show_seconds)]
SecondsOrZero = Annotated[float, BeforeValidator(_parse_seconds_or_zero), Doc("duration, or 0", show_seconds)]
Bytes = Annotated[int, BeforeValidator(_parse_bytes), Doc("size", show_bytes)]
BytesOrZero = Annotated[int, BeforeValidator(_parse_bytes_or_zero), Doc("size, or 0", show_bytes)]
Flag = Annotated[bool, Field(strict=True), Doc("`true` or `false`", show_flag)]
Share = Annotated[
    float, Field(strict=True, ge=0, le=1, allow_inf_nan=False), Doc("number, 0 to 1", show_number)
]
Rate = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), Doc("number above 0", show_number)]
