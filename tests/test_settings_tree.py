"""The relay's own tree: its defaults, its documentation, and the example that holds every key."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from relay.call import Wire
from relay.settings import load
from relay.settings_signing import Signing
from relay.settings_source import _holds, annotation_at, keys
from relay.settings_tls import Pair, Tls
from relay.settings_tree import CARRIES, Listener, Retry, Settings, Upstream, carried
from tests.certificates import make_pair


def test_a_listener_serves_all_of_its_kind_that_the_upstream_carries_unless_told() -> None:
    assert set(CARRIES) == set(Wire) - {Wire.GRPC_ADAPTER}
    for wire in CARRIES:
        served = tuple(node for node in carried(wire, signing=False) if node.grpc is wire.grpc)
        assert load(None, {"RELAY_UPSTREAM__WIRE": wire.value}).listeners[0].wires == served
        assert Settings(upstream=Upstream(wire=wire)).listeners[0].wires == served


def test_a_listener_serves_nodes_that_cannot_sign_if_the_relay_signs(tmp_path: Path) -> None:
    signing = Signing(directory=tmp_path / "signing")
    assert Wire.REST_V0 not in Settings().listeners[0].wires
    assert Settings(signing=signing).listeners[0].wires == (Wire.HTTP_V1, Wire.REST_V0)


def test_the_tree_is_frozen(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    settings = Settings(listeners=(Listener(tls=Tls(certificate=certificate, key=key)),))
    with pytest.raises(ValidationError, match="frozen"):
        settings.workers = 2
    with pytest.raises(ValidationError, match="frozen"):
        settings.upstream.wire = Wire.REST_V0
    hash(settings)


@pytest.mark.parametrize("budget", [0, 0.2, 1])
def test_the_budget_of_repeats_is_a_share_with_both_its_ends(budget: float) -> None:
    assert Retry(budget=budget).budget == budget


@pytest.mark.parametrize(("written", "version"), [("1.2", "1.2"), (1.2, "1.2"), ("1.3", "1.3"), (1.3, "1.3")])
def test_a_version_of_tls_may_be_written_as_a_number(written: object, version: str, tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    tree = {"certificate": certificate, "key": key, "minimum_version": written}
    assert Tls.model_validate(tree).minimum_version == version


def test_every_key_says_what_it_means() -> None:
    for *section, name in keys(Settings):
        declared = annotation_at(Settings, tuple(section))
        assert issubclass(declared, BaseModel)
        assert (declared.model_fields[str(name)].description or "").endswith("."), (*section, name)


def test_the_example_holds_every_key_with_its_default(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "relay.example.yaml"
    assert load(example, {}) == Settings()
    # The keys whose default is no fixed value, or none, are commented out.
    text = re.sub(r"(?m)^( *)# ( *(?:- )?\w+:(?: \S+)?)$", r"\1\2", example.read_text())
    certificate, key = make_pair(tmp_path)
    path = tmp_path / "relay.yaml"
    files = r"/etc/flwr-relay/(superlink-ca\.pem|node-keys|keys\.jsonl|pepper)|rediss://\S+"
    edited = re.sub(files, "null", text)
    edited = edited.replace("/var/lib/flwr-relay/quarantine", "null")
    edited = edited.replace("/var/lib/flwr-relay", str(tmp_path))
    edited = re.sub(r"/etc/flwr-relay/(clients-(ca|crl)|upstream(-key)?)\.pem", "null", edited)
    edited = edited.replace("superlink.example", "null")
    edited = re.sub(r"(?m)^  allow:\n(?:    .*\n)+", "  allow: []\n", edited)
    signing = re.search(r"(?m)^signing:\n(?:  .*\n)+", edited)
    assert signing is not None
    edited = edited.replace(signing[0], "")  # it serves nobody where rest_v0 is not served
    shown = yaml.safe_load(signing[0])["signing"]
    assert Signing.model_validate(shown) == Signing(directory=tmp_path / "signing")
    path.write_text(re.sub(r"/\S+/(relay(?:-key)?\.(?:pem|pid))", rf"{tmp_path}/\1", edited))
    assert load(path, {}) == Settings(
        workers=4,
        pid_file=tmp_path / "relay.pid",
        listeners=(
            Listener(
                wires=(Wire.HTTP_V1,),
                tls=Tls(
                    certificate=certificate,
                    key=key,
                    certificates=(Pair(certificate=certificate, key=key),),
                ),
            ),
        ),
    )
    tree = yaml.safe_load(text)
    assert {key for key in keys(Settings) if _holds(tree, key)} == set(keys(Settings))
