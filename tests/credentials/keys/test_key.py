"""A key fits into a URL, holds 256 random bits, and tells when a character of it was lost."""

from __future__ import annotations

import math
import re
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.credentials.keys.key import ID, Key, generate, parse

MADE = generate()
#: The same in each process that collects the tests.
WRITTEN = b"flwr_1snBaner_wtMZYU3CYCVqwnngnWO1M6wj7sDNcQmWWoavDmArVYI0tTgEf"


def test_a_key_is_read_as_it_was_made() -> None:
    assert parse(str(MADE).encode()) == MADE
    assert MADE.intact


def test_a_key_needs_no_escaping_in_the_user_name_and_password_of_a_url() -> None:
    assert re.fullmatch(r"flwr_[0-9A-Za-z]{8}_[0-9A-Za-z]{49}", str(MADE))
    assert quote(str(MADE), safe="") == str(MADE)
    assert ID.fullmatch(MADE.id.decode())


def test_a_secret_has_256_bits_and_no_two_are_alike() -> None:
    assert 43 * math.log2(62) >= 256
    made = [generate() for _ in range(200)]
    assert len({key.id for key in made}) == len({key.secret for key in made}) == 200
    # Each of the 43 characters is drawn: none of them is always the same.
    assert all(len({key.secret[place] for key in made}) > 20 for place in range(43))


def test_the_representation_of_a_key_does_not_tell_it() -> None:
    assert MADE.secret.decode() not in repr(MADE)
    assert MADE.id.decode() in repr(MADE)


def test_any_mistyped_character_is_noticed() -> None:
    text = str(MADE)
    for place in range(5, len(text)):
        if place == 13:
            continue
        for wrong in "0Az":
            if text[place] == wrong:
                continue
            key = parse((text[:place] + wrong + text[place + 1 :]).encode())
            assert key is not None
            assert not key.intact, place


def test_two_swapped_characters_are_noticed() -> None:
    text = str(MADE)
    for place in range(14, len(text) - 1):
        swapped = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
        key = parse(swapped.encode())
        assert key is not None
        assert key.intact is (swapped == text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"flwr_",
        WRITTEN[:-1],
        WRITTEN + b"0",
        WRITTEN + b"\n",
        b" " + WRITTEN,
        WRITTEN.replace(b"flwr_", b"flwr-"),
        WRITTEN.upper(),
        WRITTEN[:-1] + b"_",
        WRITTEN[:-1] + b"\xff",
    ],
)
def test_what_does_not_look_like_a_key_is_none(text: bytes) -> None:
    assert parse(text) is None


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_anything_may_be_asked_about(text: bytes) -> None:
    key = parse(text)
    assert key is None or (b"flwr_%b_%b" % key == text and isinstance(key, Key))
