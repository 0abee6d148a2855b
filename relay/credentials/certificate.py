"""The client certificate of a caller: which ones are let in, and as whom.

TLS has verified it, ours or that of a trusted proxy; here it is looked up in a list of rules. So a
certificate of the right authority is not enough: an authority signs for many purposes.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from cryptography import x509

from relay.call import Certificate, Identity
from relay.certificates import UNREADABLE
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.call import Call

#: Where a value of a certificate stands; DNS names and the like are its alternative names.
_KINDS = ("DNS", "URI", "IP", "email", "CN", "subject", "fingerprint")
_ANY_CASE = frozenset({"DNS", "email", "fingerprint"})
_FIELD = re.compile(r"\{(\w*)\}")
_FIELDS = ("match", "CN", "DNS", "URI", "IP", "email")

#: Cause of a refusal, as the policy `auth` counts it.
CAUSE = "certificate_not_allowed"


class Pattern(NamedTuple):
    """Where to look in a certificate, and for what; `*` stands for any run of characters.

    Attributes:
        kind: one of `DNS`, `URI`, `IP`, `email`, `CN`, `subject` and `fingerprint`.
        glob: the text, with `*` in it or not.
    """

    kind: str
    glob: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `KIND:GLOB`. Raises ValueError."""
        kind, colon, glob = text.partition(":")
        if not colon or kind not in _KINDS or not glob.strip():
            raise ValueError(
                f"must be one of {', '.join(_KINDS)}, a colon, and a text, such as DNS:*.example"
            )
        if kind == "fingerprint":
            glob = glob.replace(":", "").lower()
            if not re.fullmatch(r"[0-9a-f]{64}", glob):
                raise ValueError("must have a fingerprint of 64 hex digits (SHA-256)")
        return cls(kind, glob.strip())

    def __str__(self) -> str:
        return f"{self.kind}:{self.glob}"

    def compiled(self) -> re.Pattern[str]:
        """Return what a whole value must look like."""
        text = ".*".join(map(re.escape, self.glob.split("*")))
        return re.compile(text, re.DOTALL | (re.IGNORECASE if self.kind in _ANY_CASE else 0))


class Rule(NamedTuple):
    """Certificates that are let in, and as whom.

    Attributes:
        pattern: which ones.
        name: of the identity; `{match}`, `{CN}`, `{DNS}`, `{URI}`, `{IP}` and `{email}` are filled in.
        tenant: of the identity.
        labels: of the identity.
    """

    pattern: Pattern
    name: str = "{match}"
    tenant: str = ""
    labels: tuple[tuple[str, str], ...] = ()


def check_template(name: str) -> None:
    """Raise ValueError if `name` is empty, or has something else in braces than what can be filled in."""
    unknown = [field for field in _FIELD.findall(name) if field not in _FIELDS]
    if not name.strip() or unknown or "{" in _FIELD.sub("", name) or "}" in _FIELD.sub("", name):
        known = ", ".join(f"{{{field}}}" for field in _FIELDS)
        raise ValueError(f"must be a text, with nothing in braces but {known}")


class CertificateCredential:
    """Says who a caller is by the certificate that its connection, or a trusted proxy, showed."""

    name: ClassVar[str] = "certificate"

    def __init__(self, rules: Sequence[Rule]) -> None:
        """Let in whom the first matching rule names."""
        self._rules = [(rule, rule.pattern.compiled()) for rule in rules]
        # A node shows the same certificate with each of its calls.
        self._known = lru_cache(maxsize=4096)(self._look_up)

    async def check(self, call: Call) -> Identity | None:
        """Return whom the certificate stands for; see `relay.credentials.Credential`."""
        certificate = call.certificate
        if certificate is None:
            return None
        if certificate is UNREADABLE:
            raise Refusal(
                Reason.UPSTREAM_DOWN,
                "a trusted proxy sent no readable client certificate",
                by=self.name,
                sent=False,
            )
        identity = self._known(certificate)
        if identity is None:
            raise Refusal(
                Reason.UNAUTHENTICATED,
                f"no rule matches the certificate of {certificate.subject!r}",
                by=self.name,
                sent=False,
                cause=CAUSE,
            )
        return identity

    def _look_up(self, certificate: Certificate) -> Identity | None:
        values = _values(certificate)
        for rule, wanted in self._rules:
            for value in values.get(rule.pattern.kind, ()):
                if wanted.fullmatch(value):
                    name = _filled(rule.name, values, value)
                    if name is not None:
                        return Identity(name, rule.tenant, rule.labels, (self.name,))
        return None


def _values(certificate: Certificate) -> dict[str, list[str]]:
    """Return what can be matched, by kind."""
    values = {"subject": [certificate.subject], "CN": _common_names(certificate.subject)}
    if certificate.fingerprint:
        values["fingerprint"] = [certificate.fingerprint]
    for name in certificate.names:
        kind, _, value = name.partition(":")
        values.setdefault(kind, []).append(value)
    return values


def _common_names(subject: str) -> list[str]:
    try:
        parsed = x509.Name.from_rfc4514_string(subject)
    except ValueError:
        return []
    return [str(name.value) for name in parsed.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]


def _filled(template: str, values: dict[str, list[str]], matched: str) -> str | None:
    """Return the name of the identity; None if the certificate has none of what it is to be made of."""
    fields = {kind: found[0] for kind, found in values.items() if found} | {"match": matched}
    if not all(fields.get(field) for field in _FIELD.findall(template)):
        return None
    return _FIELD.sub(lambda field: fields[field[1]], template)
