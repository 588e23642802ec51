from __future__ import annotations

import pytest

from mnemosyned.security.process_title import without_secrets
from mnemosyned.settings import SECRET_FLAGS


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["-ttl=5m", "-cluster.secret=hunter2"], ["-ttl=5m", "-cluster.secret=…"]),
        (["--cluster.secret", "hunter2", "-tls"], ["--cluster.secret", "…", "-tls"]),
        (["-cluster.secret", "-cluster.secret", "-ttl", "5m"], ["-cluster.secret", "…", "-ttl", "5m"]),
        (["-postgres.address=embedded:"], ["-postgres.address=…"]),
        (["-cluster.secret"], ["-cluster.secret"]),
        (["-cluster.secret.file=/a", "postgres.address"], ["-cluster.secret.file=/a", "postgres.address"]),
        (["-postgres.adress=postgres://u:hunter2@h/d"], ["-postgres.adress=postgres://…@h/d"]),
        (["postgres://u:hun\nter@2@h/d"], ["postgres://…@h/d"]),
        (["cluster", "leave", "-cluster.secret", "hunter2"], ["cluster", "leave", "-cluster.secret", "…"]),
        (["cluster", "whois", "-node", "a:1", "hunter2"], ["cluster", "whois", "…"]),
        (["cluster", "whois"], ["cluster", "whois"]),
        (["key", "admin"], ["key", "admin"]),
    ],
)
def test_what_is_shown_of_the_command_line(given: list[str], shown: list[str]) -> None:
    assert without_secrets(given, SECRET_FLAGS) == shown


def test_every_flag_that_takes_a_secret_is_known_as_one() -> None:
    assert {"postgres.address", "redis.address", "mongodb.address", "cluster.secret"} == SECRET_FLAGS
