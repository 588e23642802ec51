from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from mnemosyned import __version__
from mnemosyned.observe import logs
from mnemosyned.observe.fingerprint import fingerprint


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    logging.raiseExceptions = True
    for name in ("aiocache", "asyncio", "asyncpg", "grpc"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def configured(environment: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    logs.configure(environment, level, stream=stream)
    return stream


log = logging.getLogger("mnemosyned.example")


def test_production_writes_one_json_object_a_line() -> None:
    stream = configured("production")
    log.info("session_started", extra={"peer": "1.2.3.4", "elapsed_ms": 1.5})
    log.warning("count is %d", 3)

    first, second = map(json.loads, stream.getvalue().splitlines())
    assert list(first)[:4] == ["ts", "level", "logger", "msg"]
    assert (first["level"], first["logger"], first["msg"]) == (
        "info",
        "mnemosyned.example",
        "session_started",
    )
    assert (first["peer"], first["elapsed_ms"]) == ("1.2.3.4", 1.5)
    assert first["ts"].endswith("Z")
    assert second["msg"] == "count is 3"


def test_stackdriver_uses_googles_names() -> None:
    stream = configured("stackdriver", "debug")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "event")

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["severity"] for line in lines] == ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    assert lines[0]["message"] == "event"
    assert lines[0]["eventTime"].endswith("Z")
    assert lines[0]["serviceContext"] == {"service": "mnemosyned", "version": __version__}


def test_development_is_for_people() -> None:
    stream = configured("development")
    log.info("session_started", extra={"peer": "1.2.3.4"})

    assert "session_started" in stream.getvalue()
    assert "peer=1.2.3.4" in stream.getvalue()
    assert "\x1b[" not in stream.getvalue()


@pytest.mark.parametrize("environment", ["production", "stackdriver"])
def test_a_traceback_stays_on_its_line(environment: str) -> None:
    stream = configured(environment)
    try:
        int("a bug")
    except ValueError:
        log.exception("failed")

    (line,) = stream.getvalue().splitlines()
    assert "ValueError: invalid literal" in json.loads(line)["exception"]


@pytest.mark.parametrize("environment", ["production", "development", "stackdriver"])
def test_fields_that_are_secrets_are_hidden(environment: str) -> None:
    stream = configured(environment)
    names = ("token", "access_token", "refresh_token", "bag", "dsn", "password", "authorization")
    log.info("event", extra=dict.fromkeys(names, "hunter2"))

    assert "hunter2" not in stream.getvalue()


@pytest.mark.parametrize(
    ("level", "written"),
    [("debug", 5), ("info", 4), ("warn", 3), ("error", 2), ("dpanic", 1), ("panic", 1), ("fatal", 1)],
)
def test_levels_have_the_names_of_the_go_daemon(level: str, written: int) -> None:
    stream = configured("production", level)
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(number, "event")

    assert len(stream.getvalue().splitlines()) == written


def test_libraries_that_log_keys_are_kept_quiet() -> None:
    stream = configured("production", "debug")
    logging.getLogger("aiocache.base").debug("GET hunter2")

    assert stream.getvalue() == ""


def test_warnings_are_logged() -> None:
    stream = configured("production")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("odd", stacklevel=1)

    assert "odd" in stream.getvalue()


def test_a_closed_stream_takes_nothing_down(capsys: pytest.CaptureFixture[str]) -> None:
    configured("production").close()
    log.error("nobody hears")

    assert capsys.readouterr().err == ""


def test_a_fingerprint_names_a_token_without_revealing_it() -> None:
    assert fingerprint("token") == fingerprint("token")
    assert fingerprint("token") != fingerprint("other")
    assert len(fingerprint("token")) == 12


HOSTILE = "a\x00\x1b[31m\x7f\x85\x9b31m\u202e\u2028\u2029\u200b\ufeff\ud800\U000e0041\r\n{forged}\t"


@pytest.mark.parametrize("environment", ["production", "development", "stackdriver"])
def test_no_field_forges_a_line_or_drives_a_terminal(environment: str) -> None:
    stream = configured(environment)
    log.info("event", extra={"text": HOSTILE, "list": [HOSTILE], "error": OSError(HOSTILE), "n": 1})
    log.info("of a library: %s", HOSTILE)

    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("environment", ["production", "development", "stackdriver"])
def test_the_text_of_an_error_forges_no_line(environment: str) -> None:
    stream = configured(environment)
    log.error("failed", exc_info=ValueError(HOSTILE))

    first, *others = stream.getvalue().splitlines()
    assert all(line.isprintable() for line in (first, *others))
    assert all(line.startswith("    | ") for line in others)
