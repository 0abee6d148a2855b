"""The machine and the versions that the numbers belong to."""

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.proxies import Proxy

_PACKAGES: Final = ("aiohttp", "flwr", "grpcio", "gunicorn", "httptools", "uvloop")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a reader must know to compare two reports."""

    cpu: str
    cores: int
    memory: int  # bytes
    kernel: str
    python: str
    load_average: float  # one minute, before the first run
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)


def parse_cpu_model(cpuinfo: str) -> str:
    """The `model name` of /proc/cpuinfo, which some architectures do not have."""
    for line in cpuinfo.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def gather(proxies: list[Proxy]) -> Facts:
    """Look at this machine and ask each proxy its version."""
    versions = {proxy.product: version for proxy in proxies if (version := proxy.version())}
    versions |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    return Facts(
        cpu=parse_cpu_model(Path("/proc/cpuinfo").read_text()),
        cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        python=platform.python_version(),
        load_average=round(os.getloadavg()[0], 2),
        versions=versions,
    )
