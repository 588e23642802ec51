"""What the documents promise is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from exported import exported_families

from mnemosyned.config.help import flag_table
from mnemosyned.settings import SECTIONS, parse
from mnemosyned.storage.postgres.config import PostgresConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SUFFIXES = {"counter": "_total", "info": "_info"}
EXAMPLE = ROOT / "deploy" / "mnemosyned.toml"


def test_the_readmes_flag_table_is_that_of_the_parser() -> None:
    assert flag_table(SECTIONS) in README, "run `make docs`"


def test_the_readmes_example_is_the_one_that_is_run() -> None:
    code = (ROOT / "client" / "mnemosynerpc" / "example.py").read_text()
    shown = re.search(r"<!-- example: .*?```python\n(.*?)```", README, re.DOTALL)

    assert shown is not None
    assert shown[1] in code, "run `make docs`"


async def test_the_readmes_metrics_are_all_that_are_exported() -> None:
    exported = {
        family.name + SUFFIXES.get(family.type, "")
        for family in await exported_families()
        if family.name.startswith(("mnemosyned_", "grpc_"))
    }
    documented = set(re.findall(r"`((?:mnemosyned|grpc)_[a-z_]+)`", README.partition("## Watch it")[2]))

    assert documented == exported


def test_every_link_between_the_documents_leads_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_module_is_in_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for package in ("mnemosyned", "cluster", "cache", "aio"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.name == "__init__.py" or path.name in text, path


def test_the_example_configuration_is_valid_and_shows_only_real_flags() -> None:
    assert parse([f"-config={EXAMPLE}"], {})[PostgresConfig].schema == "mnemosyne"
    assert tomllib.loads(EXAMPLE.read_text())


def test_every_make_target_is_in_its_help() -> None:
    out = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    text = (ROOT / "Makefile").read_text()
    declared = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)

    assert declared is not None
    assert {line.split()[0] for line in out.splitlines() if line.startswith("  ")} == set(declared[1].split())


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_in_the_documents_exist(document: str) -> None:
    text = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", text, re.MULTILINE), target


def test_the_packages_versions_agree() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "mnemosyned", "-version"], check=True, capture_output=True, text=True
    ).stdout

    assert re.fullmatch(r"mnemosyned \d+\.\d+\.\d+\n", out)
