"""How an API key looks: `flwr_<id>_<secret>`, letters and digits alone, so that it fits into a URL.

    flwr_   marks it, for people and for scanners that look for leaked secrets
    id      8 characters, public: names the key in lists, logs and commands
    secret  43 random characters of 62, which is 256 bits, and 6 that are a checksum of all before them

The checksum is CRC-32 in base 62, as in GitHub's tokens: a key that lost a character on its way is told apart
from one that was never made. It proves nothing.
"""

from __future__ import annotations

import re
import secrets
import zlib
from typing import NamedTuple

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID, _RANDOM, _CHECK = 8, 43, 6
_SHAPE = re.compile(rb"flwr_([0-9A-Za-z]{%d})_([0-9A-Za-z]{%d})" % (_ID, _RANDOM + _CHECK))

ID = re.compile(f"[0-9A-Za-z]{{{_ID}}}")


class Key(NamedTuple):
    """The two parts of a key, as they stand in it."""

    id: bytes
    secret: bytes

    def __str__(self) -> str:
        """Return the whole key. Not `repr`, which logs and tracebacks show."""
        return (b"flwr_%b_%b" % self).decode("ascii")

    def __repr__(self) -> str:
        return f"Key(id={self.id!r})"

    @property
    def intact(self) -> bool:
        """Whether the checksum fits."""
        return self.secret[_RANDOM:] == _checksum(b"flwr_%b_%b" % (self.id, self.secret[:_RANDOM]))


def generate() -> Key:
    """Make a key from the system's source of randomness."""
    key_id = _random(_ID)
    random = _random(_RANDOM)
    return Key(key_id, random + _checksum(b"flwr_%b_%b" % (key_id, random)))


def parse(text: bytes) -> Key | None:
    """Return the parts of a key; None for what does not look like one. The checksum is not looked at."""
    match = _SHAPE.fullmatch(text)
    return Key(match[1], match[2]) if match is not None else None


def _random(length: int) -> bytes:
    return "".join(secrets.choice(_DIGITS) for _ in range(length)).encode("ascii")


def _checksum(text: bytes) -> bytes:
    number = zlib.crc32(text)
    digits = ""
    for _ in range(_CHECK):
        number, digit = divmod(number, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits.encode("ascii")
