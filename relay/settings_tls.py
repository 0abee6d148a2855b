"""The sections of the settings about TLS: certificates of the relay, and what is asked of those of nodes."""

import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from relay import certificates
from relay.credentials.certificate import Pattern, check_template
from relay.settings_files import CaFile, CertificateFile, CrlFile, KeyFile, pair_fault
from relay.settings_section import Section
from relay.settings_source import Found, Key, show
from relay.settings_types import Doc

if TYPE_CHECKING:
    from relay.settings_tree import Listener, Settings


_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", re.ASCII)


#: Bits of the widest networks that are private: 10.0.0.0/8 and fc00::/7.
_PRIVATE_BITS = {4: 8, 6: 7}


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("must be a host name, such as superlink.example")
    return name


ServerName = Annotated[str, AfterValidator(_check_name), Doc("host name")]


def off(value: object) -> object:
    """Read `off`, which is false in YAML."""
    return "off" if value is False else value


def _as_text(version: object) -> object:
    """`minimum_version: 1.2` is a number in YAML."""
    return str(version) if isinstance(version, float) else version


class Pair(Section):
    """A further certificate of the port, for other names. Who asks for one of its names gets it (SNI);
    who asks for none, or for one that no certificate has, gets `listeners[].tls.certificate`."""

    certificate: CertificateFile
    """PEM file of the certificate, followed by those of the authorities between it and the one that nodes
    trust. Its DNS names count; a name such as `*.relay.example` stands for any single label in place of
    the star."""

    key: KeyFile
    """PEM file of the private key of that certificate, not encrypted."""


class Tls(Section):
    """How a port is encrypted. Without this section, it is not. Files that change are taken up within a
    second or two, without a restart or a reload, if they are sound and belong together; else the old ones
    stay in force."""

    certificate: CertificateFile
    """PEM file of the relay's certificate, followed by those of the authorities between it and the one that
    nodes trust. It must be made for the name that nodes connect to."""

    key: KeyFile
    """PEM file of the private key of that certificate, not encrypted."""

    certificates: tuple[Pair, ...] = ()

    minimum_version: Annotated[Literal["1.2", "1.3"], BeforeValidator(_as_text)] = "1.2"
    """Oldest version of TLS that is spoken."""

    client_certificates: Annotated[Literal["off", "wanted", "needed"], BeforeValidator(off)] = "off"
    """Whether clients are asked for a certificate. With `wanted` one that shows none is let in, and
    `listeners[].auth` decides about its calls; with `needed` its connections are reset, and it tries
    again for ever. A certificate that `client_ca` has not signed, or that has expired, is reset in both.
    A SuperNode has no option for a certificate of its own: this is for relays and proxies of sites."""

    client_ca: Annotated[CaFile | None, Doc("path")] = None
    """PEM file of the authorities that sign clients' certificates. Each of them can let anybody in, so
    name your own, never public ones."""

    crl: Annotated[CrlFile | None, Doc("path")] = None
    """PEM file of revocation lists, signed by authorities in `client_ca`. Connections of a revoked
    certificate are reset, those that are open within a second or two. A list that is not renewed in time
    stays in force."""


def _match(value: object) -> object:
    if isinstance(value, Pattern):
        return value
    return Pattern.parse(value if isinstance(value, str) else repr(value))


def _template(value: object) -> object:
    if isinstance(value, str):
        check_template(value)
    return value


def _pairs(value: object) -> object:
    if isinstance(value, Mapping) and all(isinstance(entry, str) for pair in value.items() for entry in pair):
        return tuple(value.items())
    if isinstance(value, tuple):
        return value
    raise ValueError("must be a mapping of texts, such as {site: north}")


class CertificateRule(Section):
    """Client certificates that are let in, where `listeners[].auth.accept` names `certificate`, and as
    whom. The first rule that matches counts; a certificate that none matches is refused."""

    match: Annotated[Pattern, BeforeValidator(_match), Doc("text")]
    """`DNS:`, `URI:`, `IP:` or `email:` and an alternative name, `CN:` and a common name, `subject:` and
    a whole distinguished name (RFC 4514), or `fingerprint:` and the SHA-256 in hex. `*` stands for any
    run of characters: `DNS:*.nodes.example`, `URI:spiffe://example/site/*`, `subject:*`."""

    name: Annotated[str, BeforeValidator(_template), Doc("text")] = "{match}"
    """Name of the caller, for logs, `flwr-relay nodes` and quarantine. `{match}` is what the rule matched,
    `{CN}`, `{DNS}`, `{URI}`, `{IP}` and `{email}` are the first such name of the certificate; a rule does
    not match one that has none."""

    tenant: Annotated[str, Doc("text")] = ""
    """Group that the caller is of. It stands beside the name in logs, in `flwr-relay nodes` and in the
    quarantine list, where two groups may have the same name; it has no limits of its own."""

    labels: Annotated[tuple[tuple[str, str], ...], BeforeValidator(_pairs), Doc("mapping", dict)] = ()
    """What else is to be known of the caller, as texts by name."""


class ClientCertificates(Section):
    """Who is let in by a client certificate."""

    allow: tuple[CertificateRule, ...] = ()


def conflicts(settings: "Settings") -> Iterator[Found]:
    """Yield what is right alone and wrong together."""
    for index, listener in enumerate(settings.listeners):
        at: Key = ("listeners", index)
        yield from _own(listener, (*at, "tls"))
        yield from _clients(listener, (*at, "tls"))
        yield from _forwarded(listener, at)
        yield from _credential(settings, listener, at)
    yield from _unused_rules(settings)
    yield from _upstream(settings)


def _own(listener: "Listener", at: Key) -> Iterator[Found]:
    if listener.tls is None:
        return
    pairs: list[tuple[Key, Tls | Pair]] = [(at, listener.tls)]
    pairs += [((*at, "certificates", index), pair) for index, pair in enumerate(listener.tls.certificates)]
    for section, pair in pairs:
        if (fault := pair_fault(pair.certificate, pair.key)) is not None:
            yield ((*section, "key"), (*section, "certificate")), show(str(pair.key)), fault
        elif (fault := _names_fault(pair, first=section == at)) is not None:
            yield ((*section, "certificate"),), show(str(pair.certificate)), fault


def _names_fault(pair: Tls | Pair, *, first: bool) -> str | None:
    try:
        names = certificates.dns_names(certificates.load(pair.certificate)[0])
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:
        return f"cannot be used: {error}"
    if not names and not first:
        return "has no DNS name that a client could ask for: make it for one, or leave it out"
    return None


def _clients(listener: "Listener", at: Key) -> Iterator[Found]:
    tls = listener.tls
    if tls is None:
        return
    asking, ca, crl = (*at, "client_certificates"), (*at, "client_ca"), (*at, "crl")
    if tls.client_certificates == "off":
        for key, file in ((ca, tls.client_ca), (crl, tls.crl)):
            if file is not None:
                message = "has no effect, because client_certificates is off: make that wanted or needed"
                yield (key, asking), show(str(file)), message
        return
    if tls.client_ca is None:
        message = "needs client_ca: the file of the authorities that sign clients' certificates"
        yield (asking, ca), tls.client_certificates, message
    elif tls.crl is not None and (fault := _crl_fault(tls)) is not None:
        yield (crl, ca), show(str(tls.crl)), fault
    if tls.client_certificates == "wanted" and not _accepts(listener):
        message = "has no effect, because auth.accept names no certificate: add it there, or make this needed"
        yield (asking, (*at[:-1], "auth", "accept")), "wanted", message


def _crl_fault(tls: Tls) -> str | None:
    if tls.crl is None or tls.client_ca is None:
        return None
    try:
        certificates.Revocations(tls.crl.read_bytes(), certificates.load(tls.client_ca))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:
        return f"cannot be used: {error}"
    return None


def _forwarded(listener: "Listener", at: Key) -> Iterator[Found]:
    header = listener.client_certificate_header
    if header != "off" and not listener.trusted_proxies:
        message = "has no effect, because trusted_proxies is empty: name the proxies that set it"
        yield ((*at, "client_certificate_header"), (*at, "trusted_proxies")), header, message
    if header != "off" and _accepts(listener) and (wide := widest(listener.trusted_proxies)) is not None:
        message = (
            f"lets anybody in under any name: what stands in {header} is believed from all of it. Name the"
            " addresses of the proxies alone"
        )
        keys = ((*at, "trusted_proxies"), (*at, "client_certificate_header"), (*at, "auth", "accept"))
        yield keys, str(wide), message


def widest(networks: Iterable[IPv4Network | IPv6Network]) -> IPv4Network | IPv6Network | None:
    """Return a network among these that can be none of proxies: it is wider than any private one."""
    networks = list(networks)
    # Two halves are as much as the whole.
    found: list[IPv4Network | IPv6Network] = [
        *collapse_addresses(network for network in networks if isinstance(network, IPv4Network)),
        *collapse_addresses(network for network in networks if isinstance(network, IPv6Network)),
    ]
    return next((network for network in found if network.prefixlen < _PRIVATE_BITS[network.version]), None)


def _accepts(listener: "Listener") -> bool:
    return any("certificate" in names for names in listener.auth.accept)


def _credential(settings: "Settings", listener: "Listener", at: Key) -> Iterator[Found]:
    if not _accepts(listener):
        return
    accept: Key = (*at, "auth", "accept")
    asks = listener.tls is not None and listener.tls.client_certificates != "off"
    if not asks and listener.client_certificate_header == "off":
        message = (
            "cannot be shown on this port: set tls.client_certificates, or client_certificate_header if a"
            " proxy terminates TLS"
        )
        yield (accept, (*at, "tls"), (*at, "client_certificate_header")), "certificate", message
    if not settings.client_certificates.allow:
        message = (
            "lets nobody in, because client_certificates.allow is empty: add a rule, such as"
            " match: DNS:*.example"
        )
        yield (accept, ("client_certificates", "allow")), "certificate", message


def _unused_rules(settings: "Settings") -> Iterator[Found]:
    if settings.client_certificates.allow and not any(map(_accepts, settings.listeners)):
        message = (
            "has no effect, because no listener asks for a certificate: add certificate to"
            " listeners[0].auth.accept"
        )
        count = len(settings.client_certificates.allow)
        yield (("client_certificates", "allow"), ("listeners",)), f"{count} rules", message


def _upstream(settings: "Settings") -> Iterator[Found]:
    upstream = settings.upstream
    url: Key = ("upstream", "url")
    if not upstream.url.tls:
        for name in ("ca_file", "certificate", "key", "server_name"):
            if (value := getattr(upstream, name)) is not None:
                message = f"has no effect, because upstream.url is {upstream.url}: use https, or leave it out"
                yield (("upstream", name), url), show(str(value)), message
        return
    for name, other in (("certificate", "key"), ("key", "certificate")):
        value = getattr(upstream, name)
        if value is not None and getattr(upstream, other) is None:
            message = f"needs upstream.{other}: set both, or none of them"
            yield (("upstream", name), ("upstream", other)), show(str(value)), message
    if upstream.certificate is not None and upstream.key is not None:
        fault = pair_fault(upstream.certificate, upstream.key)
        if fault is not None:
            yield (("upstream", "key"), ("upstream", "certificate")), show(str(upstream.key)), fault
