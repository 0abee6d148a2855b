"""What the logs of the relay and of the SuperLink say about the calls of a drill."""

import datetime as dt
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from relay.fleet import BY_PATH, Method

_ACCESS: Final = re.compile(rb'"POST /(?:v1|api/v0)/fleet/([a-z-]+) HTTP/1\.1" 200\b')
_LOUD: Final = frozenset({"error", "critical"})


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the relay's log.

    Attributes:
        at: when, in seconds since the epoch.
        level, event: as in the log; level "" for a line that is no JSON, whose event is the line.
        fields: the rest of it.
    """

    at: float
    level: str
    event: str
    fields: dict[str, Any] = field(default_factory=dict)

    def is_ok(self, method: Method, node_id: int) -> bool:
        """Return whether it says that a call of this node was answered as it should."""
        return (
            self.event == "call"
            and self.fields.get("outcome") == "ok"
            and self.fields.get("method") == method.rpc
            and self.fields.get("node_id") == node_id
        )


def parse(text: str) -> Line:
    """Read one line of a log in JSON."""
    try:
        fields = json.loads(text)
        at = dt.datetime.fromisoformat(fields.pop("timestamp")).timestamp()
        return Line(at, fields.pop("level"), fields.pop("event"), fields)
    except (ValueError, KeyError, AttributeError, TypeError):
        return Line(0.0, "", text)


class Log:
    """A growing log file, read in whole lines from where the last reading ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def new(self) -> list[str]:
        """Return the lines that came since the last time."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode(errors="replace").splitlines()


class RelayLog:
    """The relay's log, over all its restarts. `lines` grows by `read`."""

    def __init__(self, path: Path) -> None:
        self.lines: list[Line] = []
        self._log = Log(path)

    def read(self) -> Sequence[Line]:
        """Take in what is new; return all."""
        self.lines += [parse(text) for text in self._log.new()]
        return self.lines


class AccessLog:
    """The calls that the SuperLink has answered with 200, by method; `served` grows by `read`."""

    def __init__(self, path: Path) -> None:
        self.served: Counter[str] = Counter()
        self._log = Log(path)

    def read(self) -> Counter[str]:
        """Take in what is new; return all."""
        for text in self._log.new():
            found = _ACCESS.search(text.encode())
            if found is not None:
                self.served[BY_PATH[found[1].decode()].rpc] += 1
        return self.served


def lost(lines: Iterable[Line], *, but: frozenset[str] = frozenset()) -> Counter[str]:
    """Count by method the calls whose answer the relay had from the SuperLink, and no node got.

    Args:
        lines: of the relay's log.
        but: request ids that do not count, because no node made them.
    """
    return Counter(
        line.fields["method"]
        for line in lines
        if line.event == "answer lost" and line.fields["request_id"] not in but
    )


def delivered(lines: Iterable[Line]) -> Counter[str]:
    """Count by method the calls whose node got the answer 200 of the SuperLink. Needs the level debug."""
    return Counter(
        line.fields["method"]
        for line in lines
        if line.event == "call" and line.fields["outcome"] == "ok" and line.fields["source"] == "upstream"
    )


def by_method(paths: Mapping[str, int]) -> Counter[str]:
    """Return counts of HTTP paths as counts of methods; the relay's own checks are none."""
    names = ((path.rsplit("/", 1)[-1], count) for path, count in paths.items())
    return Counter({BY_PATH[name].rpc: count for name, count in names if name in BY_PATH})


def refused(lines: Iterable[Line]) -> Counter[str]:
    """Count the refused calls by reason."""
    return Counter(line.fields["outcome"] for line in lines if line.event == "call refused")


def complaints(lines: Iterable[Line], *, but: str = "") -> list[str]:
    """Return what should not be in the relay's log: errors, and output that is no line of it.

    Args:
        lines: of the relay's log.
        but: part of the errors that are as they should be; "" for none.
    """
    found = [f"{line.level} {line.event} {line.fields}" for line in lines if line.level in {*_LOUD, ""}]
    return [text for text in found if not but or but not in text]
