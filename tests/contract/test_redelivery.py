"""Flower's own nodes behind the policy `redelivery`: what was lost comes again, and nothing comes twice."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import pytest
import uvloop

from relay.call import Source, Wire
from relay.fleet import Method, peek
from relay.policies.redelivery import Redelivery
from relay.refusal import NodeGone
from relay.stores.host import HostTable
from relay.stores.kept import PIECE
from relay.stores.records import HostRecords
from tests.contract.conftest import PROBE, RELEASES, TRANSPORTS, Release
from tests.contract.faults import CONTROLS
from tests.contract.nodes import Nodes, Outcome, observe
from tests.contract.superlink import RUNS, SuperLink

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from relay.call import Call, Reply
    from tests.contract.nodes import Observation
    from tests.contract.superlink import Fault

pytestmark = pytest.mark.timeout(900)

each_release = pytest.mark.parametrize("release", RELEASES, ids=str)


class Relayed(SuperLink):
    """A SuperLink behind a worker of the relay.

    Attributes:
        lose: how many answers with a message are still to be lost between relay and node.
        again: messages that the relay has handed out again.
        early: polls that came while a message was being worked on.
    """

    def __init__(self, wire: Wire, method: Method, fault: Fault, lose: int = 0) -> None:
        super().__init__(wire, method, fault)
        self.lose = lose
        self.again = 0
        self.early = 0
        self._working = False
        self._policy = Redelivery(
            enabled=True,
            max_size=1 << 16,
            deliveries=3,
            records=HostRecords(64, PIECE),
            table=HostTable(64),
        )

    async def handle(self, method: Method, call: Call) -> Reply:
        """Answer a call of the node."""
        if not self._policy.applies(method):
            return await super().handle(method, call)
        if method is not Method.PULL_MESSAGES:
            return await self._policy.handle(call, self._asked)
        self.early += self._working
        reply = await self._policy.handle(call, self._asked)
        self.again += reply.source is Source.LOCAL
        if reply.payload.data:
            if self.lose:
                self.lose -= 1
                raise NodeGone
            self._working = True
        return reply

    async def _asked(self, call: Call) -> Reply:
        if call.method is Method.PULL_OBJECT:  # a question of the relay
            return await self._right(call.method, call)
        return await super().handle(call.method, call)

    def _fill(self, method: Method, data: bytes, response: Any, *, stranger: bool) -> None:
        object_id = peek(method, data).object_id or ""
        if method is Method.PULL_OBJECT and object_id not in self._objects:
            return
        super()._fill(method, data, response, stranger=stranger)
        if method is Method.CONFIRM_MESSAGE_RECEIVED:
            del self._objects[object_id]
        elif method is Method.PUSH_OBJECT:
            self._working = any(self._wanted.values())


def run(
    flower: Callable[[str], Path], directory: Path, release: Release, superlink: SuperLink
) -> Observation:
    """Return what becomes of a node of this release."""
    python = flower(release.requirement) / "python" if release.requirement else sys.executable

    async def observed() -> Observation:
        async with Nodes(python, PROBE, directory, TRANSPORTS.get(release.wire, "")) as nodes:  # type: ignore[arg-type]
            return await observe(nodes, "node", superlink)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(observed())


@each_release
def test_a_node_without_troubles_gets_each_message_once(
    flower: Callable[[str], Path], tmp_path: Path, release: Release
) -> None:
    superlink = Relayed(release.wire, Method.PULL_MESSAGES, CONTROLS["empty"])
    observation = run(flower, tmp_path, release, superlink)
    assert observation.outcome is Outcome.CONTINUES, observation
    assert superlink.empty_polls >= 3
    assert superlink.early == 0, "a node pulled while it worked on a message"
    assert superlink.again == 0
    assert superlink.served[Method.CONFIRM_MESSAGE_RECEIVED] == len(RUNS)
    assert superlink.served[Method.PUSH_MESSAGES] == len(RUNS)


@each_release
def test_a_node_gets_the_message_whose_answer_was_lost(
    flower: Callable[[str], Path], tmp_path: Path, release: Release
) -> None:
    superlink = Relayed(release.wire, Method.PULL_MESSAGES, CONTROLS["empty"], lose=4)
    observation = run(flower, tmp_path, release, superlink)
    assert observation.outcome is Outcome.CONTINUES, observation
    assert superlink.lose == 0
    assert superlink.again >= 2
    assert superlink.served[Method.CONFIRM_MESSAGE_RECEIVED] == len(RUNS), "each was worked on once"
    assert superlink.served[Method.PUSH_MESSAGES] == len(RUNS)


@pytest.mark.parametrize(
    "release", [release for release in RELEASES if release.wire is Wire.HTTP_V1], ids=str
)
def test_a_node_gets_the_message_again_that_it_gave_up_for_an_object(
    flower: Callable[[str], Path], tmp_path: Path, release: Release
) -> None:
    superlink = Relayed(release.wire, Method.PULL_OBJECT, CONTROLS["403"])
    observation = run(flower, tmp_path, release, superlink)
    assert superlink.faults == 2
    assert observation.outcome is Outcome.CONTINUES, observation  # it drops the message without the relay
    assert superlink.again >= 1
    assert superlink.served[Method.PUSH_MESSAGES] == len(RUNS), "each was worked on once"
