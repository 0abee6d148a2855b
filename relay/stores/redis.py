"""A connection to Redis as the relay wants it: it gives up soon, and does not try again by itself."""

from __future__ import annotations

import redis

#: Who asks once a second must not wait longer for an answer.
SECONDS = 1.0


def connect(url: str) -> redis.Redis:
    """Return a blocking client, for threads and commands; it opens its connection when it is first asked.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as `relay.settings_types.RedisUrl` checked it.
    """
    return redis.Redis.from_url(
        url,
        socket_connect_timeout=SECONDS,
        socket_timeout=SECONDS,
        retry=None,
    )
