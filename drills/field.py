"""A federation in one configuration of the matrix, with everything that the drills take hold of."""

from __future__ import annotations

import re
import signal
import tempfile
import time
from base64 import b64encode
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import psutil

from drills import certificates
from drills.evidence import AccessLog, Line, RelayLog
from drills.matrix import Configuration, Edge, Setup
from drills.nginx import Nginx
from drills.proxy import FaultProxy
from drills.strain import Entry
from relay.credentials.keys.file import FileKeys
from relay.credentials.keys.key import generate
from relay.credentials.keys.record import KeyRecord, hashed
from relay.demo.federation import Federation, Generation
from relay.demo.processes import LOOPBACK, POLL, Process, reserve_port, wait_ready
from relay.fleet import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from drills.certificates import Certificates
    from relay.call import Wire


NODES: Final = 2
WORKERS: Final = 2
RESTART_SECONDS: Final = 60.0  # for a relay's drain, which a SIGKILL must not end
_NODE_ID: Final = re.compile(r"SuperNode ID: (\d+)")


class Field:
    """The federation, up and running within its `with` block.

    Attributes:
        configuration, setup: how it is built.
        federation: SuperLink, relay and SuperNodes.
        relay: the relay's process.
        proxy: between relay and SuperLink.
        second_proxy: likewise, for the second address of the SuperLink in the setup TWO_WAYS.
        node_proxy: between SuperNodes and what they connect to, in the setup CUTTABLE.
        entry: what the SuperNodes connect to.
        edge: nginx, where there is one.
        relay_log, access_log: what relay and SuperLink have written.
        not_nodes: request ids of calls that a drill's own clients made.
        keys: of the SuperNodes, as `name:key`; none where the relay does not ask for any.
    """

    def __init__(
        self,
        configuration: Configuration,
        setup: Setup,
        commands: Callable[[Wire], Path],
        *,
        keep: bool = False,
    ) -> None:
        """Prepare it; entering the `with` block starts it. `commands` gives Flower's for a wire."""
        self.configuration, self.setup = configuration, setup
        self.not_nodes: set[str] = set()
        self._commands = commands
        self._keep = keep
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as resources:
            self._build(resources)
            self.federation.up()
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def _build(self, resources: ExitStack) -> None:
        behind_nginx = self.configuration.edge is Edge.NGINX
        directory = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="flwr-drill-")))
        made = certificates.make(directory) if self.configuration.tls else None
        wire, spoken = self.configuration.wire, self.configuration.upstream
        self.proxy = resources.enter_context(FaultProxy(opaque=spoken.grpc))
        store = directory / "keys.jsonl"
        self.keys = _hand_out(store) if self.configuration.keys else []
        two_ways = self.setup is Setup.TWO_WAYS
        self.second_proxy = resources.enter_context(FaultProxy(opaque=spoken.grpc)) if two_ways else None
        upstream: dict[str, Any] = {"url": f"http://{LOOPBACK}:{self.proxy.port}"}
        if self.second_proxy:
            upstream["addresses"] = [f"http://{LOOPBACK}:{self.second_proxy.port}"]
            upstream["shared_state"] = True
        cuttable = self.setup is Setup.CUTTABLE
        self.node_proxy = resources.enter_context(FaultProxy(opaque=wire.grpc)) if cuttable else None
        ports = [resources.enter_context(reserve_port()).getsockname()[1] for _ in range(2)]
        entry_port = ports[0] if behind_nginx else None
        self.federation = resources.enter_context(
            Federation(
                self._commands(spoken),
                wire=spoken,
                nodes=[Generation(self._commands(wire), wire)] * NODES,
                workers=WORKERS,
                relay_config={
                    "upstream": upstream,
                    "log": {"level": "debug"},
                    **({"keys": {"file": str(store)}} if self.keys else {}),
                },
                listener_config=_listener(made, behind_nginx=behind_nginx, asks=bool(self.keys)),
                userinfo=self.keys,
                entry_port=self.node_proxy.port if self.node_proxy else entry_port,
                root_certificates=made.authority if made else None,
                superexec=self.setup is not Setup.INSIDE,
                superlink_log_level="DEBUG",
                keep=self._keep,
            )
        )
        federation = self.federation
        assert federation.relay is not None
        self.relay: Process = federation.relay
        federation.superlink.argv += ["--database", str(federation.directory / "superlink.db")]
        self.proxy.target = federation.ports.fleet
        if self.second_proxy:
            self.second_proxy.target = federation.ports.fleet
        self.entry = Entry(
            ports[0] if behind_nginx else federation.relay_port,
            made.authority if made else None,
            ("h2",) if wire.grpc else (),
        )
        if self.node_proxy:
            self.node_proxy.target = self.entry.port
        self.edge: Nginx | None = None
        if behind_nginx:
            (folder := directory / "edge").mkdir()
            edge = Nginx(
                folder,
                port=ports[0],
                status_port=ports[1],
                relay_port=federation.relay_port,
                tls=made,
                grpc=wire.grpc,
            )
            self.edge = resources.enter_context(edge)
        self.relay_log = RelayLog(self.relay.log)
        self.access_log = AccessLog(federation.superlink.log)

    # -- what drills do -----------------------------------------------------------------------------

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes of the relay, oldest first."""
        children: list[psutil.Process] = psutil.Process(self.relay.pid).children()
        return sorted(children, key=lambda child: (child.create_time(), child.pid))

    def end_apps(self) -> None:
        """Kill what runs of a ServerApp that has no end of its own."""
        owner = self.federation.superexec or self.federation.superlink
        for child in psutil.Process(owner.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any("flwr-serverapp" in word for word in child.cmdline()):
                    child.kill()

    def restart_relay(self) -> None:
        """Stop the relay as an operator does, wait for its end, and start it again."""
        self.relay.stop(RESTART_SECONDS)
        self.relay.start()
        wait_ready([self.relay])

    def hang_up(self) -> None:
        """Have the relay reload."""
        self.relay.send(signal.SIGHUP)

    def as_node(self, request: bytes) -> bytes:
        """Return a call that the relay sent on as its node had sent it: with a key, if one is asked for."""
        if not self.keys:
            return request
        first, rest = request.split(b"\r\n", 1)
        return b"%b\r\nauthorization: Basic %b\r\n%b" % (first, b64encode(self.keys[0].encode()), rest)

    # -- what drills look at ------------------------------------------------------------------------

    def proxies(self) -> list[FaultProxy]:
        """Return the proxies that there are."""
        return [proxy for proxy in (self.proxy, self.second_proxy, self.node_proxy) if proxy is not None]

    def abandoned(self) -> Counter[str]:
        """Count the calls by path that the relay left before it had the SuperLink's whole answer."""
        proxies = (self.proxy, self.second_proxy)
        return sum((proxy.abandoned for proxy in proxies if proxy is not None), Counter())

    def node_ids(self) -> dict[str, int]:
        """Return the id of each SuperNode by the name of its process."""
        return node_ids(self.federation.supernodes)

    def find(self, what: Callable[[Line], bool], since: float = 0.0) -> Line | None:
        """Return the first such line of the relay's log after `since`, if there is one."""
        return next((line for line in self.relay_log.read() if line.at > since and what(line)), None)

    def wait_for(self, what: Callable[[Line], bool], timeout: float, *, since: float) -> bool:
        """Wait until the relay's log has such a line of after `since`; return whether it has."""
        end = time.monotonic() + timeout
        while self.find(what, since) is None:
            if time.monotonic() > end:
                return False
            time.sleep(2 * POLL)
        return True

    def wait_for_objects(self, timeout: float, *, since: float | None = None) -> bool:
        """Wait until a node fetches or pushes objects, which is when it has most to lose."""
        busy = {Method.PULL_OBJECT.rpc, Method.PUSH_OBJECT.rpc}
        after = time.time() if since is None else since
        return self.wait_for(lambda line: line.fields.get("method") in busy, timeout, since=after)


def node_ids(nodes: Iterable[Process]) -> dict[str, int]:
    """Return the id of each SuperNode that was activated, by the name of its process."""
    found = {node.name: _NODE_ID.findall(node.output()) for node in nodes}
    return {name: int(ids[-1]) for name, ids in found.items() if ids}


def _hand_out(store: Path) -> list[str]:
    """Make a key for each SuperNode; return what each presents itself with."""
    keys = [generate() for _ in range(NODES)]
    records = [
        KeyRecord(key.id.decode(), f"node-{number}", hashed(key.secret, b""), int(time.time()))
        for number, key in enumerate(keys)
    ]
    FileKeys(store).change(
        lambda present: present.update((record.id, record) for record in records), init=True
    )
    return [f"{record.name}:{key}" for record, key in zip(records, keys, strict=True)]


def _listener(made: Certificates | None, *, behind_nginx: bool, asks: bool) -> dict[str, Any]:
    """Return the settings of the relay's listener: its own TLS, or trust in the nginx before it; and keys."""
    settings: dict[str, Any] = {"auth": {"accept": ["api_key"]}} if asks else {}
    if behind_nginx:
        settings["trusted_proxies"] = [f"{LOOPBACK}/32"]
    elif made:
        settings["tls"] = {"certificate": str(made.certificate), "key": str(made.key)}
    return settings
