"""The circuit breakers on the admin port: GET /breakers, and POST /breakers/{address}/reset.

Each answers for all workers of the host, but for `failures_in_a_row`, which each worker counts for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from relay.upstreams.balance import Balance


def add_routes(app: web.Application, upstreams: Balance) -> None:
    """Add the endpoints to the admin application of one worker."""

    async def show(_: web.Request) -> web.Response:
        return web.json_response([breaker.state() for breaker in upstreams.breakers().values()])

    async def reset(request: web.Request) -> web.Response:
        breaker = upstreams.breakers().get(request.match_info["address"])
        if breaker is None:
            known = list(upstreams.breakers())
            return web.json_response({"error": "no breaker of this address", "known": known}, status=404)
        breaker.reset()
        return web.json_response(breaker.state())

    app.router.add_get("/breakers", show)
    app.router.add_post("/breakers/{address}/reset", reset)
