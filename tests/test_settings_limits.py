"""What a call may cost: by default what any SuperNode needs, and never less than that by mistake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from relay.fleet import MAX_REQUEST, Kind
from relay.settings import load
from tests.test_settings import load_tree, problems

if TYPE_CHECKING:
    from pathlib import Path


def test_calls_of_ids_and_keys_may_be_as_long_as_the_catalogue_says() -> None:
    requests = load(None, {}).limits.requests
    assert {kind: getattr(requests, kind.value) for kind in MAX_REQUEST} == MAX_REQUEST
    assert set(type(requests).model_fields) == {kind.value for kind in MAX_REQUEST}
    assert Kind.PUSH not in MAX_REQUEST, "for what a model is made of max_body counts"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"header_count": 19}, "limits.header_count = 19: must be at least 20"),
        ({"header_size": 1023}, "limits.header_size = 1023: must be at least 1024"),
        ({"head_size": "1000B"}, "limits.head_size"),
        ({"head_timeout": 0}, "limits.head_timeout = 0: must be above zero"),
        ({"min_rate": -1}, "limits.min_rate = -1"),
        ({"rate_window": 0}, "limits.rate_window = 0: must be above zero"),
        ({"connections": -1}, "limits.connections = -1: must be at least 0"),
        ({"connections": 1.5}, "limits.connections = 1.5: must be a whole number"),
        ({"connections_per_peer": -1}, "limits.connections_per_peer = -1: must be at least 0"),
        ({"requests": {"pull": 0}}, "limits.requests.pull = 0: must be above zero"),
        ({"requests": {"push": "1MiB"}}, "limits.requests.push: is not a setting"),
        ({"max_held": 0}, "limits.max_held = 0: must be above zero"),
    ],
)
def test_what_no_call_could_keep_to_is_named(tmp_path: Path, limits: dict[str, Any], said: str) -> None:
    problem = problems(tmp_path, {"limits": limits})[0]
    assert problem.startswith(said)


def test_zero_is_no_limit_where_it_can_be_none(tmp_path: Path) -> None:
    limits = load_tree(
        tmp_path, {"limits": {"min_rate": 0, "connections": 0, "connections_per_peer": 0}}
    ).limits
    assert (limits.min_rate, limits.connections, limits.connections_per_peer) == (0, 0, 0)
