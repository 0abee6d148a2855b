"""Who may call: credentials, keys and quarantine, made from the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.credentials import allowed_keys
from relay.credentials.api_key import ApiKey
from relay.credentials.certificate import CertificateCredential, Rule
from relay.credentials.keys.stores import key_store
from relay.credentials.keys.table import KeyTable
from relay.credentials.node_keys import NodeKeys
from relay.credentials.node_signature import NodeSignature
from relay.policies import Auth, Quarantine
from relay.policies.auth import CREDENTIAL_HEADERS
from relay.stores import quarantine_list
from relay.stores.watched import Watched

if TYPE_CHECKING:
    from collections.abc import Mapping

    from relay import settings as settings_of
    from relay.credentials import Credential
    from relay.settings import Settings


def credentials(settings: Settings, keys: KeyTable, signers: NodeKeys) -> dict[str, Credential]:
    """Return the credentials that a listener's `auth.accept` may name, by their names."""
    rules = settings.client_certificates.allow
    return {
        "api_key": ApiKey(keys),
        "node_signature": NodeSignature(signers, always=settings.node_keys.verify == "always"),
        "certificate": CertificateCredential(
            [Rule(rule.match, rule.name, rule.tenant, rule.labels) for rule in rules]
        ),
    }


def node_keys(section: settings_of.NodeKeys) -> NodeKeys:
    """Make what verifies the signatures of nodes, and knows which keys are allowed."""
    allowed = None
    if section.allow is not None:
        allowed = Watched(section.allow, allowed_keys.parse, name="node_keys", absent=None)
    return NodeKeys(window=section.window, ahead=section.ahead, allowed=allowed)


def quarantine(section: settings_of.Quarantine) -> Quarantine:
    """Make the policy, with the list that it watches if there shall be one."""
    listed = None
    if section.file is not None:
        nobody = quarantine_list.QuarantineList()
        listed = Watched(section.file, quarantine_list.parse, name="quarantine", absent=nobody)
    return Quarantine(listed, enforce=section.enforce)


def key_table(section: settings_of.Keys) -> KeyTable:
    """Make the table of API keys.

    Raises:
        OSError: `keys.pepper_file` cannot be read.
    """
    pepper = section.pepper_file.read_bytes().strip() if section.pepper_file else b""
    store = key_store(section.file, section.redis.text if section.redis else None, str(section.redis))
    # A file cannot be down: what was read of it last is right until it says otherwise.
    return KeyTable(store, pepper=pepper, stale=section.stale if section.redis else 0.0)


def withheld(section: settings_of.Auth) -> frozenset[bytes]:
    """Return the headers that a listener's wires keep from its calls: those that nobody there looks at.

    Where something is accepted, `auth` stands in the chain and takes them off behind the look.
    """
    return frozenset() if section.accept or section.forward else CREDENTIAL_HEADERS


def auth(section: settings_of.Auth, known: Mapping[str, Credential]) -> Auth:
    """Make the policy of one listener, of the credentials that are known by their names."""
    return Auth(
        tuple(tuple(known[name] for name in names) for names in section.accept),
        drop=section.strangers == "drop",
        forward=section.forward,
        enforce=section.enforce,
    )
