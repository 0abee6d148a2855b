"""Ask a SuperLink whether it is there, without leaving a trace in it."""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING

from relay.call import Wire
from relay.tls import client_context

if TYPE_CHECKING:
    from relay.settings import Upstream

#: A path that a SuperLink of each wire answers by itself, with the status that shows it is one. flwr >= 1.40
#: has a health check; the REST server of flwr <= 1.32 answers 405 to a GET of a method that it knows.
_QUESTIONS = {
    Wire.HTTP_V1: ("/health", 200),
    Wire.REST_V0: ("/api/v0/fleet/pull-messages", 405),
}


class ProbeError(Exception):
    """The upstream did not answer as a SuperLink of its wire does; the text says what happened instead."""


def probe_upstream(upstream: Upstream) -> str:
    """Return what the SuperLink at `upstream.url` answered.

    Raises:
        ProbeError: nothing answers there, or something that is no SuperLink of `upstream.wire`.
    """
    path, expected = _QUESTIONS[upstream.wire]
    url = upstream.url
    timeout = upstream.connect_timeout
    try:
        connection: http.client.HTTPConnection
        if url.tls:
            context = client_context(upstream.ca_file)
            connection = http.client.HTTPSConnection(url.host, url.port, timeout=timeout, context=context)
        else:
            connection = http.client.HTTPConnection(url.host, url.port, timeout=timeout)
        try:
            connection.request("GET", path)
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, UnicodeError, http.client.HTTPException) as error:  # UnicodeError: no DNS name
        raise ProbeError(f"{url} does not answer: {error or type(error).__name__}") from error
    if status != expected:
        raise ProbeError(
            f"{url} answers GET {path} with {status}, a SuperLink that speaks {upstream.wire.value} with"
            f" {expected}: check upstream.url and upstream.wire"
        )
    return f"{url} answers GET {path} with {status}"
