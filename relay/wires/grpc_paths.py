"""A path that is no text does not end gRPC's server.

The task in which grpcio takes calls decodes the path of each (1.85 `_cython/_cygrpc/aio/server.pyx.pxi`,
`_server_main_loop`). One that is not UTF-8 ends this task, and with it the listener and every call on it: a
stranger could end all nodes of a worker with a single call. Nothing of ours is asked before. What Python
itself asks is the handler of errors in decoding, so this replaces the one that is called `strict`: in that
task alone it puts a replacement character in place of what is no text, and the call is then one for an
unknown path; everywhere else it raises, as before.
"""

from __future__ import annotations

import asyncio
import codecs

#: The coroutine of grpcio that takes calls.
_TAKES_CALLS = "_server_main_loop"


def install() -> None:
    """Put the handler in place, for the whole process; it may be there already."""
    codecs.register_error("strict", _strict)


def _strict(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeDecodeError) and _takes_calls():
        return "\N{REPLACEMENT CHARACTER}", error.end
    return codecs.strict_errors(error)


def _takes_calls() -> bool:
    """Return whether gRPC is taking a call at this moment."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return False
    return task is not None and getattr(task.get_coro(), "__name__", "") == _TAKES_CALLS
