"""The files of TLS, watched: what changes on disk is in force for the next connection.

Once a second each worker looks whether a file is another one than before (its inode, size and times; links
are followed, because that is how Kubernetes swaps a mounted secret). If so, everything that belongs to the
port is read anew, and takes the place of the old in one step, or, if anything is wrong with it, not at all:
a certificate is often written before its key, and one that has expired ends the nodes that meet it.
"""

from __future__ import annotations

import hashlib
import ssl
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import structlog

from relay import certificates
from relay.certificates import Revocations, Shown
from relay.tls import CurrentContext, client_context, server_context, watch_handshakes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from cryptography import x509

    from relay.tls import Watcher

log = structlog.get_logger("relay.tls")

#: A file that was refused is tried again after so long, though it has not changed: its time may have come.
AGAIN_SECONDS = 60.0
#: The clock of a file system; who writes twice within one tick of it leaves no second trace.
_CLOCK_SECONDS = 0.05


class PairFiles(Protocol):
    """A certificate and its key."""

    @property
    def certificate(self) -> Path:
        """PEM chain, leaf first."""

    @property
    def key(self) -> Path:
        """PEM key."""


class ListenerSection(PairFiles, Protocol):
    """What is read of `listeners[].tls`."""

    @property
    def certificates(self) -> Sequence[PairFiles]:
        """Further ones, for other names."""

    @property
    def minimum_version(self) -> str:
        """The oldest version."""

    @property
    def client_certificates(self) -> str:
        """`off`, `wanted` or `needed`."""

    @property
    def client_ca(self) -> Path | None:
        """Who signs those."""

    @property
    def crl(self) -> Path | None:
        """Which were taken back."""


class UpstreamSection(Protocol):
    """What is read of `upstream`."""

    @property
    def ca_file(self) -> Path | None:
        """Whom to believe."""

    @property
    def certificate(self) -> Path | None:
        """Who the relay is."""

    @property
    def key(self) -> Path | None:
        """The key of that."""

    @property
    def server_name(self) -> str | None:
        """Who the SuperLink is."""


class End(NamedTuple):
    """When something ends.

    Attributes:
        file: its key in the section of the settings.
        at: seconds since 1970.
    """

    file: str
    at: float


class TlsFiles(ABC):
    """What one port, or the upstream, has of files.

    Attributes:
        name: the address of the listener, or `upstream`.
        context: to be given to the event loop, for good.
        ends: of everything in it that ends.
        on_taken: called when other files are in force.
    """

    def __init__(self, name: str, protocol: int, paths: Sequence[Path | None]) -> None:
        """Read the files. Raises OSError or ValueError if they cannot be used."""
        self.name = name
        self.context = CurrentContext(protocol)
        self.ends: tuple[End, ...] = ()
        self.on_taken: Callable[[], None] | None = None
        self._paths = [path for path in paths if path is not None]
        self._fault: str | None = None
        self._tried = time.monotonic()
        self._seen, self._in_force = self._look(), self._content()
        self._take()

    def tick(self) -> str | None:
        """Look at the files; to be called once a second.

        Returns:
            `taken` if others are in force now, `refused` if those that are there cannot be used, else None.
        """
        now = time.monotonic()
        seen = self._look()
        again = self._fault is not None and now >= self._tried + AGAIN_SECONDS
        if seen == self._seen and not again:
            return None
        self._seen, self._tried = seen, now
        before = self._fault
        try:
            content = self._content()
            if content == self._in_force:
                self._fault = None  # touched, or put back
                return None
            self._take()
            self._fault = None
        except (OSError, ValueError) as error:
            self._fault = str(error) or type(error).__name__
        if self._fault is None:
            self._in_force = content
            log.info("TLS files taken up", where=self.name, ends={end.file: _show(end) for end in self.ends})
            if self.on_taken is not None:
                self.on_taken()
            return "taken"
        if again and self._fault == before:
            return None
        log.error("TLS files refused; the old ones stay", where=self.name, problem=self._fault)
        return "refused"

    @abstractmethod
    def _take(self) -> None:
        """Read everything, then put it in force. Raises OSError or ValueError, and changes nothing then."""

    def _look(self) -> list[object]:
        """Return what stays equal while the files stay the same; what equals nothing, if that is unsure."""
        found: list[object] = []
        now = time.time()
        for path in self._paths:
            try:
                stat = path.stat()
            except OSError as error:
                found.append(error.errno)
                continue
            found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
            if 0 <= now - stat.st_mtime < _CLOCK_SECONDS:
                found.append(object())
        return found

    def _content(self) -> bytes:
        """Return a digest of the files. Raises OSError if one cannot be read."""
        digest = hashlib.sha256()
        for path in self._paths:
            if not path.is_file() and path.exists():
                raise OSError(f"{path} is no file")  # to read a pipe would stop the worker
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.digest()


def _show(end: End) -> str:
    return certificates.show_time(end.at)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A certificate with the context that proves it.

    Attributes:
        names: by which it is asked for.
    """

    context: ssl.SSLContext
    chain: list[x509.Certificate]
    names: list[str]


class ListenerTls(TlsFiles):
    """The TLS of a port that nodes connect to."""

    def __init__(
        self,
        name: str,
        section: ListenerSection,
        watcher: Watcher | None = None,
        *,
        protocol: str = "http/1.1",
    ) -> None:
        """Read the files of `section`.

        Args:
            name: the address of the listener.
            section: its settings.
            watcher: who is told of its handshakes.
            protocol: what is spoken inside, by its name in ALPN.
        """
        self._section = section
        self._protocol = protocol
        self._watcher = watcher
        self._pairs: tuple[_Loaded, ...] = ()
        self._revoked: Revocations | None = None
        pairs = [section, *section.certificates]
        paths = [path for pair in pairs for path in (pair.certificate, pair.key)]
        super().__init__(name, ssl.PROTOCOL_TLS_SERVER, [*paths, section.client_ca, section.crl])

    @property
    def asks(self) -> bool:
        """Whether clients are asked for a certificate."""
        return self._section.client_ca is not None

    def shown(self, session: ssl.SSLObject) -> Shown | None:
        """Return the certificate that a client has shown in its handshake, if any.

        Raises:
            ValueError: it has been revoked, or cannot be read.
        """
        der = session.getpeercert(binary_form=True)
        if der is None:
            return None
        shown = certificates.read(der)
        if not self.holds(shown, time.time()):
            raise ValueError("it has expired, or was revoked")
        return shown

    def holds(self, shown: Shown, now: float) -> bool:
        """Return whether a certificate that was verified once may still be used."""
        return now < shown.ends and (self._revoked is None or shown not in self._revoked)

    def _take(self) -> None:
        section, now = self._section, time.time()
        pairs = tuple(self._load(pair) for pair in (section, *section.certificates))
        for old, new in zip(self._pairs, pairs, strict=False):
            fault = certificates.time_fault(new.chain[0], now)
            if fault is not None and certificates.time_fault(old.chain[0], now) is None:
                raise ValueError(f"the certificate of {', '.join(new.names) or 'no DNS name'} {fault}")
        ends = [End("certificate", certificates.chain_ends(pairs[0].chain))]
        for index, pair in enumerate(pairs[1:]):
            ends.append(End(f"certificates[{index}]", certificates.chain_ends(pair.chain)))
        revoked = None
        if section.client_ca is not None:
            authorities = _authorities(section.client_ca)
            if authorities:
                ends.append(End("client_ca", certificates.authorities_end(authorities, now)))
            if section.crl is not None:
                revoked = Revocations(section.crl.read_bytes(), authorities)
                if revoked.ends is not None:
                    ends.append(End("crl", revoked.ends))
        if len(pairs) > 1:
            pairs[0].context.sni_callback = _chooser(pairs)
        self._pairs, self._revoked, self.ends = pairs, revoked, tuple(ends)
        self.context.current = pairs[0].context

    def _load(self, pair: PairFiles) -> _Loaded:
        section = self._section
        try:
            context = server_context(
                pair.certificate,
                pair.key,
                section.minimum_version,
                protocol=self._protocol,
                client_ca=section.client_ca,
                client_certificates=section.client_certificates,
            )
        except ssl.SSLError as error:
            raise ValueError(f"{pair.certificate} with {pair.key}: {error}") from error
        if self._watcher is not None:
            watch_handshakes(context, self._watcher)
        chain = certificates.load(pair.certificate)
        return _Loaded(context, chain, certificates.dns_names(chain[0]))


def _chooser(pairs: Sequence[_Loaded]) -> Callable[[ssl.SSLObject, str | None, ssl.SSLContext], None]:
    """Return what OpenSSL asks in each handshake: it puts the context in place that has that name."""

    def choose(session: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name is None:
            return
        name = name.lower()
        for matches in (str.__eq__, certificates.covers):  # a whole name before a wildcard
            for pair in pairs:
                if any(matches(own, name) for own in pair.names):
                    session.context = pair.context
                    return

    return choose


class UpstreamTls(TlsFiles):
    """The TLS of the connections to an https SuperLink.

    Attributes:
        authorities: who is believed, in PEM; None for the system's. For gRPC, which takes no context.
    """

    def __init__(self, section: UpstreamSection) -> None:
        """Read the files of `section`."""
        self._section = section
        self.authorities: bytes | None = None
        super().__init__(
            "upstream", ssl.PROTOCOL_TLS_CLIENT, [section.ca_file, section.certificate, section.key]
        )
        self.context.server_name = section.server_name

    def _take(self) -> None:
        section = self._section
        context = client_context(section.ca_file, section.certificate, section.key)
        read = section.ca_file.read_bytes() if section.ca_file is not None else None
        ends = []
        if section.ca_file is not None:
            authorities = _authorities(section.ca_file)
            if authorities:
                ends.append(End("ca_file", certificates.authorities_end(authorities, time.time())))
        if section.certificate is not None:
            ends.append(End("certificate", certificates.chain_ends(certificates.load(section.certificate))))
        self.ends, self.authorities = tuple(ends), read
        self.context.current = context


def fault(listeners: Iterable[ListenerSection], upstream: UpstreamSection | None) -> str | None:
    """Return why the files of these sections cannot be used, if so."""
    try:
        for section in listeners:
            ListenerTls("", section)
        if upstream is not None:
            UpstreamTls(upstream)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


def _authorities(path: Path) -> list[x509.Certificate]:
    """Return the authorities of a file, for their times; none if one of them only OpenSSL can read."""
    try:
        return certificates.load(path)
    except ValueError:
        return []
