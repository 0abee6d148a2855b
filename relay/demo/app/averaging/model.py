"""The model and its data: linear regression by gradient descent, every number drawn from the run's seed."""

import numpy as np

FEATURES = 8
EXAMPLES = 240  # of a partition; the last quarter is for evaluation
STEPS = 5  # gradient steps that a ClientApp takes in a round
RATE = 0.1
NOISE = 0.1

Arrays = dict[str, np.ndarray]


def initial(seed: int, array_size: int) -> Arrays:
    """The model of round 0: weights of zero and, for `array_size` > 0, that many bytes of ballast."""
    arrays: Arrays = {"weights": np.zeros(FEATURES), "bias": np.zeros(1)}
    if array_size > 0:
        arrays["ballast"] = np.random.default_rng([seed, 0]).random(max(1, array_size // 4), dtype=np.float32)
    return arrays


def load(seed: int, partition_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples (features, targets) of one partition: one line for all, its own region for each."""
    line = np.random.default_rng([seed, 1])
    weights, bias = line.normal(size=FEATURES), line.normal()
    own = np.random.default_rng([seed, 2, partition_id])
    features = own.normal(loc=own.normal(scale=0.5, size=FEATURES), size=(EXAMPLES, FEATURES))
    return features, features @ weights + bias + own.normal(scale=NOISE, size=EXAMPLES)


def split(examples: tuple[np.ndarray, np.ndarray], *, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """The part of the examples that is for training, or the part that is for evaluation."""
    cut = EXAMPLES * 3 // 4
    features, targets = examples
    return (features[:cut], targets[:cut]) if train else (features[cut:], targets[cut:])


def loss(arrays: Arrays, features: np.ndarray, targets: np.ndarray) -> float:
    """The mean squared error."""
    return float(np.mean((features @ arrays["weights"] + arrays["bias"] - targets) ** 2))


def train(arrays: Arrays, features: np.ndarray, targets: np.ndarray, partition_id: int) -> Arrays:
    """The arrays after `STEPS` gradient steps. The ballast changes too: what is equal is not sent again."""
    weights, bias = arrays["weights"], arrays["bias"]
    for _ in range(STEPS):
        error = features @ weights + bias - targets
        weights = weights - RATE * (features.T @ error) / len(targets)
        bias = bias - RATE * np.mean(error, keepdims=True)
    trained: Arrays = {"weights": weights, "bias": bias}
    if "ballast" in arrays:
        trained["ballast"] = arrays["ballast"] + np.float32(partition_id + 1)
    return trained


def average(models: list[Arrays], shares: list[int]) -> Arrays:
    """The mean of the models, each weighted by its number of examples.

    The order of `models` decides the rounding, so the caller brings them in an order that does not depend on
    which reply came first.
    """
    total = sum(shares)
    mean: Arrays = {}
    for name, first in models[0].items():
        weighted = [
            model[name] * first.dtype.type(share / total) for model, share in zip(models, shares, strict=True)
        ]
        mean[name] = np.sum(weighted, axis=0, dtype=first.dtype)
    return mean
