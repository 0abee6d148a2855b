"""Which store the settings ask for, and that it is named without a password."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from relay.credentials.keys.file import FileKeys
from relay.credentials.keys.redis import RedisKeys
from relay.credentials.keys.stores import StoreError, key_store

URL, SHOWN = "redis://relay:hunter2@redis.example:6379/1", "redis://***@redis.example:6379/1"


def test_without_a_place_there_is_no_store() -> None:
    assert key_store(None, None, "None") is None


def test_keys_are_in_the_file_that_is_set(tmp_path: Path) -> None:
    store = key_store(tmp_path / "keys.jsonl", None, "")
    assert isinstance(store, FileKeys)
    assert str(tmp_path / "keys.jsonl") in store.name
    store.close()


def test_keys_are_on_the_server_that_is_set_and_its_password_is_not_told() -> None:
    store = key_store(None, URL, SHOWN)
    assert isinstance(store, RedisKeys)
    assert store.name == f"redis {SHOWN}"
    assert "hunter2" not in store.name
    store.close()


def test_the_library_of_redis_is_not_imported_for_a_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from relay.credentials.keys.stores import key_store;"
        f" key_store(Path({str(tmp_path / 'keys')!r}), None, ''); print('redis' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "False\n"


def test_all_that_is_wrong_with_a_store_is_in_its_error() -> None:
    error = StoreError("line 1: no record", "line 7: no record")
    assert error.problems == ("line 1: no record", "line 7: no record")
    assert str(error) == "line 1: no record; line 7: no record"
