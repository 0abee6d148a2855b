"""The relay beside nginx, Envoy and a bare gRPC relay in one run. `docs/benchmarks.md` explains the method.

Rules of this package:

1. Every proxy forwards the same bytes to the same stub SuperLink; nothing is measured unless it was checked.
2. CPU is read while nothing is in flight, so the difference of two readings belongs to the counted calls.
3. All times are seconds and all sizes are bytes, unless a name says otherwise. 1 GB is 10^9 bytes.
4. Only loopback is used, every run is bounded in calls and in time, and no process outlives the command.
"""
