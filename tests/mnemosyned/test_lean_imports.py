"""What a start does not import, in a Python of its own: this one has imported everything."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOAD = "from mnemosyned import lean_imports; lean_imports.load(); import sys, mnemosyned.daemon\n"


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.parametrize("unused", ["redis", "rich", "opentelemetry", "grpc", "asyncpg", "pymongo"])
def test_a_start_imports_no_library_that_it_may_not_need(unused: str) -> None:
    assert _python(LOAD + f"print({unused!r} in sys.modules)") == "False\n"


def test_what_was_hidden_can_be_imported_later() -> None:
    assert (
        _python(LOAD + "import redis.asyncio, rich; print(redis.__name__, rich.__name__)") == "redis rich\n"
    )


def test_what_was_imported_before_stays() -> None:
    assert _python("import redis\n" + LOAD + "print(sys.modules['redis'] is redis)") == "True\n"


def test_a_check_of_the_configuration_imports_no_more_than_a_start() -> None:
    check = "import sys\nfrom mnemosyned.__main__ import _main\n_main(['-storage=memory', '-check-config'])\n"

    assert _python(check + "print('redis' in sys.modules)").splitlines()[-1] == "False"
