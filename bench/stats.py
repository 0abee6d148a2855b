"""The little statistics that the benchmark needs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several runs, and the best and worst of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least one value.

        Raises:
            ValueError: there is none.
        """
        if not values:
            raise ValueError("no values")
        return cls(statistics.median(values), min(values), max(values))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of ascending values: the least that `share` (0..1) of them do not exceed.

    Raises:
        ValueError: there are no values.
    """
    if not ordered:
        raise ValueError("no values")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def ratios(values: dict[int, float], others: dict[int, float]) -> Spread | None:
    """How many times the other's cost this one is; both by round.

    Each ratio is of two runs of one round, which met the same machine. None without a round in common, or
    when the other side's cost was zero.
    """
    each = [values[turn] / others[turn] for turn in values if others.get(turn)]
    return Spread.of(each) if each else None
