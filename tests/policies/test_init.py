"""The order of the policies, and that each is called the same everywhere."""

from __future__ import annotations

import pkgutil
import re

import pytest

from relay import policies
from relay.call import View
from relay.policies import BRIDGES, ORDER, AccessLog, Maintenance, Metrics, Repair, Retry, Signing, Validate

each_policy = pytest.mark.parametrize("policy", ORDER, ids=lambda policy: policy.__name__)


def test_what_counts_and_writes_down_stands_before_all_that_can_refuse() -> None:
    assert ORDER[:2] == (Metrics, AccessLog)


def test_a_call_is_validated_before_anything_acts_on_it() -> None:
    assert ORDER[2:4] == (Maintenance, Validate)


def test_what_signs_stands_behind_all_that_may_ask_a_superlink() -> None:
    assert (Signing,) == BRIDGES
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
