"""Real SuperNodes on demand, inside the Python of one Flower release (standard library and flwr only).

Flower is imported once; each node is a fork of this process that runs Flower's own `start_client_internal`
in its main thread, with Flower's own connection, retries, heartbeats, signal handlers and exits. Two things
are not Flower's: waiting passes SPEED times as fast, and the ClientApp is a thread with an empty reply.

Commands come as lines of JSON on stdin, events leave the same way on stdout:

    {"start": name, "superlink": "127.0.0.1:8000"}       a node; its output goes to <directory>/<name>.log
    {"signal": number, "node": name}                     send it a signal
    {"ready": "1.42.0"}                                  Flower's release; once, when nodes can be started
    {"node": name, "thread_died": "RuntimeError(...)"}   a thread of it ended by an exception
    {"node": name, "returned": true}                     its main loop ended by itself (the CLI then lives on
                                                         as a process that does nothing)
    {"node": name, "exit": 0}                            its process ended: exit code, or minus a signal

The nodes are killed when stdin ends. Usage: FLWR_HOME=... node_probe.py <directory for logs> [<transport>]
The transport is Flower's name of it, for a release that has several.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import inspect
import json
import os
import selectors
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import flwr
from flwr.app import Message, RecordDict
from flwr.supercore.exit import exit as exit_module
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree, no_object_id_recompute
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import start_client_internal as internal
from flwr.supernode.nodestate import NodeStateFactory

with contextlib.suppress(ImportError):  # flwr < 1.40 with REST imports it late, and then each fork would
    import flwr.client.rest_client.connection

if TYPE_CHECKING:
    from collections.abc import Callable

#: A node's second takes this many times less. Only sleeps and waits for events are shortened; what the
#: network takes, it takes.
SPEED = 100.0
#: What a ClientApp takes to start, in a node's seconds.
CLIENTAPP_SECONDS = 4.0

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Node(NamedTuple):
    """A node to become.

    Attributes:
        name: how it is called in events.
        superlink: the address that it connects to.
        events: where it tells what happens to it.
    """

    name: str
    superlink: str
    events: int


class _Child(NamedTuple):
    name: str
    pid: int


def serve(directory: Path) -> Node | None:
    """Start nodes until stdin ends. Returns None then, and in each fork the node that it is to be."""
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    children: dict[int, _Child] = {}
    commands = b""
    while True:
        for key, _ in selector.select():
            fd = key.fd
            data = os.read(fd, 65536)
            if fd == sys.stdin.fileno():
                if not data:
                    _kill(children)
                    return None
                *lines, commands = (commands + data).split(b"\n")
                for line in lines:
                    node = _obey(json.loads(line), directory, selector, children)
                    if node is not None:
                        return node
            elif data:
                _tell(data)  # a whole number of lines: they are shorter than PIPE_BUF
            else:
                selector.unregister(fd)
                os.close(fd)
                child = children.pop(fd)
                _, status = os.waitpid(child.pid, 0)
                _event(node=child.name, exit=os.waitstatus_to_exitcode(status))


def _obey(
    command: dict[str, Any],
    directory: Path,
    selector: selectors.BaseSelector,
    children: dict[int, _Child],
) -> Node | None:
    if "signal" in command:
        for child in children.values():
            if child.name == command["node"]:
                os.kill(child.pid, command["signal"])
        return None
    name = command["start"]
    assert threading.active_count() == 1, "a fork would copy the locks of other threads"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        children[reader] = _Child(name, pid)
        selector.register(reader, selectors.EVENT_READ)
        return None
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    selector.close()
    for fd in (reader, *children):
        os.close(fd)
    _redirect(directory / f"{name}.log", name, writer)
    return Node(name, command["superlink"], writer)


def _kill(children: dict[int, _Child]) -> None:
    for child in children.values():
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)


def _redirect(path: Path, name: str, events: int) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.close(nothing)

    def died(args: threading.ExceptHookArgs) -> None:
        traceback.print_exception(args.exc_type, args.exc_value, args.exc_traceback)
        _event(events, node=name, thread_died=repr(args.exc_value)[:200])

    threading.excepthook = died


def _event(fd: int = 1, **event: Any) -> None:
    _tell(json.dumps(event).encode() + b"\n", fd)


def _tell(data: bytes, fd: int = 1) -> None:
    while data:
        data = data[os.write(fd, data) :]


# -- being a node -----------------------------------------------------------------------------------------


def be(node: Node) -> NoReturn:
    """Run the node, and end this process as Python would, but for taking its modules apart one by one."""
    code: int | str | None = 0
    try:
        _run(node)
        _event(node.events, node=node.name, returned=True)
    except SystemExit as ending:
        code = ending.code
    except BaseException:  # noqa: BLE001 - whatever it is, the process ends of it
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _run(node: Node) -> None:
    objects = ObjectStoreFactory()
    states = NodeStateFactory(objectstore_factory=objects)
    receiving = _lock_receiving()
    clientapp = (states.state(), objects.store(), receiving, time.sleep)
    threading.Thread(target=_clientapp, args=clientapp, daemon=True).start()
    sleep, wait = time.sleep, threading.Event.wait

    def short_wait(event: threading.Event, timeout: float | None = None) -> bool:
        return wait(event, None if timeout is None else timeout / SPEED)

    def short_sleep(seconds: float) -> None:
        sleep(seconds / SPEED)

    for place, name, short in ((time, "sleep", short_sleep), (threading.Event, "wait", short_wait)):
        setattr(place, name, short)
    # A node that exits has five seconds for its last calls. These are real calls, so it keeps them.
    exit_module.FORCE_EXIT_TIMEOUT_SECONDS *= SPEED
    start = internal.start_client_internal
    known = inspect.signature(start).parameters
    arguments = {
        "node_config": {},
        "insecure": True,
        "isolation": "process",
        "server_address": node.superlink,
    }
    if "transport" in known:  # flwr < 1.40
        transport = arguments["transport"] = sys.argv[2]
        if transport == "rest":
            arguments["server_address"] = f"http://{node.superlink}"
    if "state_factory" in known:
        start(**arguments, state_factory=states, runtime_api_address="127.0.0.1:0")
    else:
        internal.ObjectStoreFactory = lambda: objects
        internal.NodeStateFactory = lambda objectstore_factory: states
        start(**arguments, clientappio_api_address="127.0.0.1:0")


def _lock_receiving() -> threading.Lock:
    """Return a lock that the node holds while it asks for a message and fetches it."""
    receiving = threading.Lock()
    receive = internal._pull_and_store_message

    def receive_alone(*args: Any, **kwargs: Any) -> Any:
        with receiving:
            return receive(*args, **kwargs)

    internal._pull_and_store_message = receive_alone
    return receiving


def _clientapp(state: Any, store: Any, receiving: threading.Lock, sleep: Callable[[float], None]) -> None:
    """Reply to each message that the node has taken whole.

    A ClientApp needs CLIENTAPP_SECONDS to start, in which a node without troubles is done with receiving.
    """

    def is_whole(message_id: str) -> bool:
        """Raises an exception of Flower's if the node has given the message up."""
        tree = store.get_object_tree(message_id)
        return all(store.get(part.object_id) for part in iterate_object_tree(tree))

    take = getattr(state, "get_messages_legacy", None) or state.get_messages
    waiting: list[Any] = []
    while True:
        waiting += take(is_reply=False)
        for message in list(waiting):
            message_id = message.metadata.message_id
            try:
                if not is_whole(message_id):
                    continue
                with receiving:
                    pass
                sleep(CLIENTAPP_SECONDS / SPEED)
                is_whole(message_id)
            except Exception:  # noqa: BLE001 - its name differs between releases
                waiting.remove(message)
                continue
            waiting.remove(message)
            state.record_message_processing_start(message_id)
            state.record_message_processing_end(message_id)
            _reply(Message(RecordDict(), reply_to=message), state, store)
        sleep(0.2 / SPEED)


class _Kept(NamedTuple):
    """Stands for a node's state, and keeps what is to be stored in it."""

    messages: list[Any]

    def store_message(self, message: Any) -> None:
        self.messages.append(message)


def _reply(reply: Any, state: Any, store: Any) -> None:
    """Insert a reply, its objects first: Flower's own order would let the main loop find it without them."""
    kept = _Kept([])
    internal._insert_message(reply, kept, store)
    with no_object_id_recompute():
        state.store_message(kept.messages[0])


def _main() -> None:
    gc.freeze()
    _event(ready=flwr.__version__)
    node = serve(Path(sys.argv[1]))
    if node is not None:
        be(node)


if __name__ == "__main__":
    _main()
