"""Ask a SuperLink whether it is there, without leaving a trace in it."""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING

from relay.call import Wire
from relay.fleet import Method
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
    url = url or upstream.url
    if upstream.wire is Wire.GRPC:
        return _probe_grpc(upstream, url)
    path, expected = QUESTIONS[upstream.wire]
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


def _probe_grpc(upstream: Upstream, url: BaseUrl) -> str:
    """Ask for a message without saying for whom: each release refuses that in its own words."""
    import grpc  # noqa: PLC0415 - gRPC is imported where it is spoken

    target = f"{'[' if ':' in url.host else ''}{url.host}{']' if ':' in url.host else ''}:{url.port}"
    options = [("grpc.enable_http_proxy", 0)]
    if url.tls:
        ca = upstream.ca_file.read_bytes() if upstream.ca_file else None
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(ca), options)
    else:
        channel = grpc.insecure_channel(target, options)
    with channel:
        try:
            channel.unary_unary(Method.PULL_MESSAGES.grpc)(b"", timeout=upstream.connect_timeout)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ProbeError(f"{url} does not answer: {details}") from error
            if code is grpc.StatusCode.UNIMPLEMENTED:
                raise ProbeError(
                    f"{url} speaks gRPC but does not know {Method.PULL_MESSAGES.grpc}: check upstream.url and"
                    " upstream.wire"
                ) from error
            return f"{url} answers {Method.PULL_MESSAGES.grpc} with {code.name}"
    return f"{url} answers {Method.PULL_MESSAGES.grpc}"
