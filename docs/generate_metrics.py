#!/usr/bin/env python3
"""Make docs/metrics.md from the metrics that the modules of the relay declare; with --check, compare it."""

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

from generate import publish
from prometheus_client import REGISTRY, Counter
from prometheus_client.metrics import MetricWrapperBase

import relay

PAGE = Path(__file__).with_name("metrics.md")

HEAD = """# Metrics

<!-- Made by scripts/docs from the modules that declare them. Change the text there. -->

`GET /metrics` on the admin port answers for all workers of a host, those that have ended included. No label
has the id of a node or of a run. Beside these there is `relay_nodes` (gauge, by `wire` and `flwr_version`):
nodes that were heard in the last minute, for the whole host.
"""


def declared() -> list[MetricWrapperBase]:
    """Import every module of the relay; return the metrics of them all, by name."""
    for module in pkgutil.walk_packages(relay.__path__, "relay."):
        if ".demo.app" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    collectors = REGISTRY._collector_to_names
    found = {collector for collector in collectors if isinstance(collector, MetricWrapperBase)}
    return sorted(found, key=_name)


def render() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *_table(), ""])


def _table() -> Iterator[str]:
    yield "| metric | kind | labels | |"
    yield "|---|---|---|---|"
    for metric in declared():
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        yield f"| `{_name(metric)}` | {metric._type} | {labels} | {metric._documentation} |"


def _name(metric: MetricWrapperBase) -> str:
    return f"{metric._name}_total" if isinstance(metric, Counter) else metric._name


def main(arguments: list[str]) -> int:
    """Write the page; see `generate.publish`."""
    return publish(PAGE, render(), "made from the metrics", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
