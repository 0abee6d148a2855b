"""What every section of the settings is: frozen, strict about its keys, and its own documentation."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from relay.settings_section import Section


class Colours(Section):
    """Two keys."""

    first: str = "red"
    """What stands below a key."""

    second: int = 2


class Tree(Section):
    """A section in a section."""

    colours: Colours = Colours()


def test_a_section_of_which_every_key_is_commented_out_has_all_defaults() -> None:
    assert Tree.model_validate({"colours": None}) == Tree() == Tree.model_validate(None)


def test_a_key_that_it_does_not_know_is_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Tree.model_validate({"colours": {"third": 3}})


@pytest.mark.parametrize("value", ["red", [], 5])
def test_what_is_no_mapping_is_refused(value: object) -> None:
    with pytest.raises(ValidationError, match="valid dictionary"):
        Tree.model_validate({"colours": value})


def test_nobody_changes_settings_that_others_hold() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Colours().first = "blue"


def test_what_stands_below_a_key_is_its_documentation() -> None:
    assert Colours.model_fields["first"].description == "What stands below a key."
    assert Colours.model_fields["second"].description is None
