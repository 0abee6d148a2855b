"""The model of the demo's app. The app as a whole runs in the end-to-end tests."""

import importlib
from types import ModuleType

import numpy as np
import pytest

from relay.demo import flower


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(flower.APP)
    return importlib.import_module("averaging.model")


def federated(
    model: ModuleType, seed: int, rounds: int, array_size: int = 0
) -> tuple[dict[str, object], list[float]]:
    arrays = model.initial(seed, array_size)
    losses = []
    for _ in range(rounds):
        trained = [
            model.train(arrays, *model.split(model.load(seed, partition), train=True), partition)
            for partition in (0, 1)
        ]
        arrays = model.average(trained, [180, 180])
        losses.append(model.loss(arrays, *model.split(model.load(seed, 0), train=False)))
    return arrays, losses


def test_it_learns(model: ModuleType) -> None:
    _, losses = federated(model, 1, 10)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 10


def test_the_same_seed_gives_the_same_bytes(model: ModuleType) -> None:
    first, _ = federated(model, 1, 3, array_size=1000)
    again, _ = federated(model, 1, 3, array_size=1000)
    other, _ = federated(model, 2, 3, array_size=1000)
    assert {name: np.asarray(a).tobytes() for name, a in first.items()} == {
        name: np.asarray(a).tobytes() for name, a in again.items()
    }
    assert np.asarray(first["weights"]).tobytes() != np.asarray(other["weights"]).tobytes()


def test_partitions_differ(model: ModuleType) -> None:
    assert not np.array_equal(model.load(1, 0)[0], model.load(1, 1)[0])


def test_ballast_has_the_size_and_changes_in_every_node(model: ModuleType) -> None:
    arrays = model.initial(1, 1000)
    assert arrays["ballast"].nbytes == 1000
    examples = model.split(model.load(1, 0), train=True)
    first, second = (model.train(arrays, *examples, partition)["ballast"] for partition in (0, 1))
    assert len({arrays["ballast"].tobytes(), first.tobytes(), second.tobytes()}) == 3
    assert model.average([{"ballast": first}, {"ballast": second}], [1, 1])["ballast"].dtype == np.float32


def test_the_mean_is_weighted(model: ModuleType) -> None:
    mean = model.average([{"weights": np.array([0.0])}, {"weights": np.array([4.0])}], [1, 3])
    assert mean["weights"].tolist() == [3.0]
