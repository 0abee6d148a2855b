"""Federated averaging of a linear model: the Flower app of `flwr-relay demo`."""
