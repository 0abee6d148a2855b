"""HPACK (RFC 7541): a node's header blocks are decoded, ours are encoded.

What we send needs no state, so only the decoder has a dynamic table.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Appendix A, from index 1.
_STATIC = tuple(
    (name.encode(), value.encode())
    for name, _, value in (
        line.partition("=")
        for line in """\
:authority
:method=GET
:method=POST
:path=/
:path=/index.html
:scheme=http
:scheme=https
:status=200
:status=204
:status=206
:status=304
:status=400
:status=404
:status=500
accept-charset
accept-encoding=gzip, deflate
accept-language
accept-ranges
accept
access-control-allow-origin
age
allow
authorization
cache-control
content-disposition
content-encoding
content-language
content-length
content-location
content-range
content-type
cookie
date
etag
expect
expires
from
host
if-match
if-modified-since
if-none-match
if-range
if-unmodified-since
last-modified
link
location
max-forwards
proxy-authenticate
proxy-authorization
range
referer
refresh
retry-after
server
set-cookie
strict-transport-security
transfer-encoding
user-agent
vary
via
www-authenticate""".splitlines()
    )
)
_FIRST_DYNAMIC = len(_STATIC) + 1
_ENTRY_OVERHEAD = 32  # bytes that each entry of the dynamic table counts more than its name and value
_MOST_UPDATES = 2  # of the table's size in one block: the smallest since the last one, and the final
_MOST_CONTINUATION = 5  # bytes of an integer after its first: up to 2**35

#: Appendix B: bits of the code of each byte, and of EOS at last. The code is canonical: these tell all of it.
_APPENDIX_B = """
13 23 28 28 28 28 28 28 28 24 30 28 28 30 28 28 28 28 28 28 28 28 30 28 28 28 28 28 28 28 28 28
6 10 10 12 13 6 8 11 10 10 8 11 8 6 6 6 5 5 5 6 6 6 6 6 6 6 7 8 15 6 12 10
13 6 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 8 7 8 13 19 13 14 6
15 5 6 5 6 5 6 6 6 5 7 7 6 6 6 5 6 7 6 5 5 6 7 7 7 7 7 15 11 14 13 28
20 22 20 20 22 22 22 23 22 23 23 23 23 23 24 23 24 24 22 23 24 23 23 23 23 21 22 23 22 23 23 24
22 21 20 22 22 23 23 21 23 22 22 24 21 22 23 23 21 21 22 21 23 22 23 23 20 22 22 22 23 22 22 23
26 26 20 19 22 23 22 25 26 26 26 27 27 26 24 25 19 21 26 27 27 26 27 24 21 21 26 26 28 27 27 27
20 24 20 21 22 21 21 23 22 22 25 25 24 24 26 23 26 27 26 26 27 27 27 27 27 28 27 27 27 27 27 26
30"""
_CODE_BITS = bytes(map(int, _APPENDIX_B.split()))
_EOS = len(_CODE_BITS) - 1
_EOS_PATH = (2 << _CODE_BITS[_EOS]) - 1
_LONGEST_PADDING = 0xFF  # the path of 7 ones

#: Begins a block and says that the dynamic table is empty, and stays so.
NO_TABLE = b"\x20"

_CACHED_STRINGS = 1024
_CACHED_BYTES = 256


class HpackError(Exception):
    """The block is broken; the connection's state is lost with it (COMPRESSION_ERROR)."""


class Decoder:
    """One direction of a connection: its dynamic table, through all of its blocks in their order."""

    __slots__ = ("_capacity", "_limit", "_room", "_table")

    def __init__(self, table_size: int = 4096) -> None:
        """Start with an empty dynamic table.

        Args:
            table_size: bytes that it holds, until the other side lowers them; 4096 unless both sides agreed
                on others before the first block.
        """
        self._limit = self._capacity = self._room = table_size
        #: ((name, value), bytes of both) by index, so that the dynamic table stands with its newest at 62.
        self._table = _STATIC_TABLE.copy()

    def decode(self, block: bytes, most: int) -> tuple[list[tuple[bytes, bytes]], int]:
        """Return the fields of a header block, and the bytes of their names and values together.

        Fields beyond `most` bytes are left out of the list, though they are counted and the dynamic table is
        kept right: a block of references to a long entry costs the memory of none.

        Raises:
            HpackError: for the first thing in it that RFC 7541 does not allow.
        """
        fields: list[tuple[bytes, bytes]] = []
        total = at = 0
        end = len(block)
        table = self._table
        try:
            if end and 0x20 <= block[0] < 0x40:
                at = self._resize(block)
            while at < end:
                head = block[at]
                if 0x80 < head < 0xFF:  # most fields are these: one byte, their index
                    field, size = table[head & 0x7F]
                    at += 1
                elif head >= 0x80:
                    index, at = _integer(block, at, 0x7F)
                    if not index:
                        raise HpackError("a field has index 0")
                    field, size = table[index]
                else:
                    field, size, at = self._literal(block, at)
                total += size
                if total <= most:
                    fields.append(field)
        except IndexError:
            raise HpackError("an index is in no table, or the block is cut") from None
        if at != end:
            raise HpackError("a string is longer than the block")
        return fields, total

    def _literal(self, block: bytes, at: int) -> tuple[tuple[bytes, bytes], int, int]:
        """Return a literal field, its bytes, and where the next field begins, which may be beyond the block.

        Raises:
            HpackError: it is none.
            IndexError: its index is in no table, or the block ends before its value.
        """
        head = block[at]
        if head >= 0x40:
            full = 0x3F
        elif head < 0x20:
            full = 0x0F  # without indexing, or never indexed
        else:
            raise HpackError("the table's size changes where no block begins, or more than twice")
        index = head & full
        if index == full:
            index, at = _integer(block, at, full)
        else:
            at += 1
        if index:
            name = self._table[index][0][0]
        else:
            name, at = _string(block, at)
        length = block[at]
        if length < 0x7F:  # most values: plain, and short
            at += 1
            value = block[at : at + length]
            at += length
        else:
            value, at = _string(block, at)
        field = name, value
        size = len(name) + len(value)
        if head >= 0x40:
            self._table.insert(_FIRST_DYNAMIC, (field, size))
            self._room -= size + _ENTRY_OVERHEAD
            self._evict()
        return field, size, at

    def _resize(self, block: bytes) -> int:
        """Do the updates of the table's size with which a block begins; return where its fields begin."""
        at = 0
        for _ in range(_MOST_UPDATES):
            if at == len(block) or not 0x20 <= block[at] < 0x40:
                break
            capacity, at = _integer(block, at, 0x1F)
            if capacity > self._limit:
                raise HpackError("the table's size is above its limit")
            self._room += capacity - self._capacity
            self._capacity = capacity
            self._evict()
        return at

    def _evict(self) -> None:
        """Take out the oldest entries until all fit: also the newest, if it is larger than the table."""
        room = self._room
        while room < 0:
            room += self._table.pop()[1] + _ENTRY_OVERHEAD
        self._room = room


def encode(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a header block of `fields`, names in lower case, that leaves the other side's table as it is."""
    parts = []
    for field in fields:
        part = _ENCODED_FIELDS.get(field)
        if part is None:
            name, value = field
            head = _ENCODED_NAMES.get(name)
            if head is None:
                head = b"\x00" + _encode_length(len(name)) + name
            part = head + _encode_length(len(value)) + value
        parts.append(part)
    return b"".join(parts)


def _encode_length(length: int) -> bytes:
    return length.to_bytes(1, "big") if length < 0x7F else _encode_integer(length, 0x7F)


def _encode_integer(value: int, full: int) -> bytes:
    """Return `value` after a prefix whose bits are those of `full`, the bits before them 0."""
    if value < full:
        return bytes((value,))
    out = bytearray((full,))
    value -= full
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(block: bytes, at: int, full: int) -> tuple[int, int]:
    """Return the integer at `at`, in a prefix with the bits of `full`, and where the next thing begins.

    Raises:
        HpackError: it is of too many bytes.
        IndexError: the block ends before it does.
    """
    value = block[at] & full
    at += 1
    if value < full:
        return value, at
    for shift in range(0, 7 * _MOST_CONTINUATION, 7):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise HpackError("an integer is too long")


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    """Return the string at `at` and where the next thing begins; beyond the block if the string is cut.

    Raises:
        HpackError: its length or its Huffman code is broken.
        IndexError: the block ends before its length does.
    """
    huffman = block[at] & 0x80
    length, at = _integer(block, at, 0x7F)
    end = at + length
    text = block[at:end]
    if not huffman:
        return text, end
    return (_plain_of_short if length <= _CACHED_BYTES else _plain)(text), end


class _Step(dict[int, tuple["_Step", bytes]]):
    """Where each next byte leads from within the code's tree, and the symbols that it completes.

    A step is worked out when a string first needs it. There are 256 x 256 at most, in 8 MB, of which usual
    text needs some thousand.
    """

    __slots__ = ("path",)

    def __init__(self, path: int) -> None:
        super().__init__()
        #: The bits since the last symbol, after a leading 1.
        self.path = path

    def __missing__(self, byte: int) -> tuple[_Step, bytes]:
        path = self.path
        symbols = b""
        for shift in range(7, -1, -1):
            path = path << 1 | byte >> shift & 1
            if path in _SYMBOLS:
                symbols += _SYMBOLS[path]
                path = 1
            elif path == _EOS_PATH:
                raise HpackError("EOS stands in a string")
        if path not in _STEPS:
            _STEPS[path] = _Step(path)
        found = self[byte] = _STEPS[path], symbols
        return found


def _plain(text: bytes) -> bytes:
    """Return what `text` is the Huffman code of."""
    step = _STEPS[1]
    out = []
    for byte in text:
        step, symbols = step[byte]
        out.append(symbols)
    if step.path & (step.path + 1) or step.path > _LONGEST_PADDING:
        raise HpackError("a string's padding is too long, or not all ones")
    return b"".join(out)


#: Nodes repeat names and values. At most 1 MB: 1024 times 256 bytes, the up to 410 of their plain text, and
#: some 200 around them.
_plain_of_short = lru_cache(_CACHED_STRINGS)(_plain)


def _codes() -> Iterator[tuple[int, bytes]]:
    """Yield the path of each byte in the code's tree: the bits of its code after a leading 1."""
    code = bits = 0
    for symbol in sorted(range(_EOS), key=_CODE_BITS.__getitem__):
        code <<= _CODE_BITS[symbol] - bits
        bits = _CODE_BITS[symbol]
        yield 1 << bits | code, bytes((symbol,))
        code += 1


_SYMBOLS = dict(_codes())
_STEPS = {1: _Step(1)}
_STATIC_TABLE = [((b"", b""), 0), *((field, len(field[0]) + len(field[1])) for field in _STATIC)]
_ENCODED_FIELDS = {field: bytes((0x80 | index,)) for index, field in zip(count(1), _STATIC, strict=False)}
#: Several have a name: its first index is the shortest.
_ENCODED_NAMES = {
    name: _encode_integer(index, 0x0F)
    for index, (name, _) in reversed(list(zip(count(1), _STATIC, strict=False)))
}
