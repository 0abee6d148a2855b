import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from relay import settings
from relay.call import Wire
from relay.demo import flower, sweeper
from relay.demo.federation import Federation, Round
from relay.demo.processes import FederationError, State

FAKE = "#!/bin/sh\n{}\n"


@pytest.fixture
def fake_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Flower's commands as programs that do nothing but wait."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("flower-superlink", "flower-supernode", "flwr"):
        replace(tmp_path, name, "exec sleep 60")
    return tmp_path


def replace(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(FAKE.format(script))
    (directory / name).chmod(0o755)


@pytest.mark.parametrize("wire", settings.CARRIES)
def test_the_relay_accepts_its_settings(fake_bin: Path, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "shares_port", lambda _: True)
    with Federation(fake_bin, wire=wire, workers=3, relay_config={"log": {"level": "debug"}}) as federation:
        loaded = settings.load(federation.directory / "relay.yaml", {})
        assert federation.relay is not None
        assert federation.relay.argv[:3] == [sys.executable, "-m", "relay"]
        assert loaded.workers == 3
        assert loaded.upstream.url.port == federation.ports.fleet
        assert loaded.upstream.wire is wire
        assert loaded.listeners[0].address.port == federation.relay_port
        assert (loaded.log.level, loaded.log.format) == ("debug", "json")
        assert f":{federation.relay_port}" in " ".join(federation.supernodes[0].argv)


def test_direct(fake_bin: Path) -> None:
    with Federation(fake_bin, relayed=False, nodes=3) as federation:
        assert federation.relay is None
        assert federation.relay_metrics() is None
        assert [process.name for process in federation.processes] == [
            "superlink",
            "supernode-0",
            "supernode-1",
            "supernode-2",
        ]
        assert f"127.0.0.1:{federation.ports.fleet}" in federation.supernodes[2].argv
        assert "partition-id=2 num-partitions=3" in federation.supernodes[2].argv


@pytest.mark.parametrize("keep", [False, True])
def test_leaving_ends_everything_and_removes_the_directory(fake_bin: Path, keep: bool) -> None:
    with Federation(fake_bin, relayed=False, keep=keep) as federation:
        federation.superlink.start()
        federation.supernodes[0].start()
        assert federation.supernodes[1].state is State.NEW
        end = time.monotonic() + 10
        while not sweeper.marked([federation.superlink.mark]):  # the mark is seen once it has been executed
            assert time.monotonic() < end
            time.sleep(0.01)
    assert federation.superlink.state is State.ENDED
    assert sweeper.marked([federation.superlink.mark, federation.supernodes[0].mark]) == []
    assert federation.directory.exists() is keep


def test_an_exception_in_the_middle_ends_everything_too(fake_bin: Path) -> None:
    federation = Federation(fake_bin, relayed=False)

    def interrupted() -> None:
        with federation:
            federation.superlink.start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not federation.superlink.running
    assert not federation.directory.exists()


def test_up_says_who_failed(fake_bin: Path) -> None:
    replace(fake_bin, "flower-superlink", "echo the port is taken; exit 4")
    with Federation(fake_bin, relayed=False) as federation, pytest.raises(FederationError) as error:
        federation.up()
    assert error.value.process == "superlink"
    assert "exit code 4" in error.value.problem
    assert error.value.log == "the port is taken"


def test_rounds_are_read_while_they_come(fake_bin: Path) -> None:
    with Federation(fake_bin, relayed=False) as federation:
        run = federation.start_run()
        assert run.rounds() == ()
        line = json.dumps({"round": 1, "train_loss": 0.5, "evaluate_loss": 0.25, "seconds": 8.0})
        (run.output / "history.jsonl").write_text(f"{line}\n" + line[:20])
        assert run.rounds() == (Round(1, 0.5, 0.25, 8.0),)


def test_a_run_that_leaves_no_arrays_has_failed_whatever_flwr_run_says(fake_bin: Path) -> None:
    replace(fake_bin, "flwr", "echo ServerApp raised an exception; exit 0")
    with Federation(fake_bin, relayed=False) as federation:
        with pytest.raises(FederationError, match="ended without a result") as error:
            federation.run()
        assert error.value.log == "ServerApp raised an exception"
        result = federation.start_run().wait(check=False)
        assert (result.returncode, result.arrays, result.rounds) == (0, None, ())


def test_a_run_ends_with_its_federation(fake_bin: Path) -> None:
    replace(fake_bin, "flower-superlink", "sleep 0.3; exit 1")
    with Federation(fake_bin, relayed=False) as federation:
        federation.superlink.start()
        with pytest.raises(FederationError, match="superlink ended by itself"):
            federation.run()


def test_a_run_has_a_time_limit(fake_bin: Path) -> None:
    with (
        Federation(fake_bin, relayed=False) as federation,
        pytest.raises(FederationError, match="run-1 did not end within 0 s"),
    ):
        federation.run(timeout=0.1)


def test_the_run_config_knows_the_nodes_and_where_to_write(fake_bin: Path) -> None:
    replace(fake_bin, "flwr", 'cat "$6"; echo $PWD; printf x > "$(dirname "$6")/arrays.npz"')
    with Federation(fake_bin, relayed=False, nodes=3) as federation:
        run = federation.start_run({"seed": 7})
        result = run.wait()
        assert result.arrays == b"x"
        assert run.process.tail().splitlines() == [
            "num-nodes = 3",
            f'output = "{run.output}"',
            "seed = 7",
            os.fspath(federation.directory),
        ]
        assert (federation.directory / "app" / "pyproject.toml").read_bytes() == (
            flower.APP / "pyproject.toml"
        ).read_bytes()
