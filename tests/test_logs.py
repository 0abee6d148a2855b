"""What a line of the log looks like, which lines are written, and what a hostile value cannot do."""

import asyncio
import io
import json
import logging
import timeit
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog
from gunicorn.config import Config
from gunicorn.glogging import Logger as GunicornLogger
from hypothesis import given
from hypothesis import strategies as st

from relay import logs
from relay.settings import Log

Format = Literal["json", "console"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging is of the whole process: leave it as it was found."""
    loggers = [logging.getLogger(name) for name in (None, "gunicorn.error", "gunicorn.access")]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    structlog.reset_defaults()
    for logger, handlers, level, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def configured(log: Log, stream: io.StringIO | None = None) -> io.StringIO:
    stream = io.StringIO() if stream is None else stream
    logs.configure(log, stream)
    return stream


def entries(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail() -> None:
    password = "s3cret"  # a local variable, which must not be written
    raise ValueError(f"{len(password)} went wrong\n2026-01-01T00:00:00Z [info     ] forged")


def test_a_line_is_one_json_object() -> None:
    stream = configured(Log(format="json"))
    structlog.get_logger("relay.app").info("started", workers=2, address="0.0.0.0:8080")
    [entry] = entries(stream)
    assert list(entry) == ["timestamp", "level", "event", "logger", "workers", "address"]
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {
        "level": "info",
        "event": "started",
        "logger": "relay.app",
        "workers": 2,
        "address": "0.0.0.0:8080",
    }


def test_a_line_is_for_people_on_the_console() -> None:
    stream = configured(Log(format="console"))
    structlog.get_logger("relay.app").warning("upstream is down", attempt=3, reason="connection refused")
    time, rest = stream.getvalue().split(" ", 1)
    assert time.endswith("Z")
    assert rest.split() == [
        *("[warning", "]", "upstream", "is", "down", "[relay.app]"),
        *("attempt=3", "reason='connection", "refused'"),
    ]


def test_auto_is_console_on_a_terminal_and_json_elsewhere() -> None:
    terminal = configured(Log(), Terminal())
    structlog.get_logger("a").info("hello")
    assert "\x1b[" in terminal.getvalue()
    assert "hello" in terminal.getvalue()
    elsewhere = configured(Log())
    structlog.get_logger("b").info("hello")
    assert entries(elsewhere)[0]["event"] == "hello"


def test_colours_are_for_terminals() -> None:
    stream = configured(Log(format="console"))
    structlog.get_logger("a").info("hello")
    assert "\x1b" not in stream.getvalue()


def test_standard_error_is_the_stream_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Log(format="json"))
    structlog.get_logger("a").info("hello")
    out, err = capsys.readouterr()
    assert (out, json.loads(err)["event"]) == ("", "hello")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_lines_below_the_level_are_left_out(level: Literal["debug", "info", "warning", "error"]) -> None:
    stream = configured(Log(level=level, format="json"))
    names = ["debug", "info", "warning", "error"]
    for logger in (structlog.get_logger("relay.a"), logging.getLogger("asyncio")):
        for name in names:
            getattr(logger, name)("hello")
    written = names[names.index(level) :]
    assert [entry["level"] for entry in entries(stream)] == written * 2


def test_a_disabled_line_costs_next_to_nothing() -> None:
    stream = configured(Log(format="json"))
    log = structlog.get_logger("a")
    log.info("first")
    rounds = 10_000
    assert min(timeit.repeat(lambda: log.debug("x", a=1, b=2), number=rounds, repeat=3)) / rounds < 20e-6
    assert len(entries(stream)) == 1


@pytest.mark.parametrize("name", ["gunicorn.error", "gunicorn.access", "asyncio", "aiohttp.server"])
def test_the_standard_library_writes_in_the_same_form(name: str) -> None:
    stream = configured(Log(format="json"))
    logging.getLogger(name).warning("Listening at: %s", "http://0.0.0.0:8080")
    [entry] = entries(stream)
    assert list(entry) == ["timestamp", "level", "event", "logger"]
    assert (entry["level"], entry["logger"]) == ("warning", name)
    assert entry["event"] == "Listening at: http://0.0.0.0:8080"


def test_gunicorn_leaves_its_lines_to_the_one_handler() -> None:
    stream = configured(Log(format="json"))
    config = Config()
    config.set("errorlog", None)
    logger = GunicornLogger(config)
    logger.info("Starting gunicorn %s", "27")
    logger.reopen_files()
    logger.close_on_exec()
    logger.setup(config)
    logger.error("again")
    assert [entry["event"] for entry in entries(stream)] == ["Starting gunicorn 27", "again"]


def test_a_loop_that_catches_an_error_reports_it_in_the_same_form() -> None:
    stream = configured(Log(format="json"))
    loop = asyncio.new_event_loop()
    loop.call_soon(fail)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    [entry] = entries(stream)
    assert entry["logger"] == "asyncio"
    assert entry["exception"][0]["exc_type"] == "ValueError"


def test_to_configure_again_replaces_the_first() -> None:
    first, second = configured(Log(format="json")), configured(Log(format="json"))
    structlog.get_logger("a").info("hello")
    logging.getLogger("gunicorn.error").info("hello")
    assert first.getvalue() == ""
    assert len(entries(second)) == 2


def test_an_exception_is_structured_in_json() -> None:
    stream = configured(Log(format="json"))
    try:
        fail()
    except ValueError:
        structlog.get_logger("a").exception("failed", call=7)
    [entry] = entries(stream)
    assert (entry["level"], entry["event"], entry["call"]) == ("error", "failed", 7)
    [exception] = entry["exception"]
    assert exception["exc_type"] == "ValueError"
    assert exception["frames"][-1]["name"] == "fail"
    assert "s3cret" not in stream.getvalue()


@pytest.mark.parametrize("form", ["json", "console"])
def test_an_exception_that_is_over_can_be_written(form: Format) -> None:
    stream = configured(Log(format=form))
    with pytest.raises(ValueError, match="went wrong") as raised:
        fail()
    caught = raised.value
    structlog.get_logger("a").error("failed", exc_info=caught)
    logging.getLogger("asyncio").error("failed", exc_info=(type(caught), caught, caught.__traceback__))
    assert stream.getvalue().count(": 6 went wrong" if form == "console" else "6 went wrong") == 2


def test_an_exception_is_indented_under_its_line_on_the_console() -> None:
    stream = configured(Log(format="console"))
    try:
        fail()
    except ValueError:
        structlog.get_logger("a").exception("failed")
        logging.getLogger("asyncio").exception("failed")
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if not line.startswith("    ")] == [lines[0], lines[len(lines) // 2]]
    assert "    2026-01-01T00:00:00Z [info     ] forged" in lines
    assert "s3cret" not in stream.getvalue().replace('password = "s3cret"', "")


class Sly:
    """An object whose repr is hostile."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


@pytest.mark.parametrize("form", ["json", "console"])
@given(
    text=st.text(
        alphabet=st.one_of(st.sampled_from("\n\r\x0b\x0c\x1b\x85\u2028\u202e\x00 '=a"), st.characters())
    )
)
def test_no_value_forges_a_line(form: Format, text: str) -> None:
    stream = configured(Log(format=form))
    structlog.get_logger("a").info(
        text, field=text, nested={text: [text]}, sly=Sly(text), many=[Sly(text)], **{f"k{text}": text}
    )
    logging.getLogger("asyncio").info("%s", text)
    written = stream.getvalue()
    lines = written.split("\n")
    assert lines.pop() == ""
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    if form == "json":
        first, second = map(json.loads, lines)
        assert (first["event"], first["field"], second["event"]) == (text, text, text)


@pytest.mark.parametrize("value", [float("nan"), {b"key": 1}, {("a",): 1}, b"\xff", object])
def test_a_value_that_json_does_not_know_is_written_as_text(value: object) -> None:
    stream = configured(Log(format="json"))
    structlog.get_logger("a").info("hello", value=value)
    assert entries(stream)[0]["value"] == repr(value)


def test_a_value_that_contains_itself_is_still_a_line() -> None:
    endless: list[Any] = []
    endless.append(endless)
    stream = configured(Log(format="json"))
    structlog.get_logger("a").info("hello", value=endless)
    assert entries(stream)[0]["event"] == "hello"


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("name", sorted(logs.MASKED))
def test_credentials_are_never_written(form: Format, name: str) -> None:
    stream = configured(Log(format=form))
    log = structlog.get_logger("a")
    log.info("field", **{name: "s3cret"})
    log.info("keyword", **{name.replace("-", "_"): b"s3cret"})
    log.info("mapping", headers={name.title(): "s3cret", "accept": "a"})
    log.info("pairs", headers=[(name.upper().encode(), b"s3cret"), (b"accept", b"b")])
    log.info("pair", header=(name, "s3cret"))
    log.info("deep", call={"request": {"headers": {(name, ("s3cret",))}}})
    written = stream.getvalue()
    assert "s3cret" not in written
    assert written.count("***") == 6
    assert written.count("accept") == 2


def test_other_fields_are_written() -> None:
    stream = configured(Log(format="json"))
    structlog.get_logger("a").info("hello", flwr_public_key="k", authorized=True, pair=["a", "b"])
    entry = entries(stream)[0]
    assert (entry["flwr_public_key"], entry["authorized"], entry["pair"]) == ("k", True, ["a", "b"])
