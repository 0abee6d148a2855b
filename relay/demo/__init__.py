"""Real Flower federations on this machine: `flwr-relay demo`, the end-to-end tests and the fault drills."""
