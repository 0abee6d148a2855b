"""Logs: one form for the relay's own lines and for those of the libraries under it, on one stream.

Two rules hold in either format: a value never starts a line of its own, whatever it holds, and the value of a
field or header that carries a credential is never written.
"""

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any, Final, TextIO

import structlog
from structlog.processors import ExceptionRenderer, TimeStamper, add_log_level, format_exc_info
from structlog.stdlib import LoggerFactory, ProcessorFormatter, add_logger_name
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

from relay import log_writer
from relay.settings import Log

MASKED: Final = frozenset(
    {"authorization", "proxy-authorization", "cookie", "x-api-key", "flwr-signature", "flwr-signature-bin"}
)
"""Names of fields and headers whose value is written as ***; in any case, and with `_` for `-`."""

_DEEPEST = 8
# gunicorn keeps these two from the root logger, so they get the handler themselves.
_CYGRPC = "grpc._cython.cygrpc"
_APART_FROM_ROOT = ("gunicorn.error", "gunicorn.access")
_FIRST = ("timestamp", "level", "event", "logger")


def configure(log: Log, stream: TextIO | None = None) -> None:
    """Send every line, of the relay and of the standard library's logging, to `stream` (None: stderr).

    Nobody who writes a line waits for the stream; see `log_writer`.

    Call it once in a process, before the first line: a logger that has written keeps its level. Start
    gunicorn with `errorlog` None, or it writes its lines a second time.
    """
    stream = sys.stderr if stream is None else stream
    level = structlog.processors.NAME_TO_LEVEL[log.level]
    annotate: list[Processor] = [add_log_level, add_logger_name, TimeStamper(fmt="iso", utc=True)]
    structlog.configure(
        processors=[*annotate, ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = log_writer.handler_for(stream)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=annotate,
            processors=[ProcessorFormatter.remove_processors_meta, _mask, _order, *_renderer(log, stream)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # At debug it writes a line per step of each call.
    logging.getLogger("grpc").setLevel(max(root.level, logging.INFO))
    logging.getLogger(_CYGRPC).addFilter(_fit_to_write)
    for name in _APART_FROM_ROOT:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False


def _fit_to_write(record: logging.LogRecord) -> bool:
    """Return whether a line of grpcio's may be written: none with metadata that is no UTF-8.

    It would show them, and they may be a secret that a SuperLink, or something before it, gives back.
    """
    return not str(record.msg).startswith("Invalid encoding on")


def _renderer(log: Log, stream: TextIO) -> list[Processor]:
    if log.format == "json" or (log.format == "auto" and not stream.isatty()):
        # Without locals: they hold payloads and credentials.
        return [ExceptionRenderer(ExceptionDictTransformer(show_locals=False)), _render_json]
    plain = structlog.dev.plain_traceback
    console = structlog.dev.ConsoleRenderer(
        colors=stream.isatty(), sort_keys=False, exception_formatter=plain
    )
    return [format_exc_info, _make_printable, console]


def _mask(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    exc_info = event.pop("exc_info", None)
    masked: dict[str, Any] = _masked(event)
    return masked if exc_info is None else masked | {"exc_info": exc_info}


def _masked(value: Any, depth: int = 0) -> Any:
    """`value` with *** for each credential, also in mappings and lists of pairs, the two forms of headers."""
    if depth > _DEEPEST:  # it may contain itself
        return "..."
    match value:
        case Mapping():
            return {
                key: "***" if _is_secret(key) else _masked(entry, depth + 1) for key, entry in value.items()
            }
        case (key, _) if _is_secret(key):
            return (key, "***")
        case list() | tuple() | set() | frozenset():
            return [_masked(entry, depth + 1) for entry in value]
        case _:
            return value


def _is_secret(key: object) -> bool:
    name = key.decode("latin-1") if isinstance(key, bytes) else key
    return isinstance(name, str) and name.lower().replace("_", "-") in MASKED


def _order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {name: event[name] for name in _FIRST} | dict(event)


def _render_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    try:
        return json.dumps(event, default=repr, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # a key that is no text, a number that is none, a cycle
        return json.dumps(
            {str(name): value if isinstance(value, str) else repr(value) for name, value in event.items()}
        )


def _make_printable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape what moves a terminal's cursor or looks like a new line; indent a traceback under its line."""
    exception = event.pop("exception", None)
    printable = {_printable(name): _printable(value) for name, value in event.items()}
    if exception is not None:
        printable["exception"] = "\n".join(f"    {_printable(line)}" for line in exception.split("\n"))
    return printable


def _printable(value: Any) -> Any:
    text = value if isinstance(value, str) else repr(value)
    if text.isprintable():
        return value
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
