"""`flwr-relay keys` and what `check` says of keys: each command on a file and on a real Redis."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from typer.main import get_command

from relay.__main__ import app
from relay.commands import keys as module
from relay.commands.common import INVALID, UNREACHABLE
from relay.credentials.keys.file import FileKeys
from relay.credentials.keys.key import parse
from relay.credentials.keys.record import hashed, read_time
from relay.credentials.keys.redis import RedisKeys
from relay.credentials.keys.stores import KeyStore
from tests.redis_server import RedisServer

Run = Callable[..., Result]
DAY = 86400
#: Made once: that is most of the time that a command takes.
COMMAND = get_command(app)
PASSWORD = "hunter2hunter2"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), password=PASSWORD) as server:
        yield server


@pytest.fixture(params=["file", "redis"])
def section(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The settings of one store."""
    if request.param == "file":
        return {"file": str(tmp_path / "keys.jsonl")}
    server: RedisServer = request.getfixturevalue("redis")
    with server.client() as client:
        client.flushall()
    return {"redis": server.url}


@pytest.fixture
def store(section: dict[str, Any]) -> Iterator[KeyStore]:
    kept: KeyStore = (
        FileKeys(Path(section["file"])) if "file" in section else RedisKeys(section["redis"], "shown")
    )
    yield kept
    kept.close()


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a settings file with this section `keys`."""

    def write(keys: dict[str, Any], **more: Any) -> Path:
        path = tmp_path / "relay.yaml"
        tree = {"listeners": [{"address": ":8080", "auth": {"accept": ["api_key"]}}], "keys": keys, **more}
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture
def run(section: dict[str, Any], configure: Callable[..., Path]) -> Run:
    """Return a function that runs `flwr-relay keys ...` on the store."""
    path = configure(section)

    def run(*arguments: str, code: int = 0) -> Result:
        init = ["--init"] if arguments[0] == "create" else []
        result = CliRunner().invoke(COMMAND, ["keys", *arguments, *init, "--config", str(path)])
        assert result.exit_code == code, result.output
        assert PASSWORD not in result.output
        return result

    return run


def ids(result: Result) -> str:
    """The id of the key that was printed."""
    key = parse(result.stdout.strip().encode())
    assert key is not None
    return key.id.decode()


def test_a_key_is_printed_alone_and_kept_as_its_hash(run: Run, store: KeyStore) -> None:
    result = run("create", "node-a", "--tenant", "north", "--label", "site=a", "--label", "x=1=2")
    key = parse(result.stdout.strip().encode())
    assert key is not None
    assert key.intact
    [record] = (store.poll() or {}).values()
    assert (record.id, record.name, record.tenant) == (key.id.decode(), "node-a", "north")
    assert record.labels == (("site", "a"), ("x", "1=2"))
    assert record.digest == hashed(key.secret, b"")
    assert abs(record.created - time.time()) < 60
    assert (record.expires, record.not_before, record.revoked) == (None, None, None)
    assert f"flower-supernode --insecure --superlink node-a:{key}@RELAY:8080" in result.stderr
    assert "key.secret" not in result.stderr


@pytest.mark.parametrize(
    ("written", "ahead"), [("90d", 90 * DAY), ("12h", DAY / 2), ("30m", 1800), ("2w", 14 * DAY), ("45s", 45)]
)
def test_a_key_may_begin_and_end(run: Run, store: KeyStore, written: str, ahead: float) -> None:
    run("create", "node-a", "--not-before", written)
    run("create", "node-b", "--expires", written)
    run("create", "node-c", "--expires", "2030-01-01T00:00:00Z")
    kept = {record.name: record for record in (store.poll() or {}).values()}
    assert kept["node-a"].not_before is not None
    assert kept["node-b"].expires is not None
    assert abs(kept["node-a"].not_before - time.time() - ahead) < 30
    assert abs(kept["node-b"].expires - time.time() - ahead) < 30
    assert kept["node-c"].expires == read_time("2030-01-01T00:00:00Z")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a:b",), "the key has the name 'a:b': it must be 1 to 63 letters"),
        (("",), "the key has the name ''"),
        (("n", "--tenant", "a b"), "the key has the tenant 'a b'"),
        (("n", "--label", "site"), "--label site: write key=value"),
        (("n", "--label", "a=b\tc"), "the key labels must map"),
        (("n", "--expires", "soon"), "--expires soon: write a duration such as 90d or 12h, or a time"),
        (("n", "--expires", "90y"), "--expires 90y: write a duration"),
        (("n", "--expires", "999999999d"), "at most 100 years"),
        (("n", "--expires", "0s"), "--expires must be after now"),
        (("n", "--expires", "2020-01-01T00:00:00Z"), "--expires must be after now"),
        (("n", "--expires", "1h", "--not-before", "2h"), "and after --not-before"),
        (("n", "--expires", "2027-01-01T00:00:00"), "--expires 2027-01-01T00:00:00: write"),
    ],
)
def test_an_argument_that_cannot_be_is_named_and_makes_no_key(
    tmp_path: Path, configure: Callable[..., Path], arguments: tuple[str, ...], said: str
) -> None:
    path = configure({"file": str(tmp_path / "keys.jsonl")})
    result = CliRunner().invoke(COMMAND, ["keys", "create", *arguments, "--config", str(path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert not (tmp_path / "keys.jsonl").exists()


def test_a_name_has_one_key_at_a_time_in_its_tenant(run: Run) -> None:
    first = ids(run("create", "node-a"))
    assert first in run("create", "node-a", code=3).stderr
    run("create", "node-a", "--tenant", "north")
    run("revoke", first)
    run("create", "node-a")


def test_keys_are_listed_without_their_secrets(run: Run, store: KeyStore) -> None:
    made = [run("create", "node-b"), run("create", "node-a", "--label", "site=a", "--expires", "90d")]
    run("revoke", "node-b")
    listed = run("list").stdout
    head, first, second = listed.splitlines()
    assert head.split() == ["ID", "NAME", "TENANT", "STATE", "CREATED", "EXPIRES", "LABELS"]
    assert re.fullmatch(rf"{ids(made[1])} +node-a +- +valid +\S+Z +\S+Z +site=a", first)
    assert re.fullmatch(rf"{ids(made[0])} +node-b +- +revoked +\S+Z +-", second)
    entries = json.loads(run("list", "--json").stdout)
    assert [(entry["name"], entry["state"]) for entry in entries] == [
        ("node-a", "valid"),
        ("node-b", "revoked"),
    ]
    for record in (store.poll() or {}).values():
        assert record.digest.hex() not in listed + json.dumps(entries)
    assert all("hash" not in entry for entry in entries)


def test_a_key_is_revoked_by_its_id_or_its_name(run: Run, store: KeyStore) -> None:
    first, second = ids(run("create", "node-a")), ids(run("create", "node-b"))
    assert run("revoke", first).stdout == f"revoked {first} (node-a)\n"
    assert run("revoke", "node-b").stdout == f"revoked {second} (node-b)\n"
    assert all(abs((record.revoked or 0) - time.time()) < 60 for record in (store.poll() or {}).values())
    assert "is revoked already" in run("revoke", first, code=3).stderr
    assert "there is no key with the id or the name node-c" in run("revoke", "node-c", code=3).stderr


def test_a_name_of_several_tenants_needs_one(run: Run, store: KeyStore) -> None:
    run("create", "node-a", "--tenant", "north")
    run("create", "node-a", "--tenant", "south")
    assert (
        "the tenants 'north', 'south' have a node-a: add --tenant" in run("revoke", "node-a", code=3).stderr
    )
    assert "add --tenant" in run("rotate", "node-a", code=3).stderr
    run("revoke", "node-a", "--tenant", "south")
    states = {record.tenant: record.revoked is None for record in (store.poll() or {}).values()}
    assert states == {"north": True, "south": False}


def test_a_name_that_is_the_id_of_another_key_is_not_guessed(run: Run) -> None:
    first = ids(run("create", "node-a"))
    run("create", first)
    assert "is the id of one key and the name of another" in run("revoke", first, code=3).stderr


def test_a_key_is_rotated_with_an_overlap(run: Run, store: KeyStore) -> None:
    old = ids(run("create", "node-a", "--tenant", "north", "--label", "site=a", "--expires", "90d"))
    result = run("rotate", "node-a", "--overlap", "2h")
    new = ids(result)
    kept = store.poll() or {}
    assert set(kept) == {old, new}
    assert abs((kept[old].expires or 0) - time.time() - 7200) < 30
    assert (kept[new].name, kept[new].tenant, kept[new].labels) == ("node-a", "north", (("site", "a"),))
    assert (kept[new].expires, kept[new].not_before) == (None, None)
    assert kept[new].digest != kept[old].digest
    assert f"{old} ends at " in result.stderr
    now = time.time()
    assert {kept[old].state(now), kept[new].state(now)} == {"valid"}


def test_a_rotation_never_makes_an_old_key_last_longer(run: Run, store: KeyStore) -> None:
    old = ids(run("create", "node-a", "--expires", "1h"))
    new = ids(run("rotate", old, "--overlap", "24h", "--expires", "30d"))
    kept = store.poll() or {}
    assert abs((kept[old].expires or 0) - time.time() - 3600) < 30
    assert abs((kept[new].expires or 0) - time.time() - 30 * DAY) < 30


def test_a_new_key_is_valid_at_once(run: Run, store: KeyStore) -> None:
    run("create", "node-a", "--not-before", "1h")
    new = ids(run("rotate", "node-a"))
    assert (store.poll() or {})[new].state(time.time()) == "valid"


def test_a_second_rotation_ends_all_keys_before_it(run: Run, store: KeyStore) -> None:
    run("create", "node-a")
    run("rotate", "node-a", "--overlap", "24h")
    new = ids(run("rotate", "node-a", "--overlap", "0s"))
    now = time.time()
    assert {i: r.state(now) for i, r in (store.poll() or {}).items() if r.state(now) == "valid"} == {
        new: "valid"
    }


def test_a_key_that_has_ended_is_not_rotated(run: Run) -> None:
    run("create", "node-a")
    run("revoke", "node-a")
    assert "is no valid key any more" in run("rotate", "node-a", code=3).stderr
    assert "there is no key" in run("rotate", "node-b", code=3).stderr


@pytest.mark.parametrize("arguments", [("--overlap", "soon"), ("--overlap", "-1h"), ("--expires", "0s")])
def test_a_rotation_that_cannot_be_changes_nothing(
    run: Run, store: KeyStore, arguments: tuple[str, ...]
) -> None:
    run("create", "node-a")
    run("rotate", "node-a", *arguments, code=2)
    assert len(store.poll() or {}) == 1


def test_an_id_is_never_given_twice(run: Run, store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from relay.credentials.keys import key  # noqa: PLC0415 - where the command takes it from

    same, other = key.generate(), key.generate()
    given = iter([same, same, other])
    monkeypatch.setattr(key, "generate", lambda: next(given))
    run("create", "node-a")
    run("create", "node-b")
    assert set(store.poll() or {}) == {same.id.decode(), other.id.decode()}


def test_a_pepper_goes_into_the_hash(tmp_path: Path, configure: Callable[..., Path]) -> None:
    (tmp_path / "pepper").write_bytes(b"0123456789abcdef\n")
    keys = tmp_path / "keys.jsonl"
    path = configure({"file": str(keys), "pepper_file": str(tmp_path / "pepper")})
    result = CliRunner().invoke(COMMAND, ["keys", "create", "a", "--init", "--config", str(path)])
    key = parse(result.stdout.strip().encode())
    assert key is not None
    [record] = (FileKeys(keys).poll() or {}).values()
    assert record.digest == hashed(key.secret, b"0123456789abcdef")
    assert record.pepper


@pytest.mark.parametrize(
    ("listener", "wire", "commands"),
    [
        ({"address": "10.0.0.5:80"}, "http_v1", ["--insecure --superlink n:KEY@10.0.0.5:80"]),
        ({"address": "[::]:80"}, "http_v1", ["--insecure --superlink n:KEY@RELAY:80"]),
        ({"address": "[::1]:80"}, "http_v1", ["--insecure --superlink n:KEY@[::1]:80"]),
        ({"address": ":80"}, "rest_v0", ["--insecure --rest --superlink http://n:KEY@RELAY:80"]),
    ],
)
def test_the_command_of_a_node_is_ready_made(
    tmp_path: Path, configure: Callable[..., Path], listener: dict[str, Any], wire: str, commands: list[str]
) -> None:
    path = configure(
        {"file": str(tmp_path / "keys.jsonl")},
        upstream={"wire": wire},
        listeners=[{**listener, "auth": {"accept": ["api_key"]}}, {"address": ":9999"}],
    )
    result = CliRunner().invoke(COMMAND, ["keys", "create", "n", "--init", "--config", str(path)])
    told = [line.strip() for line in result.stderr.splitlines() if "flower-supernode" in line]
    assert told == [f"flower-supernode {text.replace('KEY', result.stdout.strip())}" for text in commands]


def test_a_store_that_is_not_there_is_begun_only_if_that_is_meant(
    section: dict[str, Any], configure: Callable[..., Path]
) -> None:
    path = configure(section)
    for code, init in ((1, ()), (0, ("--init",)), (3, ("--init",))):
        result = CliRunner().invoke(COMMAND, ["keys", "create", "a", *init, "--config", str(path)])
        assert result.exit_code == code, result.output
        assert ("restore" in result.stderr) is (code == 1)


# -- what is wrong with the store ---------------------------------------------------------------------

every_command = pytest.mark.parametrize(
    "command", [("create", "a"), ("list",), ("revoke", "a"), ("rotate", "a")], ids=" ".join
)


@every_command
def test_without_a_place_for_keys_nothing_is_done(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(COMMAND, ["keys", *command], env={"RELAY_CONFIG": None})
    assert result.exit_code == 2
    assert (
        result.stderr
        == "there is no place for keys: set keys.file or keys.redis in the settings (--config)\n"
    )


@every_command
def test_wrong_settings_are_named(configure: Callable[..., Path], command: tuple[str, ...]) -> None:
    path = configure({"fiel": "x"})
    result = CliRunner().invoke(COMMAND, ["keys", *command, "--config", str(path)])
    assert result.exit_code == 2
    assert "keys.fiel: is not a setting; did you mean file?" in result.stderr


@every_command
def test_a_broken_file_is_named_and_left_alone(
    tmp_path: Path, configure: Callable[..., Path], command: tuple[str, ...]
) -> None:
    keys = tmp_path / "keys.jsonl"
    keys.write_text('{"flwr_relay_keys": 1, "count": 1}\n{"id": "short"}\n')
    result = CliRunner().invoke(COMMAND, ["keys", *command, "--config", str(configure({"file": str(keys)}))])
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{keys}:2: has no field 'name'" in result.stderr
    assert "short" in keys.read_text()


@every_command
def test_a_redis_that_does_not_answer_is_named_without_its_password(
    tmp_path: Path, configure: Callable[..., Path], command: tuple[str, ...]
) -> None:
    server = RedisServer(tmp_path, password=PASSWORD)
    result = CliRunner().invoke(
        COMMAND, ["keys", *command, "--config", str(configure({"redis": server.url}))]
    )
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"redis://***@127.0.0.1:{server.port}/0 does not answer" in result.stderr
    assert PASSWORD not in result.output


# -- flwr-relay check ---------------------------------------------------------------------------------


def check(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(COMMAND, ["check", *(arguments or ("--no-probe",)), "--config", str(path)])


def test_check_counts_the_keys_of_a_file(tmp_path: Path, configure: Callable[..., Path]) -> None:
    path = configure({"file": str(tmp_path / "keys.jsonl")})
    for arguments in (("create", "a", "--init"), ("create", "b"), ("revoke", "b")):
        CliRunner().invoke(COMMAND, ["keys", *arguments, "--config", str(path)])
    result = check(path)
    assert result.exit_code == 0
    assert f"keys: ok (file {tmp_path}/keys.jsonl: 1 valid, 1 not)" in result.stdout


def test_check_names_every_broken_line(tmp_path: Path, configure: Callable[..., Path]) -> None:
    keys = tmp_path / "keys.jsonl"
    keys.write_text('{"flwr_relay_keys": 1, "count": 2}\n{}\n[]\n')
    result = check(configure({"file": str(keys)}))
    assert result.exit_code == 2
    assert f"keys: {keys}:2: has no field 'id'" in result.stderr
    assert f"keys: {keys}:3: must be a JSON object" in result.stderr


def test_check_says_how_a_file_that_is_not_there_is_made(
    tmp_path: Path, configure: Callable[..., Path]
) -> None:
    result = check(configure({"file": str(tmp_path / "keys.jsonl")}))
    assert result.exit_code == 2
    assert "make it with flwr-relay keys create --init" in result.stderr


def test_check_finds_keys_of_another_pepper(tmp_path: Path, configure: Callable[..., Path]) -> None:
    pepper, keys = tmp_path / "pepper", tmp_path / "keys.jsonl"
    pepper.write_bytes(b"0123456789abcdef")
    path = configure({"file": str(keys), "pepper_file": str(pepper)})
    CliRunner().invoke(COMMAND, ["keys", "create", "a", "--init", "--config", str(path)])
    assert check(path).exit_code == 0
    pepper.write_bytes(b"fedcba9876543210")
    result = check(path)
    assert result.exit_code == 2
    assert "(a) was made with the pepper" in result.stderr
    assert "fedcba9876543210" not in result.output


def test_check_asks_redis_unless_told_not_to(
    tmp_path: Path, redis: RedisServer, configure: Callable[..., Path]
) -> None:
    path = configure({"redis": RedisServer(tmp_path, password=PASSWORD).url})
    assert check(path).exit_code == 0
    result = check(path, "--probe")
    assert result.exit_code == 1
    assert "keys: redis://***@127.0.0.1" in result.stderr
    with redis.client() as client:
        client.flushall()
    path = configure({"redis": redis.url})
    assert "holds no keys" in check(path, "--probe").stderr
    CliRunner().invoke(COMMAND, ["keys", "create", "a", "--init", "--config", str(path)])
    assert "1 valid, 0 not" in check(path, "--probe").stdout


def test_the_exit_codes_are_those_documented() -> None:
    assert module.__doc__ is not None
    documented = {int(code) for code in re.findall(r"^    (\d)  ", module.__doc__, re.MULTILINE)}
    assert documented == {0, UNREACHABLE, INVALID, module.NOT_FOUND}
