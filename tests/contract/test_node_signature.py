"""Unmodified SuperNodes pass the check of their signature, and live through a quarantine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from relay.call import Call, Payload, Reply, Source, Wire
from relay.credentials.node_keys import NodeKeys
from relay.credentials.node_signature import NodeSignature
from relay.fleet import Method
from relay.pipeline import compose
from relay.policies import Auth, Inventory, Quarantine
from relay.stores.nodes import Nodes as Known
from relay.stores.quarantine_list import QuarantineList, parse
from tests.contract.conftest import PROBE, TRANSPORTS
from tests.contract.nodes import Nodes, Outcome, observe
from tests.contract.superlink import NODE_ID, SuperLink

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180), pytest.mark.xdist_group("contract")]

RELEASES = [("", Wire.HTTP_V1), ("flwr==1.42.0", Wire.HTTP_V1)]


async def no_fault(right: Callable[[], Awaitable[Reply]]) -> Reply:
    return await right()


class Guarded(SuperLink):
    """A SuperLink behind the policies of this test."""

    def __init__(self, wire: Wire, known: Known, listed: Any, *, signed: bool) -> None:
        super().__init__(wire, Method.PULL_MESSAGES, no_fault)
        credential = NodeSignature(NodeKeys(), always=True)
        self.policies = (
            Inventory(enabled=True, nodes=known),
            Auth(((credential,),) if signed else ()),
            Quarantine(listed),
        )

    async def handle(self, method: Method, call: Call) -> Reply:
        async def answered(call: Call) -> Reply:
            return await super(Guarded, self).handle(method, call)

        reply = await compose(self.policies, answered, method, buffer_limit=1 << 20).handler(call)
        return reply if reply.source is Source.UPSTREAM else Reply(Payload(), Source.LOCAL)


@pytest.mark.parametrize(("requirement", "wire"), [*RELEASES, ("flwr[rest]==1.32.1", Wire.REST_V0)], ids=str)
async def test_a_node_signs_in_waits_in_quarantine_and_goes_on(
    flower: Callable[[str], Path], tmp_path: Path, requirement: str, wire: Wire
) -> None:
    python = flower(requirement) / "python" if requirement else Path(sys.executable)
    known = Known(64)
    refused = []

    class Listed:
        """Everybody is known by the node's id; it is released after some of its calls."""

        @property
        def value(self) -> QuarantineList:
            record = known.get(NODE_ID)
            if record is None or record.refusals >= 8:
                return QuarantineList()
            refused.append(record.refusals)
            return parse(f"node {NODE_ID}")

    superlink = Guarded(wire, known, Listed(), signed=wire is Wire.HTTP_V1)
    async with Nodes(python, PROBE, tmp_path, TRANSPORTS.get(wire, "")) as nodes:
        seen = await observe(nodes, "node", superlink, 60.0)
        version = nodes.version
    assert seen.outcome is Outcome.CONTINUES, seen
    assert len(refused) >= 8
    record = known.get(NODE_ID)
    assert record is not None
    assert record.facts is not None
    assert record.facts.accepted
    assert record.refused is not None
    assert record.refused.why == "forbidden"
    if wire is Wire.HTTP_V1:
        assert record.facts.version == version
        assert record.facts.identity.startswith("SHA256:")
        assert any(record.facts.key)
        assert abs(record.facts.skew) < 5
    else:
        assert record.facts.version.startswith("python-requests/")
