"""How many files a process of the relay may have open: each connection is one."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import structlog

from relay.call import Wire

if TYPE_CHECKING:
    from relay.settings import Settings

log = structlog.get_logger("relay.server")

#: Beyond `limits.connections`, up to twice that number are answered before connections are reset at once.
_FAR = 2
#: Files of a worker that are no connections of nodes or to the SuperLink.
_OTHERS = 100


def raise_limit(settings: Settings) -> int:
    """Raise the limit of this process and its children as far as it may, and say what it comes to.

    Returns:
        How many files each worker may have open; a warning is logged if that is too few for the settings.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError) as error:
            log.warning("the limit of open files stays", limit=soft, problem=str(error))
    needed = needs(settings)
    if soft < needed:
        log.warning(
            "too few open files are allowed for the settings; connections will be refused",
            limit=soft,
            needed=needed,
            fix=f"allow each process {needed} (LimitNOFILE, ulimit -n), or lower limits.connections",
        )
    else:
        log.info("open files", limit=soft, needed=needed)
    return soft


def needs(settings: Settings) -> int:
    """Return how many files a worker may come to have open; nodes count where their number is limited."""
    nodes = _FAR * settings.limits.connections * len(settings.listeners)
    section = settings.upstream
    # Not `relay.superlink`, which brings metrics along: they are made in the workers alone.
    addresses = 1 + len(section.addresses) + len(section.standby)
    superlinks = 0 if section.wire is Wire.GRPC else section.max_connections * addresses
    return nodes + superlinks + _OTHERS
