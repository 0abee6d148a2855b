"""`flwr-relay demo`: a real federation on this machine trains through the relay, watched while it does."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from relay.call import Wire
from relay.demo.processes import FederationError, wait_ready

_MOST_NODES = 50
_SECONDS = 120.0  # that a run may take, and
_SECONDS_PER_ROUND = 60.0  # for each of its rounds
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def demo(
    *,
    nodes: Annotated[int, typer.Option(min=1, max=_MOST_NODES, help="Number of SuperNodes.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of the relay.")] = 2,
    wire: Annotated[
        Wire, typer.Option(help="Wire that the nodes speak; rest_v0 wants flwr 1.32 or older.")
    ] = Wire.HTTP_V1,
    flwr_bin: Annotated[
        Path | None, typer.Option(help="Directory of Flower's commands [default: where this Python is].")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the directory with the logs.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Print a line per event, no live view.")] = False,
) -> None:
    """Train a small model on a real Flower federation through the relay, all of it on this machine."""
    console = Console()
    try:
        with _signals_raise():
            _train(
                console,
                flwr_bin=flwr_bin or Path(sys.executable).parent,
                live=console.is_terminal and not plain,
                wire=wire,
                nodes=nodes,
                rounds=rounds,
                workers=workers,
                keep=keep,
            )
    except FederationError as error:
        console.print("[bold red]The demo failed.[/]", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except _Signalled as signalled:
        console.print(f"Ended by {signalled.number.name}; so is every process of the demo.")
        raise typer.Exit(128 + signalled.number) from None


def _train(
    console: Console,
    *,
    flwr_bin: Path,
    live: bool,
    wire: Wire,
    nodes: int,
    rounds: int,
    workers: int,
    keep: bool,
) -> None:
    # Not above: `flwr-relay serve` imports this module too, and has to decide how prometheus_client counts
    # before that is imported.
    from relay.demo import flower  # noqa: PLC0415
    from relay.demo.display import Display, summary  # noqa: PLC0415
    from relay.demo.federation import Federation  # noqa: PLC0415

    release = "flwr " + ".".join(map(str, version := flower.version(flwr_bin)))
    if not flower.speaks(version, wire):
        raise FederationError(release, f"does not speak {wire.value}: choose another --wire or --flwr-bin")
    with (
        Display(console, rounds, live=live) as display,
        Federation(flwr_bin, wire=wire, nodes=nodes, workers=workers, keep=keep) as federation,
    ):
        display.federation = federation
        federation.up(wait_for_nodes=False)
        # `flwr run` needs seconds to get its ServerApp running, as the nodes need them to get ready.
        display.run = federation.start_run({"num-server-rounds": rounds})
        wait_ready(federation.supernodes)
        display.run.wait(_SECONDS + rounds * _SECONDS_PER_ROUND)
        federation.stop_supernodes()
        last = display.look()  # all calls are counted now, and the relay is still there to tell
    size = [_count(rounds, "round"), _count(nodes, "SuperNode"), _count(workers, "relay worker"), release]
    console.print(summary(last, ", ".join(size)))
    if keep:
        console.print(f"\nThe logs are in {federation.directory}", soft_wrap=True)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


class _Signalled(BaseException):
    """A signal that asks this program to end has come. Not an Exception, so that nothing swallows it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Inside, a signal that asks this program to end raises `_Signalled` in the main thread."""

    def handle(number: int, _: FrameType | None) -> NoReturn:
        raise _Signalled(signal.Signals(number))

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
