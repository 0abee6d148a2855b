"""Key pairs come to the same in every process, and what leads to them outlives a relay and no longer."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import time
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, uses_nist_ec_curve, verify_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.stores import node_signers
from relay.stores.node_signers import Node, NodeSigners, Owner, StoreError, read_secret

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MONTH = 30 * 24 * 3600.0
DAY = 24 * 3600.0
ALICE = Owner("", "alice")
NODE = Node.of(ALICE, b"-----BEGIN PUBLIC KEY-----")

KNOWN_X = int(
    "b02d98ae8e1256e136948a05cd46c8eeb7a20de0d1d308b704e813b9f0a933b0bb026663fa08dbd20f93bc5dd1dde5e9", 16
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "signing"


@pytest.fixture
def signers(directory: Path) -> NodeSigners:
    """Return signers whose secret is no longer new."""
    signers = NodeSigners(directory, MONTH)
    signers.derive(NODE)
    age(directory / "secret", 2 * node_signers._NEW)
    return signers


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- keys -------------------------------------------------------------------------------------------


def test_a_signature_is_one_that_flower_takes(signers: NodeSigners) -> None:
    signer = signers.derive(NODE)
    key = bytes_to_public_key(signer.public_key)
    assert isinstance(key.curve, ec.SECP384R1)
    assert uses_nist_ec_curve(key)
    assert verify_signature(key, b"2026-11-23T12:00:00+00:00", signer.sign(b"2026-11-23T12:00:00+00:00"))


def test_another_relay_with_the_same_secret_comes_to_the_same_key(
    signers: NodeSigners, directory: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "secret").write_bytes((directory / "secret").read_bytes())
    assert NodeSigners(other, MONTH).derive(NODE).public_key == signers.derive(NODE).public_key


def test_the_same_secret_gives_the_same_keys_for_ever(directory: Path) -> None:
    """A change of the derivation would part all relays from the nodes that they have signed for."""
    directory.mkdir()
    (directory / "secret").write_text("11" * 32)
    key = bytes_to_public_key(NodeSigners(directory, MONTH).derive(NODE).public_key)
    assert key.public_numbers().x == KNOWN_X


@pytest.mark.parametrize(
    "other",
    [
        Node.of(ALICE, b"another key"),
        Node.of(Owner("", "bob"), b"-----BEGIN PUBLIC KEY-----"),
        Node.of(Owner("a", "lice"), b"-----BEGIN PUBLIC KEY-----"),
        Node.of(None, b"-----BEGIN PUBLIC KEY-----"),
        Node.of(Owner("", ""), b"-----BEGIN PUBLIC KEY-----"),
    ],
    ids=["key", "name", "where the tenant ends", "not asked", "empty name"],
)
def test_another_node_or_another_owner_has_another_key(signers: NodeSigners, other: Node) -> None:
    assert signers.derive(other).public_key != signers.derive(NODE).public_key


def test_another_secret_gives_another_key(signers: NodeSigners, tmp_path: Path) -> None:
    assert NodeSigners(tmp_path / "other", MONTH).derive(NODE).public_key != signers.derive(NODE).public_key


def _derive(directory: Path, start: object, keys: multiprocessing.SimpleQueue[bytes]) -> None:
    start.wait()  # type: ignore[attr-defined]
    keys.put(NodeSigners(directory, MONTH).derive(NODE).public_key)


def test_workers_that_start_at_once_agree_on_one_secret(directory: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start, keys = fork.Event(), fork.SimpleQueue()
    workers = [fork.Process(target=_derive, args=(directory, start, keys)) for _ in range(8)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(20)
    assert len({keys.get() for _ in workers}) == 1
    assert sorted(path.name for path in directory.iterdir()) == ["nodes", "secret"]


# -- files ------------------------------------------------------------------------------------------


def test_only_the_relay_can_read_what_is_kept(signers: NodeSigners, directory: Path) -> None:
    before = os.umask(0)
    try:
        signers.put(7, NODE)
    finally:
        os.umask(before)
    assert (mode(directory), mode(directory / "nodes")) == (0o700, 0o700)
    assert (mode(directory / "secret"), mode(directory / "nodes" / "7")) == (0o600, 0o600)


def test_the_file_of_a_node_says_whose_it_is_and_nothing_that_could_sign(
    signers: NodeSigners, directory: Path
) -> None:
    signers.put(7, NODE)
    written = json.loads((directory / "nodes" / "7").read_text())
    assert written == {"owner": {"tenant": "", "name": "alice"}, "key": NODE.key}


@settings(max_examples=25, deadline=None)
@given(
    node_id=st.integers(1, 2**64 - 1),
    owner=st.none() | st.builds(Owner, st.text(max_size=40), st.text(max_size=40)),
    key=st.binary(max_size=300),
)
def test_a_node_is_found_as_it_was_put_by_any_process(
    tmp_path_factory: pytest.TempPathFactory, node_id: int, owner: Owner | None, key: bytes
) -> None:
    directory = tmp_path_factory.mktemp("signing")
    node = Node.of(owner, key)
    signers = NodeSigners(directory, MONTH)
    signers.derive(NODE)
    signers.put(node_id, node)
    assert NodeSigners(directory, MONTH).find(node_id) == node


def test_a_node_that_was_removed_or_never_there_is_not_found(signers: NodeSigners, directory: Path) -> None:
    signers.put(7, NODE)
    signers.remove(7)
    signers.remove(7)
    assert signers.find(7) is None
    assert signers.find(8) is None


def test_a_node_that_is_gone_for_long_is_forgotten_and_one_in_use_is_not(
    signers: NodeSigners, directory: Path
) -> None:
    for node_id in (7, 8):
        signers.put(node_id, NODE)
        age(directory / "nodes" / str(node_id), MONTH + 2 * DAY)
    half = directory / f"{node_signers._HALF}x"
    half.write_text("{")
    age(half, 2 * DAY)
    assert signers.find(8) == NODE  # it is in use
    signers._next_sweep = 0.0
    signers.put(9, NODE)
    assert sorted(path.name for path in (directory / "nodes").iterdir()) == ["8", "9"]
    assert not half.exists()
    assert (directory / "secret").exists()


class Clocks:
    """Both clocks of the host, which go as far as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.steady = time.time(), time.monotonic()
        monkeypatch.setattr("relay.stores.node_signers.time.time", lambda: self.wall)
        monkeypatch.setattr("relay.stores.node_signers.time.monotonic", lambda: self.steady)

    def go(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.mark.parametrize("restarted", [True, False])
def test_a_clock_that_is_ahead_forgets_no_node_before_it_could_be_heard_of(
    signers: NodeSigners, directory: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    clocks = Clocks(monkeypatch)
    for node_id in (7, 8):
        signers.put(node_id, NODE)
    clocks.go(node_signers._CALM)
    signers.put(9, NODE)
    clocks.go(DAY)
    clocks.wall += 2 * MONTH
    if restarted:
        signers = NodeSigners(directory, MONTH)
    for _ in range(2):
        signers.put(9, NODE)
        clocks.go(node_signers._CALM - 1)
    assert signers.find(7) == NODE
    os.utime(directory / "nodes" / "7", (clocks.wall, clocks.wall))  # what the system does then
    clocks.go(2)
    signers.put(9, NODE)
    assert (directory / "nodes" / "7").exists()
    assert not (directory / "nodes" / "8").exists()


def test_a_clock_that_is_put_right_little_by_little_is_no_step(
    signers: NodeSigners, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks(monkeypatch)
    signers.put(7, NODE)
    for _ in range(40):
        clocks.go(DAY)
        clocks.wall += node_signers._STEP / 2
        signers.put(8, NODE)
    assert not (directory / "nodes" / "7").exists()


# -- a directory that is not what it should be ------------------------------------------------------


def _unmounted(directory: Path) -> None:
    (directory / "secret").unlink()
    (directory / "nodes" / "7").unlink()


def _another(directory: Path) -> None:
    (directory / "secret").write_text("00" * 32)


def _fresh(directory: Path) -> None:
    age(directory / "secret", 1)


def _broken(directory: Path) -> None:
    (directory / "secret").write_text("no secret")


@pytest.mark.parametrize("spoil", [_unmounted, _another, _fresh, _broken])
def test_a_directory_that_may_be_the_wrong_one_says_nothing_of_a_node(
    signers: NodeSigners, directory: Path, spoil: Callable[[Path], None]
) -> None:
    signers.put(7, NODE)
    spoil(directory)
    with pytest.raises(StoreError, match="secret"):
        signers.find(8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "7",
        '{"owner": null}',
        '{"owner": null, "key": "ab"}',
        '{"owner": null, "key": 7}',
        '{"owner": {"name": "x"}, "key": "' + "ab" * 32 + '"}',
        '{"owner": 7, "key": "' + "ab" * 32 + '"}',
    ],
)
def test_a_damaged_file_is_not_taken_for_an_unknown_node(
    signers: NodeSigners, directory: Path, text: str
) -> None:
    (directory / "nodes" / "7").write_text(text)
    with pytest.raises(StoreError, match="damaged"):
        signers.find(7)


@pytest.mark.parametrize("text", ["", "11" * 31, "11" * 33, "zz" * 32, "é"])
def test_a_damaged_secret_is_refused_and_not_repeated(directory: Path, text: str) -> None:
    directory.mkdir()
    (directory / "secret").write_text(text)
    with pytest.raises(StoreError, match="64 hexadecimal digits") as caught:
        read_secret(directory / "secret")
    assert not text or text not in str(caught.value)
    with pytest.raises(StoreError):
        NodeSigners(directory, MONTH).derive(NODE)


def test_what_cannot_be_read_or_written_is_not_taken_for_an_unknown_node(
    signers: NodeSigners, directory: Path
) -> None:
    """Else the node would be told that it is unknown, and exit."""
    signers.put(7, NODE)
    nodes = directory / "nodes"
    nodes.rename(directory / "aside")
    nodes.write_text("no directory")
    uses: list[Callable[[], object]] = [
        lambda: signers.find(7),
        lambda: signers.put(8, NODE),
        lambda: signers.remove(7),
    ]
    for use in uses:
        with pytest.raises(StoreError, match="Not a directory"):
            use()
    nodes.unlink()
    (directory / "aside").rename(nodes)
    assert signers.find(7) == NODE
    assert [path.name for path in nodes.iterdir()] == ["7"], "no half file stays"


def test_a_secret_that_cannot_be_read_is_refused(directory: Path) -> None:
    (directory / "secret").mkdir(parents=True)
    with pytest.raises(StoreError, match="Is a directory"):
        read_secret(directory / "secret")
    with pytest.raises(StoreError, match="is gone"):
        read_secret(directory / "nowhere")


def test_a_directory_that_cannot_be_made_is_tried_again(tmp_path: Path) -> None:
    signers = NodeSigners(tmp_path / "missing" / "signing", MONTH)
    with pytest.raises(StoreError, match="No such file"):
        signers.derive(NODE)
    (tmp_path / "missing").mkdir()
    signers.derive(NODE)
