"""How callers prove who they are, one credential per file; the policy `auth` asks them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from relay.call import Call, Identity


class Credential(Protocol):
    """One way to prove who one is."""

    #: Its name in settings, metrics and `Identity.by`; the same as its file's.
    name: ClassVar[str]

    async def check(self, call: Call) -> Identity | None:
        """Return who the caller is, or None if the call carries no credential of this kind.

        Raises:
            Refusal: UNAUTHENTICATED, and only if the credential is there and wrong (`detail` says what is
                wrong with it and never repeats it); UPSTREAM_DOWN if whoever knows cannot be asked.
        """
