"""`mnemosyned check`: damaged sessions are found, named without their tokens, and removed on demand."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest
from processes import mnemosyned
from secrecy import CANARY

from mnemosyned.sessions import bag

TABLE = "mnemosyne.session"
FORGED = bag.encode({"k": "v"}) + b"\x12\x05ADMIN"


async def insert(dsn: str, rows: dict[bytes, bytes]) -> None:
    # The command has made the table.
    connection = await asyncpg.connect(dsn)
    await connection.executemany(
        f"INSERT INTO {TABLE} (access_token, subject_id, bag, expire_at) "  # noqa: S608  # a constant
        "VALUES ($1, 's', $2, now() + interval '1 hour')",
        list(rows.items()),
    )
    await connection.close()


@pytest.mark.parametrize("is_hashing", [False, True])
async def test_damaged_sessions_are_found_and_removed(
    postgres_dsn: str, tmp_path: Path, *, is_hashing: bool
) -> None:
    key_file = tmp_path / "token.key"
    key_file.write_text(f"{CANARY}-the-key-of-these-tests-of-check\n")
    key_file.chmod(0o600)
    flags = [f"-postgres.address={postgres_dsn}"]
    if is_hashing:
        flags += ["-token.protection=hmac", f"-token.key.file={key_file}"]
    assert mnemosyned("check", *flags) == (0, "0 sessions checked, 0 damaged\n", "")
    hashed = b"\0" + b"0a" * 36
    await insert(postgres_dsn, {CANARY.encode(): FORGED, hashed: FORGED, b"healthy": b"", b"\xff": b""})

    code, out, err = mnemosyned("check", *flags)
    *lines, total = out.splitlines()
    assert (code, err, total) == (1, "", "4 sessions checked, 3 damaged")
    assert lines[0] == f"hmac:{'0a' * 36}  a bag has a field that no bag has"
    assert len(lines) == 3
    assert CANARY not in out

    code, out, err = mnemosyned("check", "--fix", *flags)
    assert (code, err, out.splitlines()[-1]) == (0, "", "4 sessions checked, 3 damaged, 3 removed")
    assert mnemosyned("check", "-fix", *flags) == (0, "1 sessions checked, 0 damaged, 0 removed\n", "")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["-fix=maybe"], "flag -fix: expected true or false"),
        (["-storage=memory"], "check needs a storage that keeps sessions, and -storage=memory does not"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(flags: list[str], complaint: str) -> None:
    assert mnemosyned("check", *flags) == (2, "", f"mnemosyned: {complaint}\n")


def test_a_check_that_reaches_no_storage_fails() -> None:
    code, out, err = mnemosyned("check", "-postgres.address=postgres://u@127.0.0.1:9/d")

    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "mnemosyned: storage: unavailable"
