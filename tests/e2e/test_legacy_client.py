"""The Go project's own Python client of 2018, unchanged, in an environment of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import Authority
from environments import environment, make_every_call
from processes import Daemon


@pytest.fixture(scope="module")
def legacy_python() -> str:
    return environment("legacy-client", "mnemosyne-client==0.18.4", "protobuf==3.20.3", "grpcio")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("engine", ["h2", "grpcio"])
@pytest.mark.parametrize("wire", ["plain", "tls"])
def test_the_whole_flow_passes(
    legacy_python: str, postgres_dsn: str, engine: str, wire: str, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    flags = authority.flags("127.0.0.1") if wire == "tls" else []
    with Daemon(f"-postgres.address={postgres_dsn}", f"-grpc.engine={engine}", *flags) as daemon:
        authorities = str(authority.path) if wire == "tls" else ""
        make_every_call(legacy_python, daemon.serving().address, authorities)
