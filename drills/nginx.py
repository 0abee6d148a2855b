"""nginx before the relay, with the configuration that this project ships."""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from drills.certificates import Certificates
from relay.demo.processes import LOOPBACK, POLL, FederationError, get

_SHIPPED: Final = Path(__file__).parents[1] / "nginx"
_SECONDS: Final = 20.0
_CONNECTIONS: Final = 8192
_WORKERS: Final = 2
# Where nginx would put bodies that it does not stream; Debian's places need not be there.
_SPOOLS: Final = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


_PR_SET_PDEATHSIG: Final = 1
_libc: Final = ctypes.CDLL(None)


def missing() -> str | None:
    """Return why nginx cannot be used here; None when it can."""
    return None if shutil.which("nginx", path=_path()) else "nginx is not installed"


class Nginx:
    """One nginx. It runs within its `with` block."""

    def __init__(
        self,
        directory: Path,
        *,
        port: int,
        status_port: int,
        relay_port: int,
        tls: Certificates | None,
        grpc: bool = False,
    ) -> None:
        """Write its configuration into `directory`, as an operator does.

        Args:
            directory: empty; also for its logs.
            port: where SuperNodes connect.
            status_port: of its own health check.
            relay_port: of the relay.
            tls: for `port`; None for a plain one.
            grpc: both ports speak gRPC.
        """
        self._directory = directory
        self._status_port = status_port
        self._config = directory / "nginx" / "nginx.conf"
        shutil.copytree(_SHIPPED, self._config.parent)
        for name in ("log", "run", *_SPOOLS):
            (directory / name).mkdir()
        site = self._config.parent / "site"
        options = ("ssl " if tls else "") + ("http2 " if grpc else "")
        listen = f"listen {LOOPBACK}:{port} {options}default_server reuseport;\n"
        relays = f"server {LOOPBACK}:{relay_port} max_fails=0;\n"
        if grpc:
            # Nobody connects to the HTTP half.
            (site / "listen.conf").write_text(f"listen unix:{directory}/run/http.sock default_server;\n")
            (site / "grpc" / "listen.conf").write_text(listen)
            (site / "grpc" / "relays.conf").write_text(relays)
            _replace(site / "http.d" / "grpc.conf", ("# include grpc.conf;", "include grpc.conf;"))
        else:
            (site / "listen.conf").write_text(listen)
            (site / "relays.conf").write_text(relays)
        names = f"ssl_certificate {tls.certificate};\nssl_certificate_key {tls.key};\n" if tls else ""
        (site / "tls.conf").write_text(names)
        (site / "http.d").mkdir(exist_ok=True)
        spools = "".join(f"{name}_temp_path {directory / name};\n" for name in _SPOOLS)
        (site / "http.d" / "drills.conf").write_text(spools)
        _replace(site / "status.conf", ("127.0.0.1:8081", f"{LOOPBACK}:{status_port}"))
        _replace(site / "log.conf", ("/var/log/nginx/", f"{directory}/log/"))
        _replace(
            site / "host.conf",
            ("/var/log/nginx/", f"{directory}/log/"),
            ("/run/", f"{directory}/run/"),
            # Debian's account need not be here, and could not write to this directory.
            ("user www-data;", "user root;" if os.geteuid() == 0 else ""),
            ("worker_processes auto;", f"worker_processes {_WORKERS};"),
            ("worker_rlimit_nofile 65536;", f"worker_rlimit_nofile {_CONNECTIONS};"),
            ("worker_connections 65536;", f"worker_connections {_CONNECTIONS};"),
        )

    def __enter__(self) -> Self:
        log = self._directory / "log" / "start.log"
        words: list[str | Path] = [
            "nginx",
            "-p",
            self._directory,
            "-e",
            log,
            "-c",
            self._config,
            "-g",
            "daemon off;",
        ]
        self._process = subprocess.Popen(
            words,
            env={**os.environ, "PATH": _path()},
            start_new_session=True,  # a Ctrl-C in the terminal is for its owner alone
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - only the fault proxy's thread is there, and it forks not
        )
        end = time.monotonic() + _SECONDS
        while get(self._status_port, "/livez") != (200, b"ok\n"):
            if self._process.poll() is not None or time.monotonic() > end:
                self._stop()
                raise FederationError("nginx", "did not start", log.read_text() if log.exists() else "")
            time.sleep(POLL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def reload(self) -> None:
        """Have it read its configuration again; return when new workers are there.

        Raises FederationError when none come.
        """
        before = {worker.pid for worker in self._workers()}
        self._process.send_signal(signal.SIGHUP)
        end = time.monotonic() + _SECONDS
        while len({worker.pid for worker in self._workers()} - before) < _WORKERS:
            if time.monotonic() > end:
                raise FederationError("nginx", "started no new workers")
            time.sleep(POLL)

    def _workers(self) -> list[psutil.Process]:
        workers: list[psutil.Process] = psutil.Process(self._process.pid).children()
        return workers

    def _stop(self) -> None:
        """End it and its workers, those that finish calls after a reload included."""
        if self._process.poll() is not None:
            return
        workers = self._workers()
        self._process.terminate()
        try:
            self._process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            for worker in workers:
                worker.kill()


def _end_with_parent() -> None:
    """Have the kernel end this process with its parent, however that ends. nginx hides its environment."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _path() -> str:
    """Debian keeps nginx where only root looks for commands."""
    return f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin"


def _replace(file: Path, *pairs: tuple[str, str]) -> None:
    text = file.read_text()
    for old, new in pairs:
        if old not in text:
            raise FederationError("nginx", f"cannot be set up: {file.name} has no {old!r} any more")
        text = text.replace(old, new)
    file.write_text(text)
