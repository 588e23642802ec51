"""One full run of a cluster, all that comes out of it, and no secret in that.

What goes wrong here goes wrong on purpose: every status of the contract is provoked, with secrets in all
that is sent. Sessions that are answered to who may read them are no output in this sense.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import grpc
import pytest
from certificates import Authority
from clusters import Cluster, free_ports, until
from collectors import Collector, collecting
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Query,
    Session,
    SetValueRequest,
    StartRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon, mnemosyned, processes_on
from secrecy import CANARY, held

from cluster.peer_auth import METADATA_KEY
from cluster.signing import SERVICE_NAME as PEER
from mnemosyned.embedded.server import EmbeddedPostgres

pytestmark = pytest.mark.timeout(240)

# With what JSON, URLs and Base64 write otherwise, where that may be.
PASSWORD = f"{CANARY} pässword/of+it"
CLUSTER_SECRET = f"{CANARY}-cluster+secret/="
OTHER_SECRET = f"{CANARY}-secret-of+another/cluster"
TOKEN = f"{CANARY} tóken/+&"
REFRESH = f"{CANARY} réfresh/+"
BAG_KEY, BAG_VALUE = f"{CANARY} bag+këy", f"{CANARY} bag/válue"
OWN_KEY = f"{CANARY}-an-api/key+of-ones-own-choice"
UNKNOWN_KEY = f"mnk_{CANARY}-{secrets.token_urlsafe(24)}"
CALLER = "client.example"
SERVICE = "/mnemosynerpc.SessionManager"
NO_INSTANT = Timestamp(nanos=-1)
PROVOKED = """
OK NOT_FOUND INVALID_ARGUMENT ALREADY_EXISTS RESOURCE_EXHAUSTED UNAUTHENTICATED PERMISSION_DENIED UNAVAILABLE
DEADLINE_EXCEEDED UNIMPLEMENTED INTERNAL DATA_LOSS
""".split()  # noqa: SIM905  # a paragraph of names


@dataclass
class Run:
    """A cluster, who calls it, and what was seen of it."""

    cluster: Cluster
    authority: Authority
    collector: Collector
    server: EmbeddedPostgres
    outputs: list[tuple[str, bytes]] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)
    key_by_role: dict[str, str] = field(default_factory=dict)

    def saw(self, kind: str, output: object) -> None:
        self.outputs.append((kind, output if isinstance(output, bytes) else str(output).encode()))

    def call(self, method: Any, request: object, *metadata: tuple[str, str], timeout: float = 5) -> Any:  # noqa: ANN401  # a stub's
        """Make a call as an admin, unless a key is given; return the answer, if there is one."""
        if not any(name == "x-api-key" for name, _ in metadata):
            metadata += (("x-api-key", self.key_by_role["admin"]),)
        try:
            answer, call = method.with_call(request, timeout=timeout, metadata=metadata)
        except (grpc.RpcError, grpc.FutureCancelledError) as exc:
            self.failed(exc)
            return None
        self.codes.add("OK")
        self.saw("metadata", (call.initial_metadata(), call.trailing_metadata(), call.details()))
        return answer

    def failed(self, exc: Any) -> None:  # noqa: ANN401  # a call that is an error
        self.codes.add(exc.code().name)
        self.saw("error", (exc.details(), exc.debug_error_string(), str(exc)))
        self.saw("metadata", (exc.initial_metadata(), exc.trailing_metadata()))

    @contextmanager
    def channel(self, daemon: Daemon) -> Iterator[grpc.Channel]:
        options = (("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
        with grpc.secure_channel(daemon.address, self.authority.credentials(CALLER), options) as channel:
            yield channel

    @contextmanager
    def stubs(self) -> Iterator[list[SessionManagerStub]]:
        """Lend a client of each node that is there."""
        alive = [one for one in self.cluster.daemons.values() if one.process.poll() is None]
        with self.channel(alive[0]) as first, self.channel(alive[-1]) as last:
            channels = [first] if len(alive) == 1 else [first, last]
            yield [SessionManagerStub(channel) for channel in channels]

    def command(self, *arguments: str, stdin: str = "", **environ: str) -> int:
        code, out, err = mnemosyned(*arguments, stdin=stdin, **environ)
        self.saw("command", out + err)
        return code

    def new(self, **fields: object) -> StartRequest:
        whole = {"subject_id": "s", "refresh_token": REFRESH, "bag": {BAG_KEY: BAG_VALUE}} | fields
        return StartRequest(session=Session(**whole))  # type: ignore[arg-type]


@pytest.fixture(params=["h2", "grpcio"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    authority = Authority(tmp_path / "ca")
    with (
        EmbeddedPostgres.start(tmp_path / "pg") as server,
        collecting() as (collector, endpoint),
        Cluster(server.dsn, 3) as cluster,
    ):
        one = Run(cluster, authority, collector, server)
        execute(server.dsn, f"CREATE ROLE them SUPERUSER LOGIN PASSWORD '{PASSWORD}'")
        make_keys(one, tmp_path / "keys")
        flags = [
            "-log.level=debug", "-grpc.debug", f"-grpc.engine={request.param}", "-postgres.pool.size=4",
            f"-auth.keys={tmp_path / 'keys'}", f"-tracing.agent.address={endpoint}", "-drain.timeout=2s",
            *authority.flags("127.0.0.1", CALLER), "-tls.client-auth=require",
        ]  # fmt: skip
        start_nodes(one, tmp_path, flags)
        yield one
        one.server.stop()


def execute(dsn: str, statement: str, *arguments: object) -> None:
    async def work() -> None:
        connection = await asyncpg.connect(dsn)
        await connection.execute(statement, *arguments)
        await connection.close()

    asyncio.run(work())


def make_keys(run: Run, path: Path) -> None:
    lines = []
    for role in ("readonly", "session", "admin"):
        _, out, err = mnemosyned("key", role)
        run.key_by_role[role], line = out.splitlines()
        lines.append(line)
        run.saw("command", err)
    _, own, _ = mnemosyned("key", "readonly", "-", stdin=OWN_KEY)
    run.saw("command", own)
    path.write_text("\n".join([*lines, own]))


def start_nodes(run: Run, directory: Path, flags: list[str]) -> None:
    """Give the nodes their secrets on the command line, in the environment, and in files."""
    address = f"postgres://them:{quote(PASSWORD, safe='')}@127.0.0.1:{run.server.port}/postgres"
    run.secrets += [address, PASSWORD, quote(PASSWORD, safe=""), CLUSTER_SECRET, OTHER_SECRET]
    run.secrets += [*run.key_by_role.values(), OWN_KEY, UNKNOWN_KEY, REFRESH, BAG_KEY, BAG_VALUE, TOKEN]
    # A line of Base64 from the middle of the nodes' private key.
    run.secrets += (run.authority.directory / "node" / "key.pem").read_text().splitlines()[1:2]
    for name, text in (("address", address), ("secret", CLUSTER_SECRET)):
        (directory / name).write_text(text)
    ways: list[tuple[list[str], dict[str, str]]] = [
        ([f"-postgres.address={address}", "-cluster.secret", CLUSTER_SECRET], {}),
        ([], {"MNEMOSYNED_POSTGRES_ADDRESS": address, "MNEMOSYNED_CLUSTER_SECRET": CLUSTER_SECRET}),
        ([f"-{name}.file={directory / file}" for name, file in FILES], {}),
    ]
    seeds = ",".join(run.cluster.names)
    for name, (given, environ) in zip(run.cluster.names, ways, strict=True):
        port = f"-port={name.rpartition(':')[2]}"
        where = [port, f"-cluster.listen={name}", f"-cluster.seeds={seeds}"]
        run.cluster.daemons[name] = Daemon(*where, *given, *flags, environ=environ)
    for daemon in run.cluster.daemons.values():
        daemon.serving().context = ssl.create_default_context(cafile=str(run.authority.path))
    asyncio.run(run.cluster.rings_equal(run.cluster.names))


FILES = (("postgres.address", "address"), ("cluster.secret", "secret"))


@pytest.mark.slow
def test_no_output_of_a_full_run_holds_a_secret(run: Run, tmp_path: Path) -> None:
    tokens = succeed(run)
    fail(run, tokens)
    fail_below_the_contract(run)
    read_a_corrupt_bag(run)
    look_at_pages(run, tokens[0])
    use_commands(run, tokens[0], tmp_path)
    meet_a_stranger(run)
    lose_the_storage(run, tokens)
    look_at_titles(run, [one.process.pid for one in run.cluster.daemons.values()])
    lose_nodes(run, tokens)
    run.secrets += tokens
    run.saw("storage", (run.server.directory / "server.log").read_bytes())
    for daemon in run.cluster.daemons.values():
        run.saw("log", daemon.log)
        run.saw("log", daemon.out)
    for request in run.collector.requests:
        run.saw("span", request)

    assert run.codes >= set(PROVOKED)
    assert any(kind == "page" and b'outcome="ok"' in output for kind, output in run.outputs)
    assert {kind for kind, _ in run.outputs} == KINDS
    found = leaks(run)
    assert not found, "\n".join(found[:10])


KINDS = {"log", "page", "error", "metadata", "span", "title", "command", "storage"}


def leaks(run: Run) -> list[str]:
    found = []
    for kind, output in run.outputs:
        # The word alone too: many secrets here are made up at their only use.
        secrets_in_it = held(output, [CANARY, *run.secrets])
        if secrets_in_it:
            at = max(0, output.lower().find(CANARY.encode()) - 300)
            found.append(f"{kind}: {secrets_in_it} in {output[at : at + 600]!r}")
    return found


def succeed(run: Run) -> list[str]:
    """Make every call at each end of the cluster; return the tokens that are left, chosen ones and others."""
    tokens: list[str] = []
    with run.stubs() as stubs:
        for number, stub in enumerate(stubs * 4):
            chosen = f"{TOKEN}{number}" if number < 4 else ""
            start = stub.Start if number % 2 else stub.Create
            token = run.call(start, run.new(access_token=chosen)).session.access_token
            tokens.append(token)
            other = stubs[number % len(stubs) - 1]
            for key in (OWN_KEY, *run.key_by_role.values()):
                run.call(other.Get, GetRequest(access_token=token), ("x-api-key", key))
            if not chosen:
                # Metadata is ASCII.
                run.call(other.Context, Empty(), ("authorization", f"Bearer {token}"))
            run.call(other.Exists, ExistsRequest(access_token=token))
            for set_value in (other.SetValue, stub.SetData):
                run.call(set_value, SetValueRequest(access_token=token, key=BAG_KEY, value=BAG_VALUE))
        run.call(stubs[0].List, ListRequest(query=Query(refresh_token=REFRESH)))
        run.call(stubs[0].Abandon, AbandonRequest(access_token=tokens.pop(0)))
        run.call(stubs[0].Delete, DeleteRequest(access_token=tokens.pop(0)))
        run.call(stubs[0].Delete, DeleteRequest(refresh_token=f"{REFRESH}-unknown"))
    return tokens


def fail(run: Run, tokens: list[str]) -> None:
    """Have every call refused for what is in it, or for who makes it."""
    unknown, much = f"{TOKEN}-unknown", BAG_VALUE * 226_000  # over a bag's limit, under a message's
    with run.stubs() as stubs:
        for stub in stubs:
            wrong: list[tuple[Any, object]] = [
                (stub.Get, GetRequest(access_token=unknown)),
                (stub.Get, GetRequest(access_token=unknown * 1000)),
                (stub.Abandon, AbandonRequest(access_token=unknown)),
                (stub.SetValue, SetValueRequest(access_token=unknown, key=BAG_KEY, value=BAG_VALUE)),
                (stub.SetValue, SetValueRequest(access_token=tokens[0], key=BAG_KEY, value=much * 2)),
                (stub.SetValue, SetValueRequest(access_token=tokens[0], key=BAG_KEY, value=much)),
                (stub.Context, Empty()),
                (stub.Start, StartRequest()),
                (stub.Start, run.new(access_token=tokens[0])),
                (stub.Start, run.new(subject_id=f"\0{CANARY}")),
                (stub.Start, run.new(refresh_token=REFRESH * 1000)),
                (stub.Start, run.new(access_token=secrets.token_urlsafe(3000) + TOKEN)),
                (stub.Delete, DeleteRequest()),
                (stub.List, ListRequest(query=Query(refresh_token=REFRESH, expire_at_from=NO_INSTANT))),
            ]
            for method, request in wrong:
                run.call(method, request, ("request_id", "r"), ("cookie", TOKEN.encode().hex()))
                run.call(method, request, ("x-api-key", UNKNOWN_KEY))
                run.call(method, request, ("x-api-key", run.key_by_role["readonly"]))
                run.call(method, request, ("x-api-key", OWN_KEY))
                run.call(method, request, timeout=0.0005)
            run.call(stub.Context, Empty(), ("authorization", f"Basic {CANARY}-unknown"))
            call = stub.SetValue.future(SetValueRequest(access_token=tokens[0], key=BAG_KEY, value=much))
            call.cancel()
            run.saw("error", (call.code(), call.details()))


def fail_below_the_contract(run: Run) -> None:
    """Send what is no message, to what is no method, as who is no peer and no client."""
    junk = [b"\x0a\x7f" + TOKEN.encode(), b"\x0a\x10\xff" + CANARY.encode(), b"\xff" * 9 + TOKEN.encode()]
    paths = [f"{SERVICE}/{name}" for name in ("Get", "Start", "SetValue", "List", "Nothing")]
    paths += [f"/{PEER}/{name}" for name in ("Gossip", "Forward", "Invalidate", "Leave")]
    signatures = (CLUSTER_SECRET, f"v1 1 {CANARY} {CANARY}", "")
    for daemon in run.cluster.daemons.values():
        with run.channel(daemon) as channel:
            for path in paths:
                for message, signature in zip(junk, signatures, strict=True):
                    run.call(channel.unary_unary(path), message, (METADATA_KEY, signature))
                two = channel.stream_unary(path)
                run.call(two, iter([b"", TOKEN.encode()]))
        stranger = Authority(run.authority.directory / "stranger")
        directory = stranger.issue(CALLER)
        key, chain = ((directory / name).read_bytes() for name in ("key.pem", "crt.pem"))
        for dialled in (
            grpc.secure_channel(daemon.address, grpc.ssl_channel_credentials(run.authority.pem, key, chain)),
            grpc.secure_channel(daemon.address, run.authority.credentials()),
            grpc.insecure_channel(daemon.address),
        ):
            with dialled as channel:
                run.call(SessionManagerStub(channel).Get, GetRequest(access_token=TOKEN), timeout=1)


def read_a_corrupt_bag(run: Run) -> None:
    token = f"{TOKEN}-corrupt"
    execute(
        run.server.dsn,
        "INSERT INTO mnemosyne.session VALUES ($1, $2, 's', '', $3, now() + interval '1 hour')",
        token.encode(), REFRESH.encode(), b"\xff" + BAG_VALUE.encode(),
    )  # fmt: skip
    with run.stubs() as stubs:
        for stub in stubs:
            run.call(stub.Get, GetRequest(access_token=token))
            run.call(stub.SetValue, SetValueRequest(access_token=token, key=BAG_KEY, value=BAG_VALUE))
            run.call(stub.List, ListRequest(query=Query(refresh_token=REFRESH), limit=100))
            run.call(stub.Exists, ExistsRequest(access_token=token))
            run.call(stub.Abandon, AbandonRequest(access_token=token))


def look_at_pages(run: Run, token: str) -> None:
    paths = ["/metrics", "/healthz", "/healthr", "/debug/cluster", f"/{CANARY}"]
    paths += [f"{path}?token={quote(token, safe='')}" for path in paths]
    for daemon in run.cluster.daemons.values():
        for path in paths:
            run.saw("page", daemon.http(path))
        host, _, port = daemon.admin.removeprefix("https://").rpartition(":")
        assert daemon.context is not None
        for line in (f"GET /?token={CANARY} 2 HTTP/1.1", f"{CANARY} / HTTP/1.1", f"GET / HTTP/{CANARY}"):
            with (
                socket.create_connection((host, int(port)), timeout=5) as plain,
                daemon.context.wrap_socket(plain, server_hostname=host) as one,
            ):
                one.sendall(f"{line}\r\n\r\n".encode())
                run.saw("page", b"".join(iter(lambda one=one: one.recv(65536), b"")))
        with socket.create_connection((host, int(port)), timeout=5) as plain, suppress(OSError):
            plain.sendall(f"GET /debug/cluster?token={CANARY} HTTP/1.1\r\n\r\n".encode())
            run.saw("page", plain.recv(65536))


def use_commands(run: Run, token: str, directory: Path) -> None:
    """Use commands as they should be, and with secrets where they should not."""
    here = {
        "MNEMOSYNED_CLUSTER_LISTEN": run.cluster.names[0],
        "MNEMOSYNED_TLS_CA": str(run.authority.path),
    }
    address = run.secrets[0]
    (directory / "wrong.yaml").write_text(
        f'postgres.address: ["{address}"\ncluster.secret: {CLUSTER_SECRET}\n'
    )
    (directory / "wrong.toml").write_text(f"[postgres]\naddres = '{address}'\n")
    (directory / "odd.yaml").write_text(f"ttl: {address}\ncluster.secret: short-{CANARY}\n")
    assert run.command("cluster", "whois", token, **here) == 0
    assert run.command("cluster", "whois", "-", "-o", "json", stdin=token, **here) == 0
    for command in ("members", "ring", "check"):
        assert run.command("cluster", command, **here) == 0
    assert run.command("cluster", "whois", TOKEN, "-node", "127.0.0.1:1") == 1
    assert run.command("cluster", "leave", "-cluster.secret", OTHER_SECRET, **client_files(run), **here) == 1
    for wrong in (
        ["cluster", "whois", TOKEN, TOKEN],
        ["cluster", "leave", "-cluster.secrt", CLUSTER_SECRET],
        ["cluster", "leave", f"-cluster.secre={CLUSTER_SECRET}"],
        ["cluster", "leave", "-cluster.secret", CANARY],
        ["key", OWN_KEY],
        [f"-postgres.adress={address}"],
        [f"-postgres.address:{address}"],
        [f"-postgres.address.file={address}"],
        [f"-ttl={address}"],
        [address],
        [f"-cluster.secret={CANARY}"],
        [f"-cluster.secret={CLUSTER_SECRET}", CANARY],
        [f"-cluster.secret.file={CANARY}"],
        [f"-auth.keys={run.key_by_role['admin']}"],
        *([f"-config={directory / name}"] for name in ("wrong.yaml", "wrong.toml", "odd.yaml")),
    ):
        assert run.command(*wrong) == 2


def client_files(run: Run) -> dict[str, str]:
    node = run.authority.directory / "node"
    return {"MNEMOSYNED_TLS_CRT": str(node / "crt.pem"), "MNEMOSYNED_TLS_KEY": str(node / "key.pem")}


def meet_a_stranger(run: Run) -> None:
    """Start a node of another secret, and one with another password."""
    seed, address = run.cluster.names[0], run.secrets[0]
    tls = run.authority.flags("127.0.0.1")
    common = ["-log.level=debug", *tls, "-tls.client-auth=require"]
    with Daemon(
        *common, f"-postgres.address={address}", f"-cluster.secret={OTHER_SECRET}",
        "-cluster.listen=127.0.0.1:1", f"-cluster.seeds={seed}",
    ) as stranger:  # fmt: skip
        stranger.wait_for("peer_refuses_us")
        stranger.stop()
    wrong = address.replace(quote(PASSWORD, safe=""), f"{CANARY}-no-password")
    with Daemon(*common, f"-postgres.address={wrong}") as refused:
        assert refused.end() == 1
    for daemon in (stranger, refused):
        run.saw("log", daemon.log + daemon.out)


def lose_the_storage(run: Run, tokens: list[str]) -> None:
    directory, daemons = run.server.directory, list(run.cluster.daemons.values())
    run.server.stop()
    for daemon in daemons:
        daemon.wait_for("storage_lost")
    with run.stubs() as stubs:
        for stub in stubs:
            call_all(run, stub, tokens)
    for daemon in daemons:
        run.saw("page", daemon.http("/healthr"))
    run.server = EmbeddedPostgres.start(directory)
    for daemon in daemons:
        daemon.wait_for("storage_regained")


def call_all(run: Run, stub: SessionManagerStub, tokens: list[str]) -> None:
    for token in tokens:
        run.call(stub.Get, GetRequest(access_token=token))
        run.call(stub.Exists, ExistsRequest(access_token=f"{TOKEN}-unknown"))
        run.call(stub.SetValue, SetValueRequest(access_token=token, key=BAG_KEY, value=BAG_VALUE))
    run.call(stub.Start, run.new(access_token=f"{TOKEN}-late"))
    run.call(stub.Abandon, AbandonRequest(access_token=f"{TOKEN}-late"))
    run.call(stub.List, ListRequest(query=Query(refresh_token=REFRESH)))
    run.call(stub.Delete, DeleteRequest(refresh_token=f"{REFRESH}-unknown"))


def lose_nodes(run: Run, tokens: list[str]) -> None:
    """Kill a node while it is called and forwarded to, have another leave, and end the last in order."""
    first, second, third = run.cluster.names
    with run.stubs() as stubs, ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call_all, run, stub, tokens) for stub in stubs * 4]
        run.cluster.signal(third, signal.SIGKILL)
        run.cluster.daemons[third].end()
        for call in calls:
            call.result()
    asyncio.run(run.cluster.rings_equal([first, second], on=[first, second]))
    environ = {"MNEMOSYNED_CLUSTER_SECRET": CLUSTER_SECRET, "MNEMOSYNED_TLS_CA": str(run.authority.path)}
    assert run.command("cluster", "leave", "-node", second, **client_files(run), **environ) == 0
    assert run.cluster.daemons[second].end() == 0
    with run.stubs() as stubs:
        call_all(run, stubs[0], tokens)
    assert run.cluster.daemons[first].stop() == 0


def look_at_titles(run: Run, pids: list[int]) -> None:
    """Read what everybody on the machine can of these processes, and of their threads."""
    for pid in pids:
        for path in (Path(f"/proc/{pid}/cmdline"), *Path(f"/proc/{pid}").glob("**/comm")):
            run.saw("title", path.read_bytes())


@pytest.mark.parametrize(
    "log", ["production", "development", pytest.param("stackdriver", marks=pytest.mark.slow)]
)
def test_no_output_beside_an_embedded_server_holds_a_secret(tmp_path: Path, log: str) -> None:
    directory, (port,) = tmp_path / "pg", free_ports(1)
    flags = [f"-port={port}", f"-log.environment={log}", "-log.level=debug"]
    given = [f"-postgres.address=embedded://{directory}", f"-cluster.secret={CLUSTER_SECRET}"]
    new = StartRequest(session=Session(access_token=TOKEN, subject_id="s", bag={BAG_KEY: BAG_VALUE}))
    outputs: list[bytes] = []
    with Daemon(*flags, *given) as daemon:
        asyncio.run(until(lambda: "storage_ready" in daemon.log))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = SessionManagerStub(channel)
            stub.Start(new, timeout=5)
            with pytest.raises(grpc.RpcError):
                stub.Start(new, timeout=5)
        for pid in [daemon.process.pid, *processes_on(tmp_path)]:
            outputs += [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "comm")]
        daemon.stop()
    outputs += [daemon.log.encode(), daemon.out.encode(), (directory / "server.log").read_bytes()]
    password = (directory / "password").read_text().strip()

    assert len(outputs) > 3 + 2 * 2
    assert [held(output, [CANARY, TOKEN, password]) for output in outputs] == [[]] * len(outputs)
