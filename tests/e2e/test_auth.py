"""API keys and certificates of callers, as operators hand them out and take them back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from certificates import Authority
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from mnemosynerpc.session_pb2 import DeleteRequest, GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon, mnemosyned

NEW = StartRequest(session=Session(subject_id="s"))
OK, DENIED, UNKNOWN = (
    grpc.StatusCode.OK,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)


def make_key(*arguments: str, stdin: str = "") -> tuple[int, list[str], str]:
    code, out, err = mnemosyned("key", *arguments, stdin=stdin)
    return code, out.splitlines(), err


def status(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as exc:
        code: grpc.StatusCode = exc.code()  # type: ignore[attr-defined]
        return code
    return OK


def test_keys_are_made_used_and_taken_back(tmp_path: Path) -> None:
    _, (web, web_line), _ = make_key()
    _, (ops, ops_line), _ = make_key("admin")
    path = tmp_path / "keys"
    path.write_text(f"{web_line}  # web shop\n")
    with Daemon("-storage=memory", f"-auth.keys={path}") as daemon, daemon.serving().stub() as stub:
        token = stub.Start(NEW, timeout=5, metadata=(("x-api-key", web),)).session.access_token
        delete = DeleteRequest(subject_id="s")

        def get(key: str) -> grpc.StatusCode:
            request = GetRequest(access_token=token)
            return status(lambda: stub.Get(request, timeout=5, metadata=(("x-api-key", key),)))

        def end(key: str) -> grpc.StatusCode:
            return status(lambda: stub.Delete(delete, timeout=5, metadata=(("x-api-key", key),)))

        assert (get(web), get(ops), end(web), end(ops)) == (OK, UNKNOWN, DENIED, UNKNOWN)
        assert status(lambda: stub.Get(GetRequest(access_token=token), timeout=5)) is UNKNOWN
        with grpc.insecure_channel(daemon.address) as channel:
            health = HealthStub(channel).Check(HealthCheckRequest(), timeout=5)
        assert health.status == HealthCheckResponse.SERVING
        path.write_text(f"{ops_line}\n")
        daemon.wait_for("keys_reloaded")
        assert (get(web), end(ops)) == (UNKNOWN, OK)
        path.write_text("nonsense\n")
        assert "line 1" in daemon.wait_for("keys_reload_failed")["error"]
        assert get(ops) is grpc.StatusCode.NOT_FOUND
        _, page = daemon.http("/metrics")

    assert 'mnemosyned_auth_refusals_total{reason="unknown"} 3.0' in page
    for secret in (web, ops, token):
        assert secret not in daemon.log + page


def test_a_certificate_has_the_role_of_its_name(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    (tmp_path / "keys").write_text("session name:*.web.example\nadmin name:ops.example\n")
    flags = [*authority.flags("127.0.0.1"), "-tls.client-auth=optional", f"-auth.keys={tmp_path / 'keys'}"]
    expected = {("a.web.example",): DENIED, ("ops.example",): OK, ("web.example",): UNKNOWN, (): UNKNOWN}
    with Daemon("-storage=memory", *flags) as daemon:
        daemon.serving()
        for names, code in expected.items():
            with grpc.secure_channel(daemon.address, authority.credentials(*names)) as channel:
                stub = SessionManagerStub(channel)
                assert status(lambda stub=stub: stub.Delete(DeleteRequest(subject_id="s"), timeout=5)) is code  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "No such file"), ("", "no callers"), ("root x", "line 1: it is not a role")],
)
def test_a_file_of_keys_that_is_no_good_ends_the_start(
    tmp_path: Path, content: str | None, word: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with Daemon("-storage=memory", f"-auth.keys={path}") as daemon:
        assert daemon.end() == 1

    assert "flag -auth.keys: " in daemon.log
    assert word in daemon.log
    assert "Traceback" not in daemon.log


def test_a_key_of_ones_own_is_hashed_if_it_is_long_enough() -> None:
    own = "0123456789abcdef" * 2
    code, lines, _ = make_key("readonly", "-", stdin=f"{own}\n")
    short = make_key("-", stdin="short\n")

    assert (code, len(lines)) == (0, 1)
    assert lines[0].startswith("readonly sha256:")
    assert own not in lines[0]
    assert (short[0], short[1]) == (2, [])
    assert "shorter than 32" in short[2]
    code, out, err = make_key(own)
    assert (code, out, own in err) == (2, [], False)
