#!/usr/bin/env python3
"""Make the tables of docs/flower-compatibility.md; with --check, only say whether they are up to date.

They are made from the dialect (relay/dialect.py) and from what the contract test observed.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from generate import publish

from relay.call import Wire
from relay.dialect import TABLE, Abort, Answer, Cell, Drop, Empty, Hold, Status
from relay.fleet import Kind, Method
from relay.refusal import Reason

PAGE = Path(__file__).with_name("flower-compatibility.md")
OUTCOMES = Path(__file__).parents[1] / "tests" / "contract" / "outcomes.json"

TITLES = {
    Wire.HTTP_V1: "HTTP v1: flwr 1.40 and newer",
    Wire.REST_V0: "REST v0: flwr 1.23 to 1.32 with `--rest`",
    Wire.GRPC: "gRPC: flwr 1.23 to 1.39",
    Wire.GRPC_ADAPTER: "gRPC adapter: flwr 1.23 to 1.39 with `--grpc-adapter`",
}

#: The answers of the last section, and what they are called there.
OTHERS = {
    **{str(code): str(code) for code in (403, 404, 413, 429, 500, 502, 503, 504)},
    "drop": "closed connection",
    "cut": "answer that breaks off",
    "empty": "200, no bytes",
    "other type": "200, content type with `; charset=utf-8`",
    "html": "200, an HTML page",
    "garbage": "200, bytes that are no message",
}
#: The same for gRPC.
GRPC_OTHERS = {
    **{
        name: name
        for name in (
            *("PERMISSION_DENIED", "NOT_FOUND", "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED", "UNKNOWN"),
            *("FAILED_PRECONDITION", "INVALID_ARGUMENT", "UNIMPLEMENTED", "UNAVAILABLE"),
        )
    },
    "empty": "OK, no bytes",
    "garbage": "OK, bytes that are no message",
}


class Release(NamedTuple):
    """What was observed of one release.

    Attributes:
        version: the release.
        outcomes: by method and name of the answer.
    """

    version: str
    outcomes: dict[str, dict[str, str]]


def render() -> str:
    """Return the page's text, with its tables made anew.

    Raises:
        SystemExit: a cell of the dialect was never observed.
    """
    page = PAGE.read_text(encoding="utf-8")
    for name, parts in {"told": _told(), "others": _others()}.items():
        page = _replace(page, name, "\n".join(parts))
    return page


def main(arguments: list[str]) -> int:
    """Write the page; see `publish`."""
    return publish(PAGE, render(), "made from the dialect and what was observed", arguments)


def _replace(page: str, name: str, text: str) -> str:
    before, begin, rest = page.partition(f"<!-- made: {name} -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    if not begin or not end:
        raise SystemExit(f"{PAGE.name} has no place for {name}")
    return f"{before}{begin}\n{text}\n{end}{after}"


# -- what nodes are told ----------------------------------------------------------------------------------


def _told() -> Iterator[str]:
    for wire in Wire:
        yield f"### {TITLES[wire]}\n"
        yield _answers(wire)
        yield "What becomes of the node, and why it is told this:\n"
        yield _cells(wire)


def _answers(wire: Wire) -> str:
    """The table of reasons by methods; methods that are told the same for the same cause share a column."""
    columns: dict[tuple[Cell, ...], list[Method | None]] = {}
    for method in (*Method, None):
        columns.setdefault(tuple(TABLE[wire, reason, method] for reason in Reason), []).append(method)
    head = ["reason", *(_names(methods) for methods in columns.values())]
    rows = [
        [f"`{reason.value}`", *(_word(column[index].answer) for column in columns)]
        for index, reason in enumerate(Reason)
    ]
    return _table(head, rows)


def _cells(wire: Wire) -> str:
    """The table of the distinct cells, with what became of nodes."""
    releases = _releases(wire)
    cells: dict[tuple[Cell, Kind | None], tuple[list[Method], list[Reason]]] = {}
    for (of, reason, method), cell in TABLE.items():
        if of is wire and method is not None:
            methods, reasons = cells.setdefault((cell, method.kind), ([], []))
            methods += [method] * (method not in methods)
            reasons += [reason] * (reason not in reasons)
    rows = [
        [
            _names(methods),
            _word(cell.answer),
            _reasons(reasons),
            *(_seen(release, methods, _name(cell.answer)) for release in releases),
            cell.why,
        ]
        for (cell, _), (methods, reasons) in cells.items()
    ]
    return _table(["call", "answer", "reasons", *(release.version for release in releases), "why"], rows)


def _reasons(reasons: list[Reason]) -> str:
    missing = [reason for reason in Reason if reason not in reasons]
    if not missing:
        return "all"
    if len(missing) < len(reasons):
        return f"all but {', '.join(f'`{reason.value}`' for reason in missing)}"
    return ", ".join(f"`{reason.value}`" for reason in reasons)


def _word(answer: Answer) -> str:
    match answer:
        case Status(code) | Abort(code):
            return str(code)
        case Drop():
            return "close"
        case Empty():
            return "empty"
        case Hold(seconds):
            return f"hold {seconds:g} s"


def _name(answer: Answer) -> str:
    """The answer's name in outcomes.json, as tests/contract/faults.py gives it."""
    return str(answer.code) if isinstance(answer, Status | Abort) else type(answer).__name__.lower()


# -- what they must not be told ---------------------------------------------------------------------------


def _others() -> Iterator[str]:
    for wire in Wire:
        releases = _releases(wire)
        versions = " and ".join(release.version for release in releases)
        yield f"### {TITLES[wire]} (seen with {versions})\n"
        methods = [method for method in Method if method.kind is not Kind.LEAVE]
        others = GRPC_OTHERS if wire.grpc else OTHERS
        columns = [
            list(group)
            for _, group in groupby(methods, key=lambda one, others=others: _row(releases, one, others))
        ]
        rows = [
            [title, *(_seen_by_all(releases, column, answer) for column in columns)]
            for answer, title in others.items()
        ]
        yield _table(["answer", *(_names(column) for column in columns)], rows)


def _row(releases: Iterable[Release], method: Method, others: Iterable[str]) -> list[str]:
    return [_seen_by_all(releases, [method], answer) for answer in others]


def _seen_by_all(releases: Iterable[Release], methods: list[Method], answer: str) -> str:
    outcomes = {release.version: _seen(release, methods, answer, missing="") for release in releases}
    if len(set(outcomes.values())) == 1:
        return next(iter(outcomes.values()))
    return "; ".join(f"{version}: {outcome}" for version, outcome in outcomes.items())


# -- small things -----------------------------------------------------------------------------------------


def _releases(wire: Wire) -> list[Release]:
    """The releases of this wire, oldest first."""
    record = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    versions = sorted(
        (version for version, entry in record.items() if entry["wire"] == wire.value),
        key=lambda version: [int(part) for part in version.split()[0].split(".")],
    )
    return [Release(version.split()[0], record[version]["outcomes"]) for version in versions]


def _seen(release: Release, methods: list[Method], answer: str, missing: str | None = None) -> str:
    outcomes = {method.rpc: release.outcomes[method.rpc].get(answer, missing) for method in methods}
    never = [rpc for rpc, outcome in outcomes.items() if outcome is None]
    if never:
        raise SystemExit(
            f"{OUTCOMES.name} does not say what flwr {release.version} does when {never[0]} gets {answer!r}: "
            "run UPDATE_OUTCOMES=1 scripts/test tests/contract"
        )
    if len(set(outcomes.values())) == 1:
        return next(iter(outcomes.values())) or ""
    return "; ".join(f"{rpc}: {outcome}" for rpc, outcome in outcomes.items())


def _names(methods: list[Method | None] | list[Method]) -> str:
    return ", ".join(method.rpc if method else "*unknown*" for method in methods)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
