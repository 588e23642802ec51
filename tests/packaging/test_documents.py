"""What the documents promise is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from exported import exported_families

import cluster
from mnemosyned.commands import help_text
from mnemosyned.config.help import flag_table
from mnemosyned.settings import SECTIONS, parse
from mnemosyned.storage.postgres.config import PostgresConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MONITORING = (ROOT / "docs" / "monitoring.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_LINES = 200
# What a foreign engineer has to read twice, and our own words for what has a name in the field.
BANNED = (
    "whoever",
    "nobody",
    "somebody",
    "for ever",
    "anew",
    "lest",
    "likewise",
    "be it that",
    "operator's",
    "untold",
    "absent",
    "absence",
    "lane",
    "lanes",
    "away",
    "stands? still",
    "stood still",
    "in order",
    "no good",
    "(?:is|are|all|not|be) well",
)
SUFFIXES = {"counter": "_total", "info": "_info"}
EXAMPLE = ROOT / "deploy" / "mnemosyned.toml"


def test_the_readmes_flag_table_is_that_of_the_parser() -> None:
    assert flag_table(SECTIONS) in (ROOT / "docs" / "flags.md").read_text(), "run `make docs`"


def test_the_readmes_example_is_the_one_that_is_run() -> None:
    code = (ROOT / "client" / "mnemosynerpc" / "example.py").read_text()
    shown = re.search(r"<!-- example: .*?```python\n(.*?)```", README, re.DOTALL)

    assert shown is not None
    assert shown[1] in code, "run `make docs`"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES


async def test_the_documented_metrics_are_all_that_are_exported() -> None:
    exported = {
        family.name + SUFFIXES.get(family.type, "")
        for family in await exported_families()
        if family.name.startswith(("mnemosyned_", "grpc_"))
    }
    documented = set(re.findall(r"`((?:mnemosyned|grpc)_[a-z_]+)`", MONITORING))

    assert documented == exported


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_between_the_documents_leads_somewhere(document: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", document.read_text()):
        path = document.parent / target if target else document
        assert path.exists(), target
        assert not heading or heading in headings(path), f"{target}#{heading}"


def headings(document: Path) -> set[str]:
    """The names by which links find the headings, as forges make them."""
    found = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_readme_links_to_every_document() -> None:
    linked = set(re.findall(r"\]\(([^)#:]+)", README))

    assert {str(path.relative_to(ROOT)) for path in DOCUMENTS} - {"README.md"} <= linked


def words_of(name: str) -> str:
    """What a document says itself: not what it shows of another file, nor of a program's output."""
    text = (ROOT / name).read_text() if name != "--help" else help_text()
    # The example is the client's own; the flags are those of --help.
    text = re.sub(r"<!-- (?:flags|example): .*?<!-- end -->", "", text, flags=re.DOTALL)
    # Names, some of which are only told as former ones.
    return re.sub(r"`[^`\n]+`", "", text)


@pytest.mark.parametrize("name", [*(str(path.relative_to(ROOT)) for path in DOCUMENTS), "--help"])
def test_no_document_has_a_word_that_the_house_bans(name: str) -> None:
    # A sentence may go on in the next line.
    text = " ".join(words_of(name).split())

    found = re.findall(rf".{{0,30}}\b(?:{'|'.join(BANNED)})\b.{{0,30}}", text, re.IGNORECASE)
    assert found == []


def test_every_module_is_in_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for package in ("mnemosyned", "cluster", "cache", "http2", "aio"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.name == "__init__.py" or path.name in text, path


def test_the_map_of_the_cluster_has_each_of_its_modules_and_no_other_name() -> None:
    modules = {path.stem for path in (ROOT / "cluster").glob("*.py")} - {"__init__"}
    in_sequence = re.findall(r"^\d+\. .+(?:\n {3,}.+)*", cluster.__doc__ or "", re.MULTILINE)
    code = "\n".join((ROOT / "cluster" / f"{module}.py").read_text() for module in modules)

    assert modules == {name for line in in_sequence for name in re.findall(r"`(\w+)`", line)}
    for name in re.findall(r"`([\w.]+)`", cluster.__doc__ or ""):
        assert name in modules or re.search(rf"\b{name.rpartition('.')[2]}\b", code), name


def test_the_example_configuration_is_valid_and_shows_only_real_flags() -> None:
    assert parse([f"-config={EXAMPLE}"], {})[PostgresConfig].schema == "mnemosyne"
    assert tomllib.loads(EXAMPLE.read_text())


def test_every_make_target_is_in_its_help() -> None:
    out = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    text = (ROOT / "Makefile").read_text()
    declared = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)

    assert declared is not None
    assert {line.split()[0] for line in out.splitlines() if line.startswith("  ")} == set(declared[1].split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_in_the_documents_exist(document: Path) -> None:
    text = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", document.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", text, re.MULTILINE), target


def test_the_packages_versions_agree() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "mnemosyned", "-version"], check=True, capture_output=True, text=True
    ).stdout

    assert re.fullmatch(r"mnemosyned \d+\.\d+\.\d+\n", out)
