"""The chain that a call walks: policies composed once at start, one handler per (wire, method)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from relay.call import Call, Reply, View

if TYPE_CHECKING:
    from relay.fleet import Method

#: Answers a call, or raises Refusal. An upstream is one, and so is every composed chain.
Handler = Callable[[Call], Awaitable[Reply]]


class Policy(Protocol):
    """One behaviour between the wires and the upstream."""

    #: Its name in `flwr-relay explain`, settings and metrics; the same as its file's.
    name: ClassVar[str]
    #: How much of a request it looks at; of a reply it may read what it asks for.
    sees: ClassVar[View]

    def applies(self, method: Method) -> bool:
        """Return whether calls of this method meet the policy; asked once, at start."""

    def handle(self, call: Call, next: Handler) -> Awaitable[Reply]:  # noqa: A002 - the vocabulary's name
        """Answer the call, or pass it to `next`, or raise Refusal.

        A coroutine function for a policy that waits, or looks at the reply. One that does neither may be a
        plain function that returns what `next` does: no layer of the chain is then waiting for the next.
        """


class Chain(NamedTuple):
    """A composed chain, and the names of its steps in the order in which a call meets them."""

    handler: Handler
    steps: tuple[str, ...]


def compose(
    policies: Iterable[Policy],
    upstream: Handler,
    method: Method,
    *,
    upstream_name: str = "upstream",
    buffer_limit: int,
    strict: bool = False,
) -> Chain:
    """Compose the chain for one method.

    Args:
        policies: in the order in which a call meets them; those that do not apply leave no trace.
        upstream: the last handler.
        method: whose chain it is.
        upstream_name: how the last step is called in `steps`.
        buffer_limit: most bytes that are held of a body, if a policy needs it whole.
        strict: raise ViewError when a policy looks at more than it declares. For tests.

    Returns:
        The chain. A step that reads the whole body stands before the first policy that needs it.
    """
    chosen = [policy for policy in policies if policy.applies(method)]
    first_whole = next((i for i, policy in enumerate(chosen) if policy.sees >= View.BYTES), None)
    handler = upstream
    steps = [upstream_name]
    for index in range(len(chosen) - 1, -1, -1):
        policy = chosen[index]
        handler = _guarded(policy, handler) if strict else _met(policy.handle, handler)
        steps.append(policy.name)
        if index == first_whole:
            handler = _buffered(handler, buffer_limit)
            steps.append("buffer")
    return Chain(handler, tuple(reversed(steps)))


def _met(handle: Callable[[Call, Handler], Awaitable[Reply]], following: Handler) -> Handler:
    return lambda call: handle(call, following)  # half of what a `partial` with a keyword costs


def _buffered(handler: Handler, limit: int) -> Handler:
    async def buffer(call: Call) -> Reply:
        await call.payload.read(limit)
        return await handler(call)

    return buffer


def _guarded(policy: Policy, handler: Handler) -> Handler:
    async def unguarded(call: Call) -> Reply:
        call.payload.allowed = View.MESSAGE
        try:
            return await handler(call)
        finally:
            call.payload.allowed = policy.sees

    async def guarded(call: Call) -> Reply:
        call.payload.allowed = policy.sees
        return await policy.handle(call, unguarded)

    return guarded
