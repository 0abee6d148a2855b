"""What the processes of one relay share: a few numbers in memory that is mapped before the first fork."""

from __future__ import annotations

import mmap

from relay.stores.host import HostTable
from relay.stores.kept import PIECE
from relay.stores.nodes import Nodes
from relay.stores.records import HostRecords
from relay.stores.upstreams import UpstreamTable

_NAMES = ("stopping", "generation", "serving", "refused", "wanted", "in_force", "reloading", "served")
#: Places in which workers note what they do; two workers of one relay never have the same one at a time.
_PLACES = 1024
#: What a worker notes of itself.
_STARTS, _LISTENS, _SERVES, _LEFT = range(4)


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
        self._memory = mmap.mmap(-1, 8 * (len(_NAMES) + 2 * _PLACES))
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
        """The newest settings that were accepted by a reload, counted from 0, the ones of the start."""
        return self._get("generation")

    @property
    def serving(self) -> int:
        """The newest generation of which a worker serves."""
        return self._get("serving")

    @property
    def refused(self) -> int:
        """How many reloads were refused because of wrong settings, or given up."""
        return self._get("refused")

    @property
    def in_force(self) -> int:
        """The newest generation that all workers serve who accept."""
        return self._get("in_force")

    @property
    def reloading(self) -> bool:
        """Whether settings are being read or taken over."""
        return self._get("reloading") == 1

    @property
    def served(self) -> bool:
        """Whether a worker has ever served."""
        return self._get("served") == 1

    def stop(self) -> None:
        """Say that the whole relay was told to stop; for the master. Cannot be taken back."""
        self._set("stopping", 1)

    def reloaded(self, *, accepted: bool, workers: int = 1) -> None:
        """Count a reload, and how many workers there shall be of its settings; for the master."""
        if accepted:
            self._set("wanted", workers)
        name = "generation" if accepted else "refused"
        self._set(name, self._get(name) + 1)

    def begin(self) -> None:
        """Say that settings are about to be read; for the master."""
        self._set("reloading", 1)

    def end(self, in_force: int) -> None:
        """Say which generation is in force, and that no other one is about to be; for the master."""
        self._set("in_force", in_force)
        self._set("reloading", 0)

    def starts(self, number: int) -> None:
        """Say that a worker of this number is about to be started; for the master."""
        self._put(len(_NAMES) + number % _PLACES, 0)
        self._note(number, _STARTS)

    def listens(self, number: int) -> None:
        """Say that this worker is about to accept calls; for workers."""
        self._note(number, _LISTENS)

    def leaves(self, number: int) -> None:
        """Say that this worker accepts no calls any more; for workers."""
        self._note(number, _LEFT)

    def serves(self, generation: int, number: int = 0) -> None:
        """Say that a worker of this generation serves, by the number that it has among all; for workers."""
        self._put(len(_NAMES) + number % _PLACES, generation)
        self._set("serving", max(generation, self.serving))
        self._set("served", 1)
        self._note(number, _SERVES)

    def has_begun(self, number: int) -> bool:
        """Return whether this worker serves, or has served."""
        return self._noted(number) >= _SERVES

    def may_accept(self, number: int) -> bool:
        """Return whether this worker may have accepted calls."""
        return self._noted(number) >= _LISTENS

    def has_left(self, number: int) -> bool:
        """Return whether this worker accepts no calls any more."""
        return self._noted(number) == _LEFT

    def succeeded(self, generation: int) -> bool:
        """Return whether as many workers as there shall be have begun to serve newer settings than those."""
        newer = sum(self._at(len(_NAMES) + place) > generation for place in range(_PLACES))
        return newer >= max(self._get("wanted"), 1)

    def _noted(self, number: int) -> int:
        return self._at(len(_NAMES) + _PLACES + number % _PLACES)

    def _note(self, number: int, what: int) -> None:
        self._put(len(_NAMES) + _PLACES + number % _PLACES, what)

    def _get(self, name: str) -> int:
        return self._at(_NAMES.index(name))

    def _set(self, name: str, value: int) -> None:
        self._put(_NAMES.index(name), value)

    def _at(self, place: int) -> int:
        return int.from_bytes(self._memory[8 * place : 8 * place + 8], "little")

    def _put(self, place: int, value: int) -> None:
        self._memory[8 * place : 8 * place + 8] = value.to_bytes(8, "little")
