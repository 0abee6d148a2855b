import pytest

from bench.stats import Spread, percentile, ratios


def test_spread_is_median_and_extremes() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.0, 2.0)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1.0), (0.5, 50.0), (0.99, 99.0), (0.991, 100.0), (1.0, 100.0)]
)
def test_percentile_is_the_nearest_rank(share: float, value: float) -> None:
    assert percentile([float(number) for number in range(1, 101)], share) == value


def test_percentile_of_one_and_of_none() -> None:
    assert percentile([7.0], 0.5) == percentile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_each_ratio_is_of_one_round() -> None:
    ours, theirs = {0: 2.0, 1: 40.0, 2: 9.0, 3: 1.0}, {0: 1.0, 1: 20.0, 2: 3.0, 4: 1.0}
    assert ratios(ours, theirs) == Spread(2.0, 2.0, 3.0)


def test_ratio_needs_both_sides() -> None:
    assert ratios({}, {0: 1.0}) is None
    assert ratios({0: 1.0}, {}) is None
    assert ratios({0: 1.0}, {0: 0.0}) is None
    assert ratios({0: 3.0}, {1: 2.0}) is None  # no round in common
