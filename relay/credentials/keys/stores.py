"""Where records of keys are kept: what a store can do, and which one the settings ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from relay.credentials.keys.record import KeyRecord

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Records = dict[str, KeyRecord]


class StoreError(Exception):
    """The keys cannot be read or changed. `problems` holds every reason, each with its place and its fix."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class KeyStore(Protocol):
    """Holds the records. Its methods block: workers call them in a thread. One thread at a time."""

    #: For people: which store it is, without a password.
    name: str

    def poll(self) -> Records | None:
        """Return all records by their ids; None if they are those that the last poll returned.

        Raises:
            StoreError: nobody knows; the records of before are the best there is.
        """

    def change(self, change: Callable[[Records], None], *, init: bool = False) -> None:
        """Have `change` alter the records in place, as one step for all processes; it may be called again.

        Args:
            change: gets the records.
            init: begin with none if there is no store yet. Without it that is refused: one that lost its keys
                looks the same, and whoever wrote a new key there would have the relays forget all others.

        Raises:
            StoreError: nothing was changed.
            Exception: what `change` raises; nothing was changed.
        """

    def close(self) -> None:
        """Give up what it holds open."""


def key_store(file: Path | None, redis: str | None, shown: str) -> KeyStore | None:
    """Return the store of `keys.file` or `keys.redis`, None if neither is set.

    Args:
        file: path of the file.
        redis: URL of the server, with its password.
        shown: the same without it.
    """
    if file is not None:
        from relay.credentials.keys.file import FileKeys  # noqa: PLC0415 - each store imports this module

        return FileKeys(file)
    if redis is not None:
        from relay.credentials.keys.redis import RedisKeys  # noqa: PLC0415 - imports a library that few need

        return RedisKeys(redis, shown)
    return None
