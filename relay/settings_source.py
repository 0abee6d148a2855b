"""Where settings come from: a YAML file and RELAY_ environment variables, merged, each value with its origin.

Nothing here knows a single setting. The tree's shape is read from the pydantic model that `read` is given.
Values of unknown keys and variables are never repeated in a problem: they may be secrets.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

PREFIX = "RELAY_"
CONFIG_VARIABLE = "RELAY_CONFIG"
"""The one RELAY_ variable that is no setting: the command line's path of the settings file."""

Key = tuple[str | int, ...]

#: The keys that a problem is about, the first one reported; the value; what is wrong and what would be right.
Found = tuple[tuple[Key, ...], str, str]

# What Kubernetes puts into every container of a namespace that has a Service named relay or relay-*.
_SERVICE_LINK = re.compile(
    r"RELAY_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)\w*)?)"
)
_USERINFO = re.compile(r"//[^/@\s]*@")
_PRIVATE_KEY = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*", re.DOTALL)
_LONGEST_VALUE = 100
_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the dotted key, the value as printable text, the reason, and the origin.

    `value` is None where there is none, or where it may be a secret.
    """

    key: str
    value: str | None
    message: str
    origin: str

    def __str__(self) -> str:
        subject = self.key if self.value is None else f"{self.key} = {self.value}"
        return f"{subject}: {self.message} ({self.origin})" if subject else f"{self.origin}: {self.message}"


class SettingsError(Exception):
    """The settings cannot be used; `problems` holds every reason that was found. str() gives one per line."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


@dataclass(slots=True)
class Source:
    """The merged input: plain lists, mappings and scalars, the origin of each key, and what was wrong so far.

    `complete` is False when the file could not be read: a check that compares two keys would then mislead.
    """

    tree: dict[Any, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True

    def origin(self, key: Key) -> str:
        """Where the value of `key` was given: "file:line", a variable's name, or "default"."""
        if not _holds(self.tree, key):
            return "default"
        while key not in self.origins and key:
            key = key[:-1]
        return self.origins.get(key, "default")

    def origin_of_section(self, key: Key) -> str:
        """Where the section at `key` was given: as a whole, or else the first of the keys in it."""
        inside = (origin for known, origin in self.origins.items() if known[: len(key)] == key)
        return next(inside, None) or self.origin(key)


def read(path: Path | None, environ: Mapping[str, str], schema: type[BaseModel]) -> Source:
    """Merge the file at `path` (None: no file) with the variables of `environ`; a variable wins.

    Bad input raises nothing: it is in the result's `problems`.
    """
    source = Source()
    if path is not None:
        _read_file(path, source)
    _read_environ(environ, schema, source)
    return source


def dotted(key: Key) -> str:
    """Write a key as people do: ("listeners", 0, "address") is "listeners[0].address"."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if re.fullmatch(r"[\w-]+", part) else repr(part))
    return text


def variable(key: Key) -> str:
    """The environment variable of a key: ("listeners", 0, "address") is RELAY_LISTENERS__0__ADDRESS."""
    return PREFIX + "__".join(str(part).upper() for part in key)


def show(value: object) -> str:
    """A value as one short line without control characters, the credentials of a URL, and a private key."""
    text = _PRIVATE_KEY.sub(r"\1***", _USERINFO.sub("//***@", repr(value)))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def annotation_at(schema: type[BaseModel], key: Key) -> Any:
    """The type that `schema` declares for `key`, or None when there is no such key."""
    declared: Any = schema
    for part in key:
        if isinstance(part, int):
            declared = get_args(declared)[0] if get_origin(declared) is tuple else None
        elif isinstance(declared, type) and issubclass(declared, BaseModel) and part in declared.model_fields:
            declared = declared.model_fields[part].annotation
        else:
            return None
        declared = _present(declared)
    return declared


def _present(declared: Any) -> Any:
    """`X` for `X | None`: what is declared for a value that is there."""
    if get_origin(declared) not in (Union, UnionType):
        return declared
    present = [choice for choice in get_args(declared) if choice is not NoneType]
    return present[0] if len(present) == 1 else declared


def keys(schema: type[BaseModel], prefix: Key = ()) -> Iterator[Key]:
    """Every key of `schema` that holds a value and not a section, with index 0 for a list of sections."""
    for name in schema.model_fields:
        key = (*prefix, name)
        for candidate in (key, (*key, 0)):
            declared = annotation_at(schema, candidate[len(prefix) :])
            if isinstance(declared, type) and issubclass(declared, BaseModel):
                yield from keys(declared, candidate)
                break
        else:
            yield key


def closest(name: str, known: list[str]) -> str:
    """A hint for an unknown name: the known one it resembles, or all of them when it resembles none."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {matches[0]}?" if matches else f"known here: {', '.join(known)}"


def _holds(tree: Any, key: Key) -> bool:
    for part in key:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _read_file(path: Path, source: Source) -> None:
    try:
        tree, lines, duplicates = _parse(path.read_bytes())
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except yaml.YAMLError as error:
        fault = f"is not valid YAML: {_explain(error)}"
    except (ValueError, RecursionError) as error:
        fault = f"is not valid YAML: {error}"
    else:
        source.origins |= {key: f"{path}:{line}" for key, line in lines.items()}
        source.problems += (_duplicate(key, f"{path}:{line}") for key, line in duplicates)
        if tree is None or isinstance(tree, dict):
            source.tree = tree or {}
            return
        fault = f"must hold a mapping of sections such as `upstream:` at its top level, not {show(tree)}"
    source.problems.append(Problem("", None, fault, str(path)))
    source.complete = False


def _read_environ(environ: Mapping[str, str], schema: type[BaseModel], source: Source) -> None:
    known: dict[Key, str] = {}
    for name in sorted(environ):
        if name == CONFIG_VARIABLE or not name.startswith(PREFIX):
            continue
        key = _key(name, schema)
        if key is None:
            source.problems.append(Problem(name, None, _unknown_variable(name, schema), "environment"))
        elif not environ[name].strip():
            message = "is empty: unset it, or give it a value (null for none)"
            source.problems.append(Problem(dotted(key), None, message, name))
        else:
            known[key] = name
    for key, name in sorted(
        known.items()
    ):  # a section or list comes before the variables that change parts of it
        _apply(source, key, name, environ[name])


def _apply(source: Source, key: Key, name: str, text: str) -> None:
    try:
        value, _, duplicates = _parse(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value, duplicates = (
            text,
            [],
        )  # [::1]:8080 is an address and no YAML: the field's own check has the say
    source.problems += (_duplicate((*key, *below), name) for below, _ in duplicates)
    for known in [known for known in source.origins if known[: len(key)] == key]:
        del source.origins[known]
    source.origins[key] = name
    node: Any = source.tree
    for part, following in pairwise(key):
        absent = not _holds(node, (part,)) or node[part] is None
        if absent and not _put(node, part, [] if isinstance(following, int) else {}):
            break
        node = node[part]
    if not _put(node, key[-1], value) and isinstance(node, list):
        message = f"skips an index: there are {len(node)} entries, so the next index is {len(node)}"
        source.problems.append(Problem(dotted(key), show(value), message, name))


def _put(node: Any, part: str | int, value: object) -> bool:
    """Set one entry. False when it does not fit: an index with a gap, or another kind of value is there."""
    if isinstance(node, dict) and isinstance(part, str):
        node[part] = value
    elif isinstance(node, list) and isinstance(part, int) and part <= len(node):
        node[part : part + 1] = [value]
    else:
        return False
    return True


def _key(name: str, schema: type[BaseModel]) -> Key | None:
    parts = name.removeprefix(PREFIX).split("__")
    key = tuple(int(part) if re.fullmatch(r"[0-9]{1,4}", part, re.ASCII) else part.lower() for part in parts)
    return key if variable(key) == name and annotation_at(schema, key) is not None else None


def _unknown_variable(name: str, schema: type[BaseModel]) -> str:
    if _SERVICE_LINK.fullmatch(name):
        return (
            "is not a setting; it looks like a variable that Kubernetes makes for a Service named relay:"
            " set enableServiceLinks: false in the pod's spec"
        )
    index = re.search(r"__(\d+)__", name)
    known = [variable(key) for key in keys(schema)]
    if index:
        known = [variable_name.replace("__0__", index[0]) for variable_name in known]
    matches = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {matches[0]}?"
        if matches
        else "write RELAY_<SECTION>__<KEY>, such as RELAY_UPSTREAM__URL"
    )
    return f"is not a setting; {hint}"


def _duplicate(key: Key, origin: str) -> Problem:
    return Problem(dotted(key), None, "is given twice", origin)


def _parse(text: str | bytes) -> tuple[Any, dict[Key, int], list[tuple[Key, int]]]:
    """The value of one YAML document, the line of each key, and each key given twice with its line.

    Raises yaml.YAMLError, ValueError (no such date), or RecursionError (nested too deeply).
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}, []
        lines: dict[Key, int] = {}
        duplicates: list[tuple[Key, int]] = []
        _survey(node, (), lines, duplicates, set())
        return loader.construct_document(node), lines, duplicates
    finally:
        loader.dispose()


def _survey(
    node: yaml.Node, key: Key, lines: dict[Key, int], duplicates: list[tuple[Key, int]], seen: set[int]
) -> None:
    if id(node) in seen:  # an alias; one that contains itself must not be walked for ever
        return
    seen.add(id(node))
    children: list[tuple[Key, int, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != _MERGE:
                name.tag = _TEXT  # `on:` and `1:` are keys like any other, not True and the number 1
        children = [((*key, str(name.value)), name.start_mark.line + 1, child) for name, child in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [
            ((*key, index), child.start_mark.line + 1, child) for index, child in enumerate(node.value)
        ]
    for below, line, child in children:
        if below in lines:
            duplicates.append((below, line))
        lines[below] = line
        _survey(child, below, lines, duplicates, seen)


def _explain(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    context = f"{error.context}, " if error.context else ""
    return f"{context}{error.problem}, at line {mark.line + 1}, column {mark.column + 1}"
