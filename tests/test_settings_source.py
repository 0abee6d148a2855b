"""Reading and merging the settings file and the environment, for a tree that is not the relay's own."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel

from relay.settings_source import (
    Problem,
    SettingsError,
    Source,
    annotation_at,
    closest,
    dotted,
    keys,
    read,
    show,
    variable,
)


class Port(BaseModel):
    number: int = 1
    names: tuple[str, ...] = ()


class Tree(BaseModel):
    size: int = 1
    ports: tuple[Port, ...] = ()
    main_port: Port = Port()
    spare_port: Port | None = None


def read_text(tmp_path: Path, text: str | bytes, environ: Mapping[str, str] | None = None) -> Source:
    path = tmp_path / "relay.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read(path, environ or {}, Tree)


def only_problem(source: Source) -> Problem:
    [problem] = source.problems
    return problem


def test_no_file_and_no_variable_is_an_empty_tree() -> None:
    source = read(None, {"PATH": "/bin", "RELAY_CONFIG": "relay.yaml"}, Tree)
    assert source == Source()
    assert source.origin(("size",)) == "default"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n"])
def test_an_empty_file_is_an_empty_tree(tmp_path: Path, text: str) -> None:
    source = read_text(tmp_path, text)
    assert (source.tree, source.problems, source.complete) == ({}, [], True)


def test_each_value_of_a_file_has_its_line(tmp_path: Path) -> None:
    source = read_text(
        tmp_path, "size: 5\nports:\n  - number: 80\n    names:\n      - a\n  -\n    number: 81\n"
    )
    path = tmp_path / "relay.yaml"
    assert source.tree == {"size": 5, "ports": [{"number": 80, "names": ["a"]}, {"number": 81}]}
    assert source.origin(("size",)) == f"{path}:1"
    assert source.origin(("ports", 0, "names", 0)) == f"{path}:5"
    assert source.origin(("ports", 1, "number")) == f"{path}:7"
    assert source.origin(("ports", 1, "names")) == "default"
    assert source.origin(("ports", 2, "number")) == "default"


def test_aliases_and_merged_mappings_are_read(tmp_path: Path) -> None:
    source = read_text(tmp_path, "ports:\n  - &p {number: 80}\n  - {<<: *p, names: [a]}\n  - *p\n")
    assert source.tree == {"ports": [{"number": 80}, {"number": 80, "names": ["a"]}, {"number": 80}]}
    assert source.problems == []
    assert source.origin(("ports", 1, "number")) == f"{tmp_path / 'relay.yaml'}:3"


def test_a_key_is_always_text(tmp_path: Path) -> None:
    assert read_text(tmp_path, "1: a\non: b\n2020-01-01: c\n").tree == {
        "1": "a",
        "on": "b",
        "2020-01-01": "c",
    }


def test_a_key_given_twice_is_a_problem(tmp_path: Path) -> None:
    source = read_text(tmp_path, "size: 1\nmain_port:\n  number: 1\n  number: 2\nsize: 2\n")
    path = tmp_path / "relay.yaml"
    assert [str(problem) for problem in source.problems] == [
        f"main_port.number: is given twice ({path}:4)",
        f"size: is given twice ({path}:5)",
    ]
    assert source.complete


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("size: [1\n", "expected ',' or ']', but got '<stream end>', at line 2, column 1"),
        ("size: a: b\n", "mapping values are not allowed here, at line 1, column 8"),
        ("a: 1\n---\nb: 2\n", "but found another document, at line 2, column 1"),
        ("a: *b\n", "found undefined alias 'b', at line 1, column 4"),
        ("a: !!python/name:os.system\n", "could not determine a constructor"),
        ("? [a]\n: b\n", "found unhashable key, at line 1"),
        (b"\xff\xfe\xfa", "is not valid YAML"),
        ("size: \x07\n", "special characters are not allowed"),
        ("size: 2020-13-45\n", "is not valid YAML: month must be in 1..12"),
        (f"size: {'[' * 5000}\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_not_yaml_is_one_problem(tmp_path: Path, text: str | bytes, reason: str) -> None:
    source = read_text(tmp_path, text)
    problem = only_problem(source)
    assert reason in problem.message
    assert problem.origin == str(tmp_path / "relay.yaml")
    assert "\n" not in str(problem)
    assert not source.complete


@pytest.mark.parametrize("text", ["- size: 1\n", "size\n", "5\n", "&a [*a]\n"])
def test_a_file_must_hold_a_mapping(tmp_path: Path, text: str) -> None:
    source = read_text(tmp_path, text)
    assert "must hold a mapping of sections" in only_problem(source).message
    assert str(only_problem(source)).startswith(f"{tmp_path / 'relay.yaml'}: must hold a mapping")
    assert not source.complete


def test_a_value_that_contains_itself_is_read(tmp_path: Path) -> None:
    source = read_text(tmp_path, "ports: &a [*a]\n")
    assert source.tree["ports"][0] is source.tree["ports"]
    assert show(source.tree["ports"]) == "[[...]]"


def test_a_file_that_cannot_be_read_is_one_problem_beside_those_of_the_environment(tmp_path: Path) -> None:
    source = read(tmp_path / "missing.yaml", {"RELAY_SIZE": "5", "RELAY_SIZ": "5"}, Tree)
    assert [problem.message.split(";")[0] for problem in source.problems] == [
        "cannot be read: No such file or directory",
        "is not a setting",
    ]
    assert source.tree == {"size": 5}
    assert not source.complete
    assert "Is a directory" in only_problem(read(tmp_path, {}, Tree)).message


def test_a_variable_wins_over_the_file(tmp_path: Path) -> None:
    text = "size: 1\nmain_port: {number: 1, names: [a]}\nports: [{number: 1, names: [a]}]\n"
    environ = {
        "RELAY_SIZE": "2",
        "RELAY_MAIN_PORT__NUMBER": "3",
        "RELAY_PORTS__0__NAMES": "[b, c]",
        "RELAY_PORTS__0__NAMES__1": "d",
        "RELAY_PORTS__1__NUMBER": "4",
    }
    source = read_text(tmp_path, text, environ)
    assert source.tree == {
        "size": 2,
        "main_port": {"number": 3, "names": ["a"]},
        "ports": [{"number": 1, "names": ["b", "d"]}, {"number": 4}],
    }
    assert source.problems == []
    assert source.origin(("size",)) == "RELAY_SIZE"
    assert source.origin(("main_port", "names", 0)) == f"{tmp_path / 'relay.yaml'}:2"
    assert source.origin(("ports", 0, "names", 0)) == "RELAY_PORTS__0__NAMES"
    assert source.origin(("ports", 0, "names", 1)) == "RELAY_PORTS__0__NAMES__1"


def test_a_variable_for_a_part_is_applied_after_the_one_for_the_whole() -> None:
    environ = {"RELAY_PORTS__0__NUMBER": "9", "RELAY_PORTS": "[{number: 1, names: [a]}, {number: 2}]"}
    assert read(None, environ, Tree).tree == {"ports": [{"number": 9, "names": ["a"]}, {"number": 2}]}


def test_a_variable_fills_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    source = read_text(
        tmp_path, "main_port:\nports:\n", {"RELAY_MAIN_PORT__NUMBER": "3", "RELAY_PORTS__0__NUMBER": "4"}
    )
    assert source.tree == {"main_port": {"number": 3}, "ports": [{"number": 4}]}


def test_a_variable_leaves_a_value_of_another_kind_to_the_check_of_the_tree(tmp_path: Path) -> None:
    environ = {"RELAY_MAIN_PORT__NUMBER": "3", "RELAY_PORTS__0__NUMBER": "4", "RELAY_PORTS__0__NAMES__0": "a"}
    source = read_text(tmp_path, "main_port: 5\nports: none\n", environ)
    assert source.tree == {"main_port": 5, "ports": "none"}
    assert source.problems == []


def test_a_variable_that_is_no_yaml_is_taken_as_text() -> None:
    assert read(None, {"RELAY_SIZE": "[::1]:8080"}, Tree).tree == {"size": "[::1]:8080"}
    assert read(None, {"RELAY_SIZE": "2020-13-45"}, Tree).tree == {"size": "2020-13-45"}


def test_an_index_beyond_the_end_is_a_problem() -> None:
    source = read(None, {"RELAY_PORTS__1": "{number: 1}"}, Tree)
    assert only_problem(source) == Problem(
        "ports[1]",
        "{'number': 1}",
        "skips an index: there are 0 entries, so the next index is 0",
        "RELAY_PORTS__1",
    )
    source = read(None, {"RELAY_PORTS__0__NUMBER": "1", "RELAY_PORTS__2__NUMBER": "1"}, Tree)
    assert "there are 1 entries, so the next index is 1" in only_problem(source).message


def test_an_empty_variable_is_a_problem() -> None:
    source = read(None, {"RELAY_SIZE": " "}, Tree)
    assert only_problem(source) == Problem(
        "size", None, "is empty: unset it, or give it a value (null for none)", "RELAY_SIZE"
    )
    assert source.tree == {}


def test_a_key_given_twice_in_a_variable_is_a_problem() -> None:
    source = read(None, {"RELAY_PORTS": "[{number: 1, number: 2}]"}, Tree)
    assert str(only_problem(source)) == "ports[0].number: is given twice (RELAY_PORTS)"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("RELAY_SIZ", "did you mean RELAY_SIZE?"),
        ("RELAY_size", "did you mean RELAY_SIZE?"),
        ("RELAY_MAIN_PORT_NUMBER", "did you mean RELAY_MAIN_PORT__NUMBER?"),
        ("RELAY_PORTS__3__NUMBR", "did you mean RELAY_PORTS__3__NUMBER?"),
        ("RELAY_PORTS__03__NUMBER", "did you mean RELAY_PORTS__03__NUMBER?"),
        ("RELAY_SIZE__X", "did you mean RELAY_SIZE?"),
        ("RELAY_SIZE__0", "did you mean RELAY_SIZE?"),
        ("RELAY_QQQQQQQQQQQQQ", "write RELAY_<SECTION>__<KEY>"),
        ("RELAY_SERVICE_HOST", "Kubernetes"),
        ("RELAY_SERVICE_PORT_HTTP", "Kubernetes"),
        ("RELAY_PORT_8080_TCP_ADDR", "Kubernetes"),
        ("RELAY_ADMIN_PORT", "Kubernetes"),
    ],
)
def test_an_unknown_variable_is_a_problem_that_does_not_repeat_its_value(name: str, hint: str) -> None:
    source = read(None, {name: "s3cret"}, Tree)
    problem = only_problem(source)
    assert (problem.key, problem.value, problem.origin) == (name, None, "environment")
    assert problem.message.startswith("is not a setting; ")
    assert hint in problem.message
    assert source.tree == {}


def test_keys_are_written_for_people_and_for_the_environment() -> None:
    assert dotted(("ports", 0, "number")) == "ports[0].number"
    assert dotted(("a b\n", "c-d")) == r"'a b\n'.c-d"
    assert variable(("ports", 0, "number")) == "RELAY_PORTS__0__NUMBER"


def test_the_keys_and_types_of_a_tree_are_known() -> None:
    assert list(keys(Tree)) == [
        ("size",),
        ("ports", 0, "number"),
        ("ports", 0, "names"),
        ("main_port", "number"),
        ("main_port", "names"),
        ("spare_port", "number"),
        ("spare_port", "names"),
    ]
    assert annotation_at(Tree, ("ports", 7, "number")) is int
    assert annotation_at(Tree, ("ports", 7, "names", 0)) is str
    assert annotation_at(Tree, ("main_port",)) is Port
    assert annotation_at(Tree, ("spare_port",)) is Port
    assert annotation_at(Tree, ("spare_port", "number")) is int
    for key in [("other",), ("size", 0), ("size", "a"), ("ports", "number"), ("ports", 0, 0)]:
        assert annotation_at(Tree, key) is None


def test_a_section_comes_from_where_it_was_given_or_its_first_key(tmp_path: Path) -> None:
    text = "size: 1\nmain_port:\n  number: 1\n"
    environ = {"RELAY_SPARE_PORT__NUMBER": "2", "RELAY_PORTS": "[{number: 3}]"}
    source = read_text(tmp_path, text, environ)
    assert source.origin_of_section(("main_port",)) == f"{tmp_path / 'relay.yaml'}:2"
    assert source.origin_of_section(("spare_port",)) == "RELAY_SPARE_PORT__NUMBER"
    assert source.origin_of_section(("ports", 0)) == "RELAY_PORTS"
    assert Source().origin_of_section(("main_port",)) == "default"


def test_a_value_is_shown_as_one_short_line_without_credentials() -> None:
    assert show("a\nb\x1b[0m") == r"'a\nb\x1b[0m'"
    assert show("http://me:key@host/") == "'http://***@host/'"
    assert show(["-----BEGIN RSA PRIVATE KEY-----\nMIIE"]) == "['-----BEGIN RSA PRIVATE KEY-----***"
    assert show("x" * 500) == f"'{'x' * 99}..."


def test_a_hint_names_the_closest_or_all() -> None:
    assert closest("addres", ["address", "wires"]) == "did you mean address?"
    assert closest("zzz", ["address", "wires"]) == "known here: address, wires"


def test_the_error_shows_one_problem_a_line() -> None:
    problems = (
        Problem("size", "'x'", "must be a number", "relay.yaml:1"),
        Problem("", None, "is bad", "relay.yaml"),
    )
    error = SettingsError(problems)
    assert error.problems == problems
    assert str(error) == "size = 'x': must be a number (relay.yaml:1)\nrelay.yaml: is bad"
