"""What the processes of one relay share: a few numbers in memory that is mapped before the first fork."""

from __future__ import annotations

import mmap

from relay.stores.host import HostTable
from relay.stores.kept import PIECE
from relay.stores.nodes import Nodes
from relay.stores.records import HostRecords
from relay.stores.upstreams import UpstreamTable

_NAMES = ("stopping", "generation", "serving", "refused")


class Shared:
    """Numbers of the whole relay, written by one process at a time and read by all.

    Attributes:
        table: what workers remember of nodes for each other.
        kept: pull answers that may have to be handed out again.
        nodes: what is known of each node.
        upstreams: what is known of each address of the SuperLink.
    """

    def __init__(self, kept: int = 1 << 20, nodes: int = 1024) -> None:
        """Map the memory; to be called before the workers are forked.

        Args:
            kept: bytes of it for pull answers.
            nodes: how many nodes there shall be room for.
        """
        self._memory = mmap.mmap(-1, 8 * len(_NAMES))
        self.table = HostTable()
        self.kept = HostRecords(kept // PIECE, PIECE)
        self.nodes = Nodes(nodes)
        self.upstreams = UpstreamTable()

    @property
    def stopping(self) -> bool:
        """Whether the whole relay (not only a worker of it) was told to stop."""
        return self._get("stopping") == 1

    @property
    def generation(self) -> int:
        """How many times settings were taken over by a reload."""
        return self._get("generation")

    @property
    def serving(self) -> int:
        """The newest generation of which a worker serves."""
        return self._get("serving")

    @property
    def refused(self) -> int:
        """How many reloads were refused because of wrong settings."""
        return self._get("refused")

    def stop(self) -> None:
        """Say that the whole relay was told to stop; for the master. Cannot be taken back."""
        self._set("stopping", 1)

    def reloaded(self, *, accepted: bool) -> None:
        """Count a reload; for the master."""
        name = "generation" if accepted else "refused"
        self._set(name, self._get(name) + 1)

    def serves(self, generation: int) -> None:
        """Say that a worker of this generation serves; for the workers."""
        self._set("serving", max(generation, self.serving))

    def _get(self, name: str) -> int:
        return int.from_bytes(self._memory[(at := 8 * _NAMES.index(name)) : at + 8], "little")

    def _set(self, name: str, value: int) -> None:
        self._memory[(at := 8 * _NAMES.index(name)) : at + 8] = value.to_bytes(8, "little")
