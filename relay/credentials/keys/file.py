"""A file of API keys, for the relays of one host (or of several that are given the same file).

Format: JSON lines in UTF-8. The first says what the file is and how many keys follow, so that a file that was
cut off is known for one; each further line is the record of a key (`relay/credentials/keys/record.py`).

    {"count": 2, "flwr_relay_keys": 1}
    {"created": ..., "hash": "sha256:...", "id": "3fGhQ0zL", "name": "hospital-a"}
    {"created": ..., "hash": "sha256:...", "id": "9kPw2xVb", "name": "hospital-b"}

The file is replaced as a whole by a rename, so a reader sees the old one or the new one. Who changes it holds
a lock on `<file>.lock` beside it meanwhile. It is made with mode 0600; of one that is there, owner and group
stay.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.credentials.keys.record import KeyRecord, RecordError, from_json
from relay.credentials.keys.stores import Records, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FORMAT = 1
#: About a million keys; what is longer is no file of keys.
MOST_BYTES = 256 << 20
#: How long another command may take with its change.
LOCK_SECONDS = 10.0
#: Faults of one file that are told at once.
MOST_FAULTS = 20
#: Two changes within this time may leave the same time stamp.
_COARSE = 0.1


class FileKeys:
    """The keys of one file."""

    def __init__(self, path: Path) -> None:
        """Keep the keys in the file at `path`, whose directory exists."""
        self.path = path
        self.name = f"file {path}"
        self._seen: tuple[int, ...] | None = None
        self._fault: StoreError | None = None
        self._known: dict[bytes, KeyRecord] = {}

    def poll(self) -> Records | None:
        """See `KeyStore.poll`. A file that is not there, or is broken, raises StoreError."""
        try:
            if self._seen is not None and self._seen == _signature(self.path.stat()):
                if self._fault is not None:
                    raise self._fault
                return None
            signature, text = self._bytes()
        except OSError as error:
            self._seen = None
            raise StoreError(f"{self.path} cannot be read: {error.strerror}{_hint(error)}") from None
        self._seen, self._fault = signature, None
        try:
            return self._parse(text)
        except StoreError as error:
            self._fault = error
            raise

    def change(self, change: Callable[[Records], None], *, init: bool = False) -> None:
        """See `KeyStore.change`. A broken file is not touched."""
        try:
            with self._locked():
                try:
                    _, text = self._bytes()
                except FileNotFoundError as error:
                    if not init:
                        raise StoreError(f"{self.path} does not exist{_hint(error)}") from None
                    records: Records = {}
                else:
                    records = self._parse(text)
                change(records)
                self._write(records)
        except OSError as error:
            where = error.filename or self.path
            hint = self._no_place() if isinstance(error, FileNotFoundError) else _hint(error)
            raise StoreError(f"{where} cannot be written: {error.strerror}{hint}") from None

    def close(self) -> None:
        """Nothing is held open."""

    def _no_place(self) -> str:
        """Return what to do about a place where no file can be made."""
        for directory in (self.path.parent, self.path.resolve().parent):
            if not directory.is_dir():
                return f": make the directory {directory}, or set keys.file to another path"
        return f": no file can be made in {self.path.parent}: set keys.file to another path"

    # -- reading ------------------------------------------------------------------------------------

    def _bytes(self) -> tuple[tuple[int, ...] | None, bytes]:
        """Return the content, and what tells it from a later one; None if that cannot be told yet."""
        # Not blocking: that a named pipe stands there must not stop a worker's reading for good.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode) or state.st_size > MOST_BYTES:
                raise StoreError(f"{self.path} is no file of at most {MOST_BYTES >> 20} MiB")
            with open(descriptor, "rb", closefd=False) as file:
                text = file.read(MOST_BYTES + 1)
        finally:
            os.close(descriptor)  # `open` leaves that of a directory open
        settled = abs(time.time() - state.st_mtime) > _COARSE
        return (_signature(state) if settled else None), text

    def _parse(self, text: bytes) -> Records:
        lines = text.split(b"\n")
        count = self._count(lines[0])
        known, self._known = self._known, {}
        records: Records = {}
        faults: list[str] = []
        for number, line in enumerate(lines[1:], 2):
            if not line.strip():
                continue
            try:
                # Most lines are those of before, and nearly all of the time goes into reading a new one.
                record = known.get(line) or from_json(line)
                if record.id in records:
                    raise RecordError(f"has the id {record.id} of a line before it: take one of them out")
            except RecordError as error:
                faults.append(f"{self.path}:{number}: {error}")
                if len(faults) >= MOST_FAULTS:
                    break
                continue
            records[record.id] = self._known[line] = record
        if not faults and len(records) != count:
            faults.append(
                f"{self.path}:1: says that {count} keys follow, and there are {len(records)}: restore it"
                " if it was cut off; if you edited it, correct the count"
            )
        if faults:
            self._known = known
            raise StoreError(*faults)
        return records

    def _count(self, line: bytes) -> int:
        head: Any = None
        with suppress(ValueError, RecursionError):
            head = json.loads(line)
        version = head.get("flwr_relay_keys") if isinstance(head, dict) else None
        count = head.get("count") if isinstance(head, dict) else None
        if (
            version is None
            or isinstance(version, bool)
            or not isinstance(count, int)
            or isinstance(count, bool)
        ):
            raise StoreError(
                f'{self.path}:1: must be {{"flwr_relay_keys": {FORMAT}, "count": <number of keys>}}: restore'
                " it if it was cut off; if it is not a file of keys, set keys.file to another path"
            )
        if version != FORMAT:
            raise StoreError(
                f"{self.path}:1: is of format {str(version)[:20]!r}: this release reads {FORMAT}"
            )
        return count

    # -- writing ------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock; the kernel gives it back whatever becomes of this process."""
        lock = Path(f"{self.path}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            end = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise StoreError(
                            f"{lock} is held by another command for {LOCK_SECONDS:g} s"
                        ) from None
                time.sleep(0.02)
            yield
        finally:
            os.close(descriptor)

    def _write(self, records: Records) -> None:
        target = self.path.resolve()  # a link stays one
        lines = [json.dumps({"flwr_relay_keys": FORMAT, "count": len(records)}, sort_keys=True)]
        lines += (record.to_json() for record in sorted(records.values(), key=lambda r: (r.created, r.id)))
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # mode 0600
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
                file.write("\n".join([*lines, ""]).encode())
                with suppress(FileNotFoundError):
                    _take_over(descriptor, target.stat())
                file.flush()
                os.fsync(descriptor)
            Path(name).replace(target)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
        directory = os.open(target.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _take_over(descriptor: int, before: os.stat_result) -> None:
    """Leave the file to whom it belonged: a relay that is not root must go on reading what root changed."""
    mode = stat.S_IMODE(before.st_mode) & 0o660
    with suppress(PermissionError):
        os.fchown(descriptor, before.st_uid, before.st_gid)
    now = os.fstat(descriptor)
    if now.st_gid != before.st_gid:
        mode &= 0o600  # it would be another group's
    os.fchmod(descriptor, mode | 0o600)


def _signature(state: os.stat_result) -> tuple[int, ...]:
    return (state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino, state.st_dev)


def _hint(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return ": restore it; if it never was there, make it with flwr-relay keys create --init"
    if isinstance(error, PermissionError):
        return f": give the user {os.geteuid()} access to it and to its directory"
    return ""
