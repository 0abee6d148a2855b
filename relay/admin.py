"""The admin port: health checks and metrics, for people and machines that are not nodes.

Every worker listens on it and answers for all workers of the host: readiness is a flag in memory that they
share, metrics are read from the files of all of them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from relay import __version__, admin_breakers, admin_nodes
from relay.exposition import exposition

if TYPE_CHECKING:
    from relay.app import Relay
    from relay.shared import Shared


def application(relay: Relay, shared: Shared) -> web.Application:
    """Return the admin application of one worker.

    Args:
        relay: whose state is shown.
        shared: what is known of the whole relay, not only of this worker.
    """
    app = web.Application()

    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        # An upstream outage is a detail: an unready relay would hand its nodes to whatever error
        # the balancer makes, and most of those end a node.
        stop = shared.stopping
        body: dict[str, object] = {
            "ready": not stop,
            "reason": "draining" if stop else "serving",
            "version": __version__,
            "generation": shared.generation,
            "serving": shared.in_force,
            "reloads_refused": shared.refused,
            "upstream": relay.pool.state(),
        }
        if shared.reloading:
            body["reloading"] = True
        return web.json_response(body, status=503 if stop else 200)

    async def metrics(_: web.Request) -> web.Response:
        # It reads files, and a call that waits for it would be a heartbeat in the worst case.
        page = await asyncio.to_thread(lambda: exposition() + admin_nodes.metrics(shared.nodes))
        return web.Response(body=page, headers={"content-type": CONTENT_TYPE_LATEST})

    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    admin_nodes.add_routes(app, relay.across or shared.nodes)
    admin_breakers.add_routes(app, relay.pool)
    return app
