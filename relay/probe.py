"""Ask a SuperLink whether it is there, without leaving a trace in it."""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING

from relay.superlink import QUESTIONS
from relay.tls_files import UpstreamTls

if TYPE_CHECKING:
    from relay.settings import BaseUrl, Upstream


class ProbeError(Exception):
    """The upstream did not answer as a SuperLink of its wire does; the text says what happened instead."""


def probe_upstream(upstream: Upstream, url: BaseUrl | None = None) -> str:
    """Return what the SuperLink at `url` answered, by default `upstream.url`.

    Raises:
        ProbeError: nothing answers there, or something that is no SuperLink of `upstream.wire`.
    """
    path, expected = QUESTIONS[upstream.wire]
    url = url or upstream.url
    timeout = upstream.connect_timeout
    try:
        connection: http.client.HTTPConnection
        if url.tls:
            context = UpstreamTls(upstream).context
            connection = http.client.HTTPSConnection(url.host, url.port, timeout=timeout, context=context)
        else:
            connection = http.client.HTTPConnection(url.host, url.port, timeout=timeout)
        try:
            connection.request("GET", path)
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no DNS name, or no PEM
        raise ProbeError(f"{url} does not answer: {error or type(error).__name__}") from error
    if status != expected:
        raise ProbeError(
            f"{url} answers GET {path} with {status}, a SuperLink that speaks {upstream.wire.value} with"
            f" {expected}: check upstream.url and upstream.wire"
        )
    return f"{url} answers GET {path} with {status}"
