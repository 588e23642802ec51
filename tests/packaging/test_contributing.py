"""CONTRIBUTING.md adds a storage engine `toy`: here in a copy of the sources, to the letter.

The document names the file of each block of code in the words before the block:

- "New file `path`:" the block is the file.
- "In `path`:" the block is a diff. Its places are divided by @@, and the lines that are there already
  must be in the file exactly once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grpc
import pytest
from mnemosynerpc.session_pb2 import AbandonRequest, GetRequest, Session, StartRequest
from processes import Daemon, mnemosyned
from secrecy import CANARY

from mnemosyned.storage.engines import ENGINES

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = (ROOT / "CONTRIBUTING.md").read_text()
# For make: the environment is there already, and none may be made for the copy.
IN_COPY: Final = ("--old-file=.venv/dev.stamp", f"BIN={Path(sys.executable).parent}")
NEW: Final = StartRequest(session=Session(subject_id="user:1", bag={"k": CANARY}))


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Yield the words before each block of this language, and the block."""
    section = DOCUMENT.partition("\n## Adding a storage engine\n")[2].partition("\n## ")[0]
    words, *rest = re.split(r"^```(\w*)\n", section, flags=re.MULTILINE)
    # The words before a block, its language, the block, and an empty language at its end.
    for begins, code, after in zip(rest[::4], rest[1::4], rest[3::4], strict=True):
        if begins == language:
            yield " ".join(words.split()), code
        words = after


def write_files(copy: Path) -> None:
    for words, code in blocks("python"):
        named = re.search(r"New file `([^`]+)`:$", words)
        assert named is not None, f"no file is named before this block: {words}"
        path = copy / named[1]
        assert not path.exists()
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)


def edit_files(copy: Path) -> None:
    for words, diff in blocks("diff"):
        named = re.search(r"In `([^`]+)`:$", words)
        assert named is not None, f"no file is named before this block: {words}"
        path = copy / named[1]
        for place in diff.split("@@\n"):
            edit(path, place.splitlines(keepends=True))


def edit(path: Path, place: list[str]) -> None:
    # Whole lines: a newline in front, and one behind.
    before = "\n" + "".join(line[1:] or "\n" for line in place if not line.startswith("+"))
    after = "\n" + "".join(line[1:] or "\n" for line in place if not line.startswith("-"))
    text = "\n" + path.read_text()
    assert text.count(before) == 1, f"{path.name} does not have this place, or not once:{before}"
    path.write_text(text.replace(before, after)[1:])


@pytest.fixture(scope="module")
def with_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources to which the document has been applied."""
    copy = tmp_path_factory.mktemp("sources")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():  # it may be deleted, but not yet in a commit
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    write_files(copy)
    edit_files(copy)
    return copy


@pytest.fixture
def sources(with_toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the processes of a test import from the copy; the installed sources are on the path too."""
    monkeypatch.chdir(with_toy)
    monkeypatch.setenv("PYTHONPATH", f"{with_toy}{os.pathsep}{with_toy / 'client'}")
    # The coverage of a copy is none of the sources.
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    assert run(sys.executable, "-c", "import mnemosyned; print(mnemosyned.__file__)").startswith(
        str(with_toy)
    )
    return with_toy


def run(*command: str, within_s: float = 60) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=within_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_shown(beginning: str) -> str:
    """Run the line of the document that begins like this, with the Python and the tools of this run."""
    ((_, lines),) = blocks("sh")
    (line,) = [line for line in lines.splitlines() if line.startswith(beginning)]
    words = line.replace(".venv/bin/python", sys.executable).split()
    if words[0] == "make":
        words += IN_COPY
    return run(*words)


def test_every_directory_of_tests_is_in_the_table() -> None:
    directories = {
        f"tests/{path.relative_to(ROOT / 'tests').parts[0]}" for path in ROOT.glob("tests/*/**/*.py")
    }

    assert directories <= set(re.findall(r"`(tests/\w+)`", DOCUMENT))


def test_the_engine_passes_the_whole_contract_suite(sources: Path) -> None:
    suite = (sources / "tests" / "contract" / "test_store.py").read_text()
    out = run_shown(".venv/bin/python -m pytest")

    passed = "".join(re.findall(r"^([.]+) +\[", out, re.MULTILINE))
    assert len(passed) == len(re.findall(r"^async def test_\w+\(engine: Engine\)", suite, re.MULTILINE))


@pytest.mark.slow
# 25 s of a processor without a cache, and other tests have the processors too.
@pytest.mark.timeout(240)
def test_the_sources_still_pass_the_checks_of_style_types_and_imports(sources: Path) -> None:
    # `make check` but for the stubs, whose compiler would be fetched for the copy.
    run("make", "lint", "type", "imports", *IN_COPY, within_s=200)
    assert re.search(r"^    mnemosyned\.storage\.toy$", (sources / "setup.cfg").read_text(), re.MULTILINE)


def test_its_flags_are_in_help_and_in_the_readme(sources: Path) -> None:
    run_shown("make docs")
    code, out, _ = mnemosyned("-help")

    assert code == 0
    assert "\n  -toy.file\n" in out
    assert "toy (one node, a SQLite file)" in out
    assert "| `-toy.file` | `toy.db` | `MNEMOSYNED_TOY_FILE` |" in (sources / "docs" / "flags.md").read_text()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["-toy.timeout=soon"], "flag -toy.timeout: "),
        (["-toy.file=postgres://host/"], "flag -toy.file: "),
        (["-storage=etcd"], f"flag -storage: 'etcd' is not one of {', '.join(ENGINES)}, toy"),
        (["-cluster.seeds=10.0.0.1:8080"], "flag -storage: toy is for a single node"),
        (["-token.key.file=toy.key"], "flag -token.key.file: -storage=toy cannot hash tokens at rest"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_engine_cannot_do_is_refused_in_one_line(
    sources: Path, flags: list[str], complaint: str
) -> None:
    (sources / "toy.key").write_text(f"{CANARY}-a-key-for-the-toy-that-is-long-enough")
    code, out, err = mnemosyned("-check-config", "-storage=toy", *flags)

    assert (code, out) == (2, "")
    assert re.fullmatch(rf"mnemosyned: {re.escape(complaint)}.*\n", err)


@pytest.mark.usefixtures("sources")
def test_a_file_that_cannot_be_opened_is_refused_in_one_line() -> None:
    code, out, err = mnemosyned("-port=0", "-log.level=fatal", "-storage=toy", "-toy.file=/no/such/toy.db")

    assert (code, out) == (1, "")
    # With a level above that of an error, the reason is all that is logged.
    (line,) = err.splitlines()
    assert json.loads(line)["error"] == "flag -toy.file: /no/such/toy.db: unable to open database file"


def test_the_daemon_keeps_its_sessions_in_the_file_that_the_flag_names(sources: Path) -> None:
    flags = ("-storage=toy", f"-toy.file={sources / 'other.db'}")
    with Daemon(*flags) as daemon:
        with daemon.serving().stub() as stub:
            kept, ended = (stub.Start(NEW).session.access_token for _ in range(2))
            assert dict(stub.Get(GetRequest(access_token=kept)).session.bag) == {"k": CANARY}
            assert stub.Abandon(AbandonRequest(access_token=ended)).value
        assert daemon.stop() == 0
    assert '"storage": "toy"' in daemon.log

    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        assert stub.Get(GetRequest(access_token=kept)).session.subject_id == "user:1"
        with pytest.raises(grpc.RpcError) as caught:
            stub.Get(GetRequest(access_token=ended))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert not (sources / "toy.db").exists()
