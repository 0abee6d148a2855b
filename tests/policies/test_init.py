"""The order of the policies, and that each is called the same everywhere."""

from __future__ import annotations

import pkgutil
import re

import pytest

from relay import policies
from relay.call import View
from relay.policies import (
    BRIDGES,
    GUARDS,
    OBSERVERS,
    ORDER,
    Accepted,
    AccessLog,
    Auth,
    Held,
    Inventory,
    Maintenance,
    Metrics,
    Quarantine,
    Repair,
    Retry,
    Shed,
    Signing,
    Validate,
)

each_policy = pytest.mark.parametrize("policy", ORDER, ids=lambda policy: policy.__name__)


def test_what_counts_and_writes_down_stands_before_all_that_can_refuse() -> None:
    assert ORDER[:2] == (Metrics, AccessLog)


def test_a_call_is_validated_before_anything_acts_on_it() -> None:
    at = ORDER.index(Maintenance)
    assert ORDER[at : at + 3] == (Maintenance, Auth, Validate)


def test_an_emergency_opens_no_port_to_strangers() -> None:
    assert (Auth, Validate, Quarantine) == GUARDS


def test_what_is_known_of_nodes_holds_what_they_were_refused() -> None:
    assert ORDER[2] is Inventory
    assert ORDER[:3] == OBSERVERS


def test_quarantine_knows_who_calls_and_that_the_bytes_are_sound() -> None:
    assert ORDER.index(Quarantine) > max(ORDER.index(Auth), ORDER.index(Validate))


def test_only_what_the_superlink_itself_answered_is_taken_for_accepted() -> None:
    assert ORDER[-1] is Accepted


def test_who_waits_for_memory_holds_no_place_in_the_queue_of_the_superlink() -> None:
    at = ORDER.index(Held)
    assert ORDER[at - 1 : at + 2] == (Retry, Held, Shed)


def test_what_signs_stands_behind_all_that_may_ask_a_superlink() -> None:
    assert (Held, Signing) == BRIDGES
    assert ORDER.index(Signing) > max(ORDER.index(Repair), ORDER.index(Retry))


def test_every_policy_stands_in_the_order_once() -> None:
    assert sorted(policy.name for policy in ORDER) == sorted(
        module.name for module in pkgutil.iter_modules(policies.__path__)
    )


@each_policy
def test_file_class_and_name_of_a_policy_are_the_same(policy: type) -> None:
    snake = re.sub(r"(?<!^)(?=[A-Z])", "_", policy.__name__).lower()
    assert (policy.__module__, policy.name) == (f"relay.policies.{snake}", snake)  # type: ignore[attr-defined]


@each_policy
def test_a_policy_declares_how_much_it_looks_at(policy: type) -> None:
    assert isinstance(policy.sees, View)  # type: ignore[attr-defined]


@each_policy
def test_a_policy_is_exported(policy: type) -> None:
    assert getattr(policies, policy.__name__) is policy
    assert policy.__name__ in policies.__all__


def test_the_documented_order_is_the_order() -> None:
    assert policies.__doc__ is not None
    documented = re.findall(r"^ {4}(\w+)  ", policies.__doc__, re.MULTILINE)
    assert documented == [policy.name for policy in ORDER]
