"""Header blocks: the examples of RFC 7541, round trips, and what a hostile node may send."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.wires import hpack
from relay.wires.hpack import Decoder, HpackError, encode

ANY = 1 << 30
Fields = list[tuple[bytes, bytes]]


def named(text: str) -> Fields:
    """Return the fields of `text`, which has one a line, as RFC 7541 writes them."""
    pairs = (line.strip().split(": ", 1) for line in text.strip().splitlines())
    return [(name.encode(), value.encode()) for name, value in pairs]


def dynamic(decoder: Decoder) -> Fields:
    """Return the entries of the dynamic table, the newest first, as references to them tell."""
    entries: Fields = []
    while True:
        try:
            entries += decoder.decode(indexed(62 + len(entries)), ANY)[0]
        except HpackError:
            return entries


def size(entries: Fields) -> int:
    return sum(len(name) + len(value) + 32 for name, value in entries)


def integer(value: int, bits: int, kind: int = 0) -> bytes:
    """Return `value` in a prefix of `bits`, after the bits that `kind` has set before them."""
    full = (1 << bits) - 1
    if value < full:
        return bytes((kind | value,))
    out = [kind | full]
    value -= full
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes((*out, value))


def indexed(index: int) -> bytes:
    return integer(index, 7, 0x80)


def string(text: bytes) -> bytes:
    return integer(len(text), 7) + text


def coded(text: bytes) -> bytes:
    """Return a string whose Huffman code is `text`."""
    return integer(len(text), 7, 0x80) + text


def entry(name: bytes, value: bytes) -> bytes:
    """Return a field that goes into the dynamic table."""
    return b"\x40" + string(name) + string(value)


def resized(capacity: int) -> bytes:
    return integer(capacity, 5, 0x20)


def huffman(text: bytes) -> bytes:
    """Return the Huffman code of `text`, padded."""
    paths = {symbol[0]: path for path, symbol in hpack._SYMBOLS.items()}
    bits = "".join(f"{paths[byte]:b}"[1:] for byte in text)
    bits += "1" * (-len(bits) % 8)
    return int("0" + bits, 2).to_bytes(len(bits) // 8, "big")


# --- RFC 7541, appendix C

REQUESTS = [
    """
    :method: GET
    :scheme: http
    :path: /
    :authority: www.example.com
    """,
    """
    :method: GET
    :scheme: http
    :path: /
    :authority: www.example.com
    cache-control: no-cache
    """,
    """
    :method: GET
    :scheme: https
    :path: /index.html
    :authority: www.example.com
    custom-key: custom-value
    """,
]
REQUEST_TABLES = [
    """
    :authority: www.example.com
    """,
    """
    cache-control: no-cache
    :authority: www.example.com
    """,
    """
    custom-key: custom-value
    cache-control: no-cache
    :authority: www.example.com
    """,
]
RESPONSES = [
    """
    :status: 302
    cache-control: private
    date: Mon, 21 Oct 2013 20:13:21 GMT
    location: https://www.example.com
    """,
    """
    :status: 307
    cache-control: private
    date: Mon, 21 Oct 2013 20:13:21 GMT
    location: https://www.example.com
    """,
    """
    :status: 200
    cache-control: private
    date: Mon, 21 Oct 2013 20:13:22 GMT
    location: https://www.example.com
    content-encoding: gzip
    set-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1
    """,
]
RESPONSE_TABLES = [
    """
    location: https://www.example.com
    date: Mon, 21 Oct 2013 20:13:21 GMT
    cache-control: private
    :status: 302
    """,
    """
    :status: 307
    location: https://www.example.com
    date: Mon, 21 Oct 2013 20:13:21 GMT
    cache-control: private
    """,
    """
    set-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1
    content-encoding: gzip
    date: Mon, 21 Oct 2013 20:13:22 GMT
    """,
]
C3 = [
    "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
    "8286 84be 5808 6e6f 2d63 6163 6865",
    "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
]
C4 = [
    "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
    "8286 84be 5886 a8eb 1064 9cbf",
    "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
]
C5 = [
    """4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32
    3120 474d 546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d""",
    "4803 3330 37c1 c0bf",
    """88c1 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3220 474d 54c0 5a04 677a 6970
    7738 666f 6f3d 4153 444a 4b48 514b 425a 584f 5157 454f 5049 5541 5851 5745 4f49 553b 206d 6178 2d61
    6765 3d33 3630 303b 2076 6572 7369 6f6e 3d31""",
]
C6 = [
    """4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad
    1718 63c7 8f0b 97c8 e9ae 82ae 43d3""",
    "4883 640e ffc1 c0bf",
    """88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2
    e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07""",
]


@pytest.mark.parametrize(
    ("capacity", "blocks", "fields", "tables", "sizes"),
    [
        (4096, C3, REQUESTS, REQUEST_TABLES, [57, 110, 164]),
        (4096, C4, REQUESTS, REQUEST_TABLES, [57, 110, 164]),
        (256, C5, RESPONSES, RESPONSE_TABLES, [222, 222, 215]),
        (256, C6, RESPONSES, RESPONSE_TABLES, [222, 222, 215]),
    ],
    ids=["C.3", "C.4", "C.5", "C.6"],
)
def test_the_examples_of_connections(
    capacity: int, blocks: list[str], fields: list[str], tables: list[str], sizes: list[int]
) -> None:
    decoder = Decoder(capacity)
    for block, wanted, table, bytes_held in zip(blocks, fields, tables, sizes, strict=True):
        assert decoder.decode(bytes.fromhex(block), ANY)[0] == named(wanted)
        assert dynamic(decoder) == named(table)
        assert size(dynamic(decoder)) == bytes_held


@pytest.mark.parametrize(
    ("block", "wanted", "remembered"),
    [
        (
            "400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572",
            "custom-key: custom-header",
            True,
        ),
        ("040c 2f73 616d 706c 652f 7061 7468", ":path: /sample/path", False),
        ("1008 7061 7373 776f 7264 0673 6563 7265 74", "password: secret", False),
        ("82", ":method: GET", False),
    ],
    ids=["C.2.1", "C.2.2", "C.2.3", "C.2.4"],
)
def test_the_examples_of_fields(block: str, wanted: str, remembered: bool) -> None:
    decoder = Decoder()
    assert decoder.decode(bytes.fromhex(block), ANY)[0] == named(wanted)
    assert dynamic(decoder) == (named(wanted) if remembered else [])


def test_the_example_of_an_integer() -> None:
    decoder = Decoder()
    decoder.decode(bytes.fromhex("3f9a0a"), ANY)  # C.1.2: 1337 in 5 bits
    decoder.decode(entry(b"n" * 600, b"v" * 673), ANY)
    assert size(dynamic(decoder)) == 1305
    decoder.decode(entry(b"n" * 600, b"v" * 705), ANY)
    assert size(dynamic(decoder)) == 1337
    decoder.decode(entry(b"n" * 600, b"v" * 706), ANY)
    assert dynamic(decoder) == []


# --- Huffman

#: The code of the bytes 0 to 255 in their order, as another implementation writes it.
ALL_BYTES = """
ffc7fffd8fffffe2fffffe3fffffe4fffffe5fffffe6fffffe7fffffe8ffffeafffffff3fffffa7fffffabffffffdfffffeb
fffffecfffffedfffffeefffffefffffff0ffffff1ffffff2fffffffbfffffcffffffd3fffffd7fffffdbfffffdffffffe3f
ffffe7fffffebfffffed4fe3f9ffaffcabf1febfafefe7fdfd2cbb00089969b71d79fb9f7fff20ffbff3ff50ddbd7f061c58
f265cd9f469d5af66dddbf871e5f9cff7ff7fffc3ff9ffe45fff4719242cb34e6e9d68a6a3d7dac426defe3cfaf7fffbfe7f
fbffdffffffcfffe6ffff4bfff9ffffa3fffd3ffff53fffd5ffffb3fffeb7fffdaffffb7ffff73fffeeffffdeffffebffffb
fffffd9ffffdbfffebffffe0ffffeeffffc3ffff8bffff1ffffe4fffee7fffb1ffff97fffd9ffffcdffff9fffffbffffdaff
feeffff4ffffb7fffee7fffe8ffffd3fffdeffffd5fffeeffffbdffffe1fffdfffff7fffff5ffffecffff07fff87fffe0fff
f17fffedffff87ffff77fffeffffeaffff8bfffe3ffff93ffff87fffcbffff37ffff1fffff83ffffe1fffebfffe3ffff3fff
ff2ffffa3ffffd9fffff17ffffc7fffff27ffffdefffffbffffff2fffff8fffffb7fff97fff8fffffe6fffffc1fffff87fff
fe7fffffc5ffffe5fffe4ffff2fffffd1fffff4ffffffefffffe3fffffc9fffff97fffb3ffffcffffb7fffcdffff4ffff9ff
ffd1ffffcffffeaffffafffffddffffeffffff4fffff5fffffabffffa7ffffd7fffff9bffffecfffffb7fffff3fffffe8fff
ffd3fffffabfffff5fffffff7ffffecfffffdbfffffbbfffff7ffffff0fffffbbf
"""


def test_the_code_of_each_byte() -> None:
    text = coded(bytes.fromhex(ALL_BYTES))
    assert Decoder().decode(b"\x00" + text + text, ANY) == ([(bytes(range(256)),) * 2], 512)


@given(st.binary(max_size=300) | st.text(alphabet="abcdefghijklm/0123+=", max_size=600).map(str.encode))
def test_a_string_is_what_its_code_says(text: bytes) -> None:
    assert Decoder().decode(b"\x04" + coded(huffman(text)), ANY)[0] == [(b":path", text)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ffffffff", "EOS"),  # its 30 bits, and 2 more
        ("07fffffff8", "EOS"),  # 0, EOS, and 5 bits
        ("ff" * 500, "EOS"),
        ("ff", "padding"),
        ("07ff", "padding"),  # 0, and 11 ones
        ("1ffffe", "padding"),  # a, 18 ones and a zero: the beginning of a longer code
        ("00", "padding"),  # 0, and 3 zeros
        ("1e", "padding"),  # a, and 110
    ],
)
def test_a_code_that_ends_wrong_is_refused(text: str, why: str) -> None:
    block = b"\x04" + coded(bytes.fromhex(text))
    for _ in range(2):  # an error is not remembered as something else
        with pytest.raises(HpackError, match=why):
            Decoder().decode(block, ANY)


def test_up_to_seven_ones_are_padding() -> None:
    for text in (b"", b"0", b"00", b"000", b"0000", b"00000", b"000000", b"0000000", b"X"):
        code = huffman(text)
        assert len(code) == (len(text) * 5 + 7) // 8 or text == b"X"
        assert Decoder().decode(b"\x04" + coded(code), ANY)[0] == [(b":path", text)]


def test_long_strings_are_decoded_as_short_ones_are() -> None:
    for length in (1, 255, 256, 257, 408, 409, 410, 411, 9000):
        text = b"a/0=b" * length
        assert Decoder().decode(b"\x04" + coded(huffman(text)), ANY) == ([(b":path", text)], 5 + len(text))


def test_long_strings_are_not_kept() -> None:
    def kept() -> int:
        return hpack._plain_of_short.cache_info().currsize

    hpack._plain_of_short.cache_clear()
    Decoder().decode(b"\x04" + coded(huffman(b"0" * 411)), ANY)  # 257 bytes
    assert kept() == 0
    Decoder().decode(b"\x04" + coded(huffman(b"0" * 409)), ANY)
    assert kept() == 1


# --- what is broken

STATIC_END = b"\xbd"


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (b"\x80", "index 0"),
        (indexed(62), "in no table"),
        (indexed(63), "in no table"),
        (indexed(127), "in no table"),
        (indexed(500), "in no table"),
        (integer(62, 6, 0x40) + string(b"v"), "in no table"),
        (integer(62, 4, 0x00) + string(b"v"), "in no table"),
        (integer(62, 4, 0x10) + string(b"v"), "in no table"),
        (b"\xff", "cut"),
        (b"\xff\x80", "cut"),
        (b"\xff" + b"\x80" * 5, "too long"),
        (b"\xff" + b"\x80" * 5 + b"\x00", "too long"),
        (b"\xff" + b"\xff" * 4 + b"\x7f", "in no table"),
        (b"\x0f" + b"\xff" * 60, "too long"),
        (b"\x00\x7f" + b"\xff" * 60, "too long"),
        (b"\x3f" + b"\xff" * 60, "too long"),
        (b"\x3f", "cut"),
        (b"\x00", "cut"),
        (b"\x00\x01", "cut"),
        (b"\x00\x02n", "cut"),
        (b"\x00\x01n", "cut"),
        (b"\x00\x01n\x02v", "longer"),
        (b"\x00\x01n\x7f", "cut"),
        (b"\x00\x01n\x7f\x00v", "longer"),
        (b"\x00\x81\x07\x82\x07", "longer"),
        (b"\x00\xff\xff\xff\xff\xff\x7fn\x01v", "cut"),
        (b"\x04\xff\xff\xff\xff\xff\x7f" + bytes(40), "longer"),
        (b"\x40\x01n", "cut"),
        (b"\x10", "cut"),
        (b"\x82" + resized(100), "changes"),
        (resized(0) + b"\x82" + resized(100), "changes"),
        (resized(0) + resized(100) + resized(200), "changes"),
        (resized(4097), "limit"),
        (resized(100) + resized(4097), "limit"),
        (resized(1 << 30), "limit"),
    ],
)
def test_a_broken_block_is_refused(block: bytes, why: str) -> None:
    for before in (b"", b"" if 0x20 <= block[0] < 0x40 else STATIC_END):
        with pytest.raises(HpackError, match=why):
            Decoder().decode(before + block, ANY)


def test_the_last_index_of_the_static_table() -> None:
    assert Decoder().decode(STATIC_END, ANY) == ([(b"www-authenticate", b"")], 16)


def test_nothing_is_a_block() -> None:
    assert Decoder().decode(b"", 0) == ([], 0)


def test_an_integer_has_up_to_five_bytes_after_its_first() -> None:
    block = b"\x0f\x80\x80\x80\x80\x00\x01v"
    assert Decoder().decode(block, ANY)[0] == [(b"accept-charset", b"v")]


@given(st.binary(max_size=60), st.lists(st.binary(max_size=60), max_size=3), st.integers(0, 4096))
def test_garbage_raises_nothing_else(start: bytes, blocks: list[bytes], most: int) -> None:
    decoder = Decoder()
    decoder.decode(entry(b"n", b"v") + entry(b"name", b"value") * 3, ANY)
    for block in (start, *blocks):
        try:
            fields, total = decoder.decode(block, most)
        except HpackError:
            return
        listed = sum(len(name) + len(value) for name, value in fields)
        assert listed <= min(total, most)
        assert listed == total or total > most


@given(st.data())
def test_a_block_that_is_cut_or_changed_raises_nothing_else(data: st.DataObject) -> None:
    block = bytearray(bytes.fromhex(data.draw(st.sampled_from(C3[2:] + C4[2:] + C5[:1] + C6[:1]))))
    block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    decoder = Decoder()
    try:
        decoder.decode(bytes(block[: data.draw(st.integers(0, len(block)))]), ANY)
    except HpackError:
        return
    assert size(dynamic(decoder)) <= 4096


# --- the dynamic table


def test_the_oldest_entries_make_room() -> None:
    decoder = Decoder(3 * 34)
    for letter in b"abc":
        decoder.decode(entry(b"n", bytes((letter,))), ANY)
    assert dynamic(decoder) == [(b"n", b"c"), (b"n", b"b"), (b"n", b"a")]
    decoder.decode(entry(b"n", b"d"), ANY)
    assert dynamic(decoder) == [(b"n", b"d"), (b"n", b"c"), (b"n", b"b")]
    decoder.decode(entry(b"n", b"ee"), ANY)
    assert dynamic(decoder) == [(b"n", b"ee"), (b"n", b"d")]


def test_an_entry_larger_than_the_table_empties_it_and_is_a_field() -> None:
    decoder = Decoder(100)
    big = (b"n", b"v" * 68)
    assert decoder.decode(entry(b"a", b"b") + entry(*big) + b"\x82", ANY)[0][1] == big
    assert dynamic(decoder) == []
    assert decoder.decode(entry(b"n", b"v" * 67), ANY)
    assert dynamic(decoder) == [(b"n", b"v" * 67)]


def test_an_entry_may_take_its_name_from_the_one_that_it_puts_out() -> None:
    decoder = Decoder(100)
    decoder.decode(entry(b"name", b"v" * 60), ANY)
    assert decoder.decode(integer(62, 6, 0x40) + string(b"w" * 61), ANY)[0] == [(b"name", b"w" * 61)]
    assert dynamic(decoder) == [(b"name", b"w" * 61)]


def test_what_was_put_out_cannot_be_referred_to() -> None:
    decoder = Decoder(100)
    decoder.decode(entry(b"a", b"b") * 2, ANY)
    assert decoder.decode(indexed(63), ANY)[0] == [(b"a", b"b")]
    with pytest.raises(HpackError, match="in no table"):
        decoder.decode(entry(b"n", b"v" * 60) + indexed(63), ANY)


def test_a_smaller_table_puts_out_and_a_larger_one_does_not_bring_back() -> None:
    decoder = Decoder(200)
    decoder.decode(entry(b"a", b"1") + entry(b"a", b"2") + entry(b"a", b"3"), ANY)
    assert decoder.decode(resized(68) + resized(200) + b"\x82", ANY)[0] == [(b":method", b"GET")]
    assert dynamic(decoder) == [(b"a", b"3"), (b"a", b"2")]
    decoder.decode(entry(b"n", b"v" * 99), ANY)
    assert dynamic(decoder) == [(b"n", b"v" * 99), (b"a", b"3"), (b"a", b"2")]
    assert decoder.decode(resized(0), ANY) == ([], 0)
    assert dynamic(decoder) == []
    decoder.decode(entry(b"a", b"1"), ANY)
    assert dynamic(decoder) == []


def test_a_table_of_nothing_is_allowed() -> None:
    decoder = Decoder(0)
    assert decoder.decode(resized(0) + entry(b"a", b"1"), ANY) == ([(b"a", b"1")], 2)
    assert dynamic(decoder) == []


@given(
    st.integers(0, 300),
    st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=80)) | st.integers(0, 300), max_size=30),
)
def test_the_table_is_what_a_plain_one_is(limit: int, steps: list[tuple[bytes, bytes] | int]) -> None:
    decoder = Decoder(limit)
    table: Fields = []
    capacity = limit
    for step in steps:
        if isinstance(step, int):
            capacity = min(step, limit)
            decoder.decode(resized(capacity), ANY)
        else:
            decoder.decode(entry(*step), 0)
            table.insert(0, step)
        while size(table) > capacity:
            table.pop()
        assert dynamic(decoder) == table


# --- how much is taken


def test_fields_beyond_the_most_are_counted_and_remembered() -> None:
    decoder = Decoder()
    block = entry(b"a", b"12") + entry(b"b", b"34") + entry(b"c", b"5") + b"\x82"
    assert decoder.decode(block, 6) == ([(b"a", b"12"), (b"b", b"34")], 3 + 3 + 2 + 10)
    assert dynamic(decoder) == [(b"c", b"5"), (b"b", b"34"), (b"a", b"12")]
    assert decoder.decode(b"\xbe\xc0", 1) == ([], 5)
    assert decoder.decode(b"\xbe\xc0", 4) == ([(b"c", b"5")], 5)  # the sum alone says that a field is missing
    assert decoder.decode(b"\xbe\xc0", 5) == ([(b"c", b"5"), (b"a", b"12")], 5)


def test_a_field_that_fits_behind_one_that_does_not_is_left_out() -> None:
    assert Decoder().decode(entry(b"a", b"123") + entry(b"b", b""), 3) == ([], 5)


def test_a_bomb_of_references_costs_no_memory() -> None:
    decoder = Decoder()
    decoder.decode(entry(b"n", b"v" * 4063), 65536)
    assert len(dynamic(decoder)) == 1
    bomb = b"\xbe" * 20_000
    tracemalloc.start()
    try:
        fields, total = decoder.decode(bomb, 65536)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(fields), total) == (16, 20_000 * 4064)
    assert peak < 10_000


# --- what is sent


@given(
    st.lists(
        st.tuples(st.binary(max_size=300), st.binary(max_size=300))
        | st.sampled_from(hpack._STATIC)
        | st.tuples(st.sampled_from([name for name, _ in hpack._STATIC]), st.binary(max_size=300)),
        max_size=20,
    )
)
def test_what_is_encoded_is_decoded(fields: Fields) -> None:
    decoder = Decoder()
    total = sum(len(name) + len(value) for name, value in fields)
    assert decoder.decode(encode(fields), total) == (fields, total)
    assert dynamic(decoder) == []


@pytest.mark.parametrize(
    ("fields", "block"),
    [
        ([(b":status", b"200")], "88"),
        ([(b":status", b"201")], "08 03 32 30 31"),
        ([(b":path", b"/sample/path")], "040c 2f73 616d 706c 652f 7061 7468"),  # C.2.2
        ([(b"accept", b"")], "93"),
        ([(b"accept-charset", b"x")], "0f00 0178"),
        ([(b"content-type", b"a/b")], "0f10 0361 2f62"),
        ([(b"www-authenticate", b"x")], "0f2e 0178"),
        ([(b"a", b"")], "0001 6100"),
        ([(b":status", b"200"), (b"a", b"b"), (b":status", b"500")], "88 0001 6101 62 8e"),
        ([], ""),
    ],
)
def test_what_the_static_table_has_is_sent_by_its_index(fields: Fields, block: str) -> None:
    assert encode(iter(fields)) == bytes.fromhex(block)


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 254, 255, 256, 16510, 16511, 100_000])
def test_strings_of_any_length_are_sent(length: int) -> None:
    fields = [(b"n" * length, b"v" * length)]
    block = encode(fields)
    assert block == b"\x00" + string(fields[0][0]) + string(fields[0][1])
    assert Decoder().decode(block, ANY) == (fields, 2 * length)
