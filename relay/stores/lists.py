"""Lists in text files: one entry a line, `#` begins a comment line, empty lines count for nothing.

A line ends with a line feed and with nothing else: what other characters some tools take for its end (a lone
CR, a form feed, U+0085, U+2028 ...) belong to it, and none of them is written here.

People and configuration management may write them, and the command line does (`edit`): under a lock, as a new
file that replaces the old one in one step, with its owner and mode; a link stays one. The first is made with
mode 0600, for the owner of its directory. `parse` is what each kind of list builds on.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

    T = TypeVar("T")

#: Longest file that is read: more than 50,000 entries.
MOST_BYTES = 16 << 20
#: Mode of a file that did not exist.
_NEW_MODE = 0o600


class ListError(Exception):
    """A list, or an entry for one, cannot be used. The text names the line and what would be right."""


def parse(text: str, entry: Callable[[str], T]) -> Iterator[tuple[int, T]]:
    """Yield the number and the entry of each line that holds one.

    Raises:
        ListError: `entry` raised ValueError for a line, with what would be right.
    """
    for number, line in enumerate(_lines(text), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        try:
            yield number, entry(stripped)
        except ValueError as error:
            raise ListError(f"line {number}: {error}") from None


def read(path: Path) -> str:
    """Return the text of a list.

    Raises:
        ListError: it is too long, no text, or no file.
        OSError: it cannot be read.
    """
    # Not blocking: that a named pipe stands there must not stop whoever reads for good.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ListError("is no file: write one there")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MOST_BYTES:
        raise ListError(f"is longer than {MOST_BYTES >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ListError(f"byte {error.start} is not UTF-8: it must be a text file") from None


def edit(path: Path, change: Callable[[str], str]) -> None:
    """Replace the text of a list (that of an absent one is "") by what `change` makes of it.

    Two that edit at once wait for each other. What `change` raises passes, and changes nothing.

    Raises:
        ListError: see `read`; or another program, which takes no lock, has changed it meanwhile.
        OSError: it cannot be read or written.
    """
    path = path.resolve()  # a link stays one
    with _locked(path.parent):
        try:
            text, status = read(path), path.stat()
        except FileNotFoundError:
            text, status = "", None
        changed = change(text)
        if changed == text and status is not None:
            return
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(changed.encode())
                _dress(file, status, path.parent)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        if read(path) != changed:
            raise ListError("does not hold what was written: another program changes it, too")


def _dress(file: IO[bytes], status: os.stat_result | None, directory: Path) -> None:
    """Give the new file mode and owner of the old one, or those of a first one.

    Only root may give a file away: the relay's user must go on reading what root changed.
    """
    mode, owner = (_NEW_MODE, directory.stat()) if status is None else (status.st_mode & 0o777, status)
    with suppress(PermissionError):
        os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
    if os.fstat(file.fileno()).st_gid != owner.st_gid:
        mode &= ~0o070  # it would be another group's
    os.fchmod(file.fileno(), mode)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Be the only one who edits in this directory. The kernel ends the lock with the process."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def with_line(text: str, line: str) -> str:
    """Return `text` with a line at its end.

    Raises:
        ListError: the line holds what could be taken for its end, or moves a terminal's cursor.
    """
    if not line.isprintable():
        raise ListError("cannot hold control characters and line separators")
    return f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}{line}\n"


def without_lines(text: str, numbers: set[int]) -> str:
    """Return `text` without the lines of these numbers, which count from 1 as in `parse`."""
    return "".join(line for number, line in enumerate(_lines(text), 1) if number not in numbers)


def _lines(text: str) -> StringIO:
    """Return the lines with their ends; not `splitlines`, which knows ten more ends of a line."""
    return StringIO(text, newline="\n")
