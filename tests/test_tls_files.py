"""Files of TLS that change: what is in force for the next connection, and what keeps the old ones."""

from __future__ import annotations

import os
import shutil
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from structlog.testing import capture_logs

from relay import tls_files
from relay.authority import Authority
from relay.settings import Tls, Upstream
from relay.tls_files import ListenerTls, UpstreamTls, fault
from tests.certificates import make_crl, make_pair
from tests.tls_clients import trusting

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Port:
    """A listener's files in a directory, as they are replaced by tests."""

    directory: Path
    tls: ListenerTls

    def put(self, source: Path, name: str = "relay", *, what: tuple[str, ...] = ("-key.pem", ".pem")) -> None:
        """Put the pair of `source` in place of the one that is there."""
        for ending in what:
            shutil.copyfile(source / f"relay{ending}", self.directory / f"{name}{ending}")

    def serial(self, name: str | None = None) -> int:
        """Return the serial number of the certificate that a client gets which asks for `name`."""
        session, _ = handshake(self.tls.context, name)
        return x509.load_der_x509_certificate(session.getpeercert(binary_form=True) or b"").serial_number


def handshake(
    server: ssl.SSLContext,
    name: str | None = None,
    client: ssl.SSLContext | None = None,
    session: ssl.SSLSession | None = None,
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Have a client connect in memory; return its session, and the server's. Raises ssl.SSLError."""
    if client is None:
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    own = client.wrap_bio(down, up, server_hostname=name, session=session)
    ends = (own, server.wrap_bio(up, down, server_side=True))
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    ends[1].write(b"x")
    assert ends[0].read(1) == b"x"
    return ends


def serial(pem: Path) -> int:
    return x509.load_pem_x509_certificate(pem.read_bytes()).serial_number


def pairs(tmp_path: Path, *names: str, **facts: Any) -> list[Path]:
    """Make a directory with `relay.pem` and `relay-key.pem` for each name; return them."""
    made = []
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        make_pair(folder, **facts)
        made.append(folder)
    return made


def section(directory: Path, **more: Any) -> Tls:
    own = {"certificate": directory / "relay.pem", "key": directory / "relay-key.pem"}
    return Tls.model_validate(own | more)


@pytest.fixture
def port(tmp_path: Path) -> Port:
    (folder,) = pairs(tmp_path, "served")
    return Port(folder, ListenerTls("here:1", section(folder)))


def test_nothing_is_read_while_the_files_stay_the_same(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(0.06)
    port.tls.tick()  # the files may have been too young to be sure of
    monkeypatch.setattr(port.tls, "_content", lambda: pytest.fail("read"))
    for _ in range(3):
        assert port.tls.tick() is None


def test_a_renewed_pair_is_taken_up_for_the_next_connection(port: Port, tmp_path: Path) -> None:
    (renewed,) = pairs(tmp_path, "renewed")
    old, context = port.serial(), port.tls.context
    port.put(renewed)
    assert port.serial() == old
    with capture_logs() as logs:
        assert port.tls.tick() == "taken"
    assert port.serial() == serial(renewed / "relay.pem") != old
    assert port.tls.context is context
    assert [(line["event"], line["where"]) for line in logs] == [("TLS files taken up", "here:1")]
    assert port.tls.tick() is None


def test_a_pair_of_another_kind_of_key_leaves_nothing_of_the_old_one(port: Port, tmp_path: Path) -> None:
    """In one context OpenSSL would keep both, and give the old one to clients that like it better."""
    renewed = tmp_path / "rsa"
    renewed.mkdir()
    make_pair(renewed, key=rsa.generate_private_key(65537, 2048))
    port.put(renewed)
    assert port.tls.tick() == "taken"
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
    with pytest.raises(ssl.SSLError):
        handshake(port.tls.context, client=client)
    assert port.serial() == serial(renewed / "relay.pem")


@pytest.mark.parametrize("first", [".pem", "-key.pem"])
def test_half_of_a_renewed_pair_changes_nothing(port: Port, tmp_path: Path, first: str) -> None:
    (renewed,) = pairs(tmp_path, "renewed")
    old = port.serial()
    port.put(renewed, what=(first,))
    with capture_logs() as logs:
        assert port.tls.tick() == "refused"
        assert port.serial() == old
        time.sleep(0.06)
        port.tls.tick()
    assert {(line["log_level"], line["event"]) for line in logs} == {
        ("error", "TLS files refused; the old ones stay")
    }
    port.put(renewed)
    assert port.tls.tick() == "taken"
    assert port.serial() == serial(renewed / "relay.pem")


@pytest.mark.parametrize("content", [b"", b"garbage", None])
@pytest.mark.parametrize("which", ["relay.pem", "relay-key.pem"])
def test_a_broken_or_missing_file_changes_nothing(port: Port, which: str, content: bytes | None) -> None:
    old, path = port.serial(), port.directory / which
    kept = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert port.tls.tick() == "refused"
    assert port.serial() == old
    path.write_bytes(kept)
    with capture_logs() as logs:
        assert port.tls.tick() is None  # it is what is in force
    assert logs == []
    assert port.tls._fault is None


def test_what_is_no_file_stops_nobody(port: Port) -> None:
    path = port.directory / "relay-key.pem"
    old = port.serial()
    path.unlink()
    os.mkfifo(path)
    assert port.tls.tick() == "refused"
    path.unlink()
    path.mkdir()
    assert port.tls.tick() == "refused"
    assert port.serial() == old


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(port: Port, tmp_path: Path) -> None:
    (renewed,) = pairs(tmp_path, "renewed", password=b"secret")
    port.put(renewed)
    assert port.tls.tick() == "refused"
    assert "encrypted" in (port.tls._fault or "")


@pytest.mark.parametrize(
    ("facts", "said"),
    [({"expired": True}, "has expired"), ({"begins": 0.5, "days": 2}, "is not valid before")],
)
def test_a_certificate_that_nodes_would_not_believe_takes_no_good_ones_place(
    port: Port, tmp_path: Path, facts: dict[str, Any], said: str
) -> None:
    (renewed,) = pairs(tmp_path, "renewed", **facts)
    old = port.serial()
    port.put(renewed)
    assert port.tls.tick() == "refused"
    assert port.serial() == old
    assert said in (port.tls._fault or "")


def test_an_expired_certificate_is_served_when_there_is_no_better_one(tmp_path: Path) -> None:
    first, second = pairs(tmp_path, "first", "second", expired=True)
    port = Port(first, ListenerTls("here:1", section(first)))
    port.put(second)
    assert port.tls.tick() == "taken"


def test_a_refused_pair_is_tried_again_when_its_time_has_come(
    port: Port, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (renewed,) = pairs(tmp_path, "renewed", begins=1 / 86_400, days=1)
    port.put(renewed)
    assert port.tls.tick() == "refused"
    time.sleep(1.1)
    while port.tls._seen != port.tls._look():
        port.tls.tick()
    if port.tls._fault is not None:  # it was too young to be sure of, and so read again
        assert port.tls.tick() is None
        monkeypatch.setattr(tls_files, "AGAIN_SECONDS", 0.0)
        assert port.tls.tick() == "taken"
    assert port.serial() == serial(renewed / "relay.pem")


def test_what_is_refused_for_the_same_reason_again_is_said_once(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port.directory / "relay.pem").write_bytes(b"garbage")
    assert port.tls.tick() == "refused"
    time.sleep(0.06)
    port.tls.tick()
    monkeypatch.setattr(tls_files, "AGAIN_SECONDS", 0.0)
    with capture_logs() as logs:
        for _ in range(3):
            assert port.tls.tick() is None
    assert logs == []


def test_a_file_that_was_only_touched_is_no_change(port: Port) -> None:
    before = port.tls.context.current
    os.utime(port.directory / "relay.pem", ns=(1, 1))
    assert port.tls.tick() is None
    assert port.tls.context.current is before


def test_a_secret_that_kubernetes_swaps_is_taken_up(tmp_path: Path) -> None:
    """Its files are links into a directory that is itself a link, which is replaced."""
    old, renewed = pairs(tmp_path, "..1", "..2")
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "..data").symlink_to(old)
    for name in ("relay.pem", "relay-key.pem"):
        (mount / name).symlink_to(f"..data/{name}")
    port = Port(mount, ListenerTls("here:1", section(mount)))
    (mount / "..data_tmp").symlink_to(renewed)
    (mount / "..data_tmp").rename(mount / "..data")
    assert port.tls.tick() == "taken"
    assert port.serial() == serial(renewed / "relay.pem")


def test_a_write_within_one_tick_of_the_clock_is_noticed(port: Port, tmp_path: Path) -> None:
    """Same size, same inode, and times that the file system did not yet move on."""
    path = port.directory / "relay.pem"
    (renewed,) = pairs(tmp_path, "renewed")
    port.put(renewed)
    stat = path.stat()
    port.tls._seen = port.tls._look()  # as if looked at just before the last write
    assert port.tls._seen != port.tls._look()
    assert port.tls.tick() == "taken"
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))
    assert port.tls._look() != port.tls._seen


# -- several certificates -------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path: Path) -> Port:
    """A port with certificates for localhost, *.relay.example, x.relay.example and UPPER.example."""
    (folder,) = pairs(tmp_path, "served")
    for name, host in (("wild", "*.relay.example"), ("whole", "x.relay.example"), ("upper", "UPPER.example")):
        make_pair(folder, name, host=host)
    further = [
        {"certificate": folder / f"{name}.pem", "key": folder / f"{name}-key.pem"}
        for name in ("wild", "whole", "upper")
    ]
    return Port(folder, ListenerTls("here:1", section(folder, certificates=further)))


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (None, "relay"),
        ("localhost", "relay"),
        ("unknown.example", "relay"),
        ("y.relay.example", "wild"),
        ("Y.Relay.Example", "wild"),
        ("x.relay.example", "whole"),
        ("a.b.relay.example", "relay"),
        ("upper.example", "upper"),
    ],
)
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_who_asks_for_a_name_gets_the_certificate_with_that_name(
    several: Port, asked: str | None, given: str, version: str
) -> None:
    client = trusting(several.directory / f"{given}.pem", version)
    client.check_hostname = False
    session, server = handshake(several.tls.context, asked, client)
    got = x509.load_der_x509_certificate(session.getpeercert(binary_form=True) or b"").serial_number
    assert got == serial(several.directory / f"{given}.pem")
    assert server.version() == f"TLSv{version}"


def test_one_of_several_is_renewed_with_all_others_or_not_at_all(several: Port, tmp_path: Path) -> None:
    before = several.serial("x.relay.example")
    (tmp_path / "renewed").mkdir()
    certificate, key = make_pair(tmp_path / "renewed", host="x.relay.example")
    shutil.copyfile(certificate, several.directory / "whole.pem")
    assert several.tls.tick() == "refused"
    assert several.serial("x.relay.example") == before
    shutil.copyfile(key, several.directory / "whole-key.pem")
    assert several.tls.tick() == "taken"
    assert several.serial("x.relay.example") == serial(certificate)
    assert several.serial("y.relay.example") == serial(several.directory / "wild.pem")


def test_each_file_that_ends_is_known(several: Port) -> None:
    assert [end.file for end in several.tls.ends] == [
        "certificate",
        "certificates[0]",
        "certificates[1]",
        "certificates[2]",
    ]
    assert several.tls.ends[0].at == pytest.approx(time.time() + 86_400, abs=60)


# -- client certificates --------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "ca")
    made.issue_relay(["localhost"])
    for name in ("good", "bad"):
        made.issue_client(name)
    return made


def asking(authority: Authority, mode: str = "wanted", **more: Any) -> ListenerTls:
    certificate, key = authority.files("relay")
    given = {"certificate": certificate, "key": key, "client_ca": authority.files("ca")[0]}
    return ListenerTls("here:1", Tls.model_validate(given | {"client_certificates": mode} | more))


def node(authority: Authority, name: str | None, version: str | None = None) -> ssl.SSLContext:
    context = trusting(authority.files("ca")[0], version)
    if name is not None:
        context.load_cert_chain(*authority.files(name))
    return context


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("mode", ["wanted", "needed"])
def test_the_certificate_that_a_client_shows_is_known(authority: Authority, mode: str, version: str) -> None:
    files = asking(authority, mode)
    _, server = handshake(files.context, "localhost", node(authority, "good", version))
    shown = files.shown(server)
    assert shown is not None
    assert shown.certificate.subject == "CN=good"
    assert shown.certificate.names == ("DNS:good",)


def test_who_shows_none_is_nobody_where_one_is_wanted_and_stopped_where_it_is_needed(
    authority: Authority,
) -> None:
    files = asking(authority, "wanted")
    _, server = handshake(files.context, "localhost", node(authority, None))
    assert files.shown(server) is None
    with pytest.raises(ssl.SSLError, match=r"(?i)peer.did.not.return.a.certificate"):
        handshake(asking(authority, "needed").context, "localhost", node(authority, None))


@pytest.mark.parametrize("mode", ["wanted", "needed"])
def test_a_certificate_of_another_authority_is_stopped_in_both(
    authority: Authority, tmp_path: Path, mode: str
) -> None:
    context = node(authority, None)
    context.load_cert_chain(*make_pair(tmp_path))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(asking(authority, mode).context, "localhost", context)


def test_a_server_certificate_is_none_of_a_client(authority: Authority) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)unsuitable|purpose"):
        handshake(asking(authority).context, "localhost", node(authority, "relay"))


def test_what_is_named_is_believed_without_those_above_it(authority: Authority) -> None:
    files = asking(authority, "needed", client_ca=authority.files("good")[0])
    handshake(files.context, "localhost", node(authority, "good"))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files.context, "localhost", node(authority, "bad"))


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_no_client_gets_in_with_a_ticket_where_certificates_are_asked_for(
    authority: Authority, version: str
) -> None:
    files, client = asking(authority), node(authority, "good", version)
    session, _ = handshake(files.context, "localhost", client)
    assert session.session is None or not session.session.has_ticket


def test_sessions_do_not_outlive_the_authority_under_which_they_began(
    authority: Authority, tmp_path: Path
) -> None:
    files, client = asking(authority), node(authority, "good", "1.2")
    session, _ = handshake(files.context, "localhost", client)
    other = Authority(tmp_path / "other")
    shutil.copyfile(other.files("ca")[0], authority.files("ca")[0])
    assert files.tick() == "taken"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files.context, "localhost", client, session.session)


def test_a_revoked_certificate_is_stopped_and_so_are_those_that_are_in_already(
    authority: Authority, tmp_path: Path
) -> None:
    signs = (authority.certificate, authority._key)
    crl = make_crl(tmp_path, signs)
    files = asking(authority, crl=crl)
    _, server = handshake(files.context, "localhost", node(authority, "bad"))
    shown = files.shown(server)
    assert shown is not None
    make_crl(tmp_path, signs, authority.files("bad")[0])
    assert files.holds(shown, time.time())
    assert files.tick() == "taken"
    assert not files.holds(shown, time.time())
    with pytest.raises(ValueError, match="revoked"):
        files.shown(server)
    _, server = handshake(files.context, "localhost", node(authority, "good"))
    assert files.shown(server) is not None
    assert [end.file for end in files.ends] == ["certificate", "client_ca", "crl"]


def test_a_certificate_ends_while_its_connection_is_open(authority: Authority) -> None:
    files = asking(authority)
    _, server = handshake(files.context, "localhost", node(authority, "good"))
    shown = files.shown(server)
    assert shown is not None
    assert files.holds(shown, shown.ends - 1)
    assert not files.holds(shown, shown.ends)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_broken_list_leaves_the_old_one_in_force(
    authority: Authority, tmp_path: Path, content: bytes
) -> None:
    crl = make_crl(tmp_path, (authority.certificate, authority._key), authority.files("bad")[0])
    files = asking(authority, crl=crl)
    crl.write_bytes(content)
    assert files.tick() == "refused"
    _, server = handshake(files.context, "localhost", node(authority, "bad"))
    with pytest.raises(ValueError, match="revoked"):
        files.shown(server)


def test_a_port_that_asks_for_no_certificate_takes_none(port: Port) -> None:
    assert not port.tls.asks
    _, server = handshake(port.tls.context)
    assert port.tls.shown(server) is None


# -- handshakes -----------------------------------------------------------------------------------------


class Told:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def done(self, version: str) -> None:
        self.heard.append(version)

    def refused(self, error: ssl.SSLError) -> None:
        self.heard.append(error.reason)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_each_handshake_is_told_once(authority: Authority, version: str) -> None:
    told = Told()
    certificate, key = authority.files("relay")
    files = ListenerTls("", Tls(certificate=certificate, key=key), told)
    handshake(files.context, "localhost", trusting(authority.files("ca")[0], version))
    assert told.heard == [f"TLSv{version}"]
    authority._overwrite = True
    authority.issue_relay(["localhost"])
    assert files.tick() == "taken"
    handshake(files.context, "localhost", trusting(authority.files("ca")[0], version))
    assert told.heard == [f"TLSv{version}"] * 2
    with pytest.raises(ssl.SSLError):
        handshake(files.context, "localhost", trusting(make_pair(certificate.parent, "other")[0]))
    server = files.context.wrap_bio(incoming := ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
    incoming.write(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ssl.SSLError):
        server.do_handshake()
    assert told.heard[2:] == ["HTTP_REQUEST"]


# -- the upstream ---------------------------------------------------------------------------------------


def upstream(authority: Authority, **more: Any) -> UpstreamTls:
    return UpstreamTls(
        Upstream.model_validate({"url": "https://10.1.2.3", "ca_file": authority.files("ca")[0]} | more)
    )


def superlink(authority: Authority) -> ssl.SSLContext:
    return asking(authority, "needed").context


def test_the_relay_shows_its_certificate_to_an_upstream_that_asks(authority: Authority) -> None:
    certificate, key = authority.files("good")
    files = upstream(authority, certificate=certificate, key=key)
    _, server = handshake(superlink(authority), "localhost", files.context)
    assert server.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(certificate.read_text())
    assert [end.file for end in files.ends] == ["ca_file", "certificate"]
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate"):
        handshake(superlink(authority), "localhost", upstream(authority).context)


def test_the_upstream_is_checked_under_the_name_that_was_set(authority: Authority) -> None:
    own = authority.files("relay")
    plain = ListenerTls("", Tls(certificate=own[0], key=own[1]))
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for '10\.1\.2\.3'"):
        handshake(plain.context, "10.1.2.3", upstream(authority).context)
    handshake(plain.context, "10.1.2.3", upstream(authority, server_name="localhost").context)
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for 'other'"):
        handshake(plain.context, "localhost", upstream(authority, server_name="other").context)


def test_a_renewed_certificate_of_the_relay_is_shown_next_time(authority: Authority) -> None:
    certificate, key = authority.files("good")
    files = upstream(authority, certificate=certificate, key=key)
    authority._overwrite = True
    authority.issue_client("good")
    assert files.tick() == "taken"
    _, server = handshake(superlink(authority), "localhost", files.context)
    assert server.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(certificate.read_text())
    key.unlink()
    assert files.tick() == "refused"
    handshake(superlink(authority), "localhost", files.context)


def test_an_authority_that_was_taken_out_is_believed_no_more(authority: Authority, tmp_path: Path) -> None:
    files = upstream(authority)
    own = authority.files("relay")
    plain = ListenerTls("", Tls(certificate=own[0], key=own[1]))
    handshake(plain.context, "localhost", files.context)
    shutil.copyfile(Authority(tmp_path / "other").files("ca")[0], authority.files("ca")[0])
    assert files.tick() == "taken"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(plain.context, "localhost", files.context)


def test_files_that_cannot_be_used_are_known_before_a_worker_needs_them(
    authority: Authority, tmp_path: Path
) -> None:
    (folder,) = pairs(tmp_path, "served")
    sound = section(folder)
    assert fault([sound], Upstream()) is None
    (folder / "relay-key.pem").write_bytes(authority.files("relay")[1].read_bytes())
    assert "MISMATCH" in (fault([sound], None) or "")
    assert "MISMATCH" in (fault([], upstream_section(sound)) or "")


def upstream_section(tls: Tls) -> Upstream:
    return Upstream.model_validate({"url": "https://x", "certificate": tls.certificate, "key": tls.key})
