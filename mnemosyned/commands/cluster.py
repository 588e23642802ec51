"""`mnemosyned cluster …`: what the cluster looks like, from any machine that reaches a node.

    members, ring, whois   GET /debug/cluster on the admin port of one node: that node's view
    check                  the same of one node, then of every member it names, at once; compares the views
    leave                  GET for the node's name, then a signed call of Leave in the node's Peer service

The admin port is the gRPC port + 1 (`daemon.py`), so one address names both. Where peers have a port of their
own (`-cluster.bind`), it is the same on all nodes, and `-admin-port` names it. The workers of a daemon have
one admin port together; its page has that of each under `workers`. Reads need no secret but reach to that
port. `leave` changes the cluster, so it is signed like a call between nodes, with the cluster's secret, and
only the node of that name and process accepts it.

- Exit codes: 0 healthy or done, 1 unhealthy or failed, 2 wrong usage.
- Standard output has the result only, as text or as JSON (`-o json`). Errors go to standard error, one line.
- No command repeats a token, a secret or a password, since shells and terminals keep what is printed.
- Proxies in the environment (`http_proxy`, …) are ignored: nodes are addresses inside the cluster's network.
- Texts of nodes are made printable: a node that is not ours may answer, and a terminal obeys escape codes.
- No retries. A person or a script sees at once what a node answers now; each request ends after 5 s.

The page may come from a node of another version, so the commands use only fields that `admin/cluster.py`
promises to keep.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPException
from typing import Any, Final, cast

from cluster.errors import ClusterError
from cluster.peer_auth import PROCESS_BYTES, PeerAuth
from cluster.peerpb import peer_pb2 as pb
from cluster.peers import ChannelKind, Peers
from mnemosyned import settings
from mnemosyned.commands.arguments import CommandParser
from mnemosyned.config.flags import ConfigError
from mnemosyned.config.parsers import boolean, node_address
from mnemosyned.node_config import ClusterConfig
from mnemosyned.observe.printable import printable, printable_value
from mnemosyned.security.file_reloader import FilesUnusable
from mnemosyned.security.tls import TlsFiles, client_context, peer_context

# For one request. `check` asks 16 nodes at once, so 100 unreachable members take 35 s.
_TIMEOUT_S: Final = 5.0
_SECRET_VARIABLES: Final = ("MNEMOSYNED_CLUSTER_SECRET", "MNEMOSYNED_CLUSTER_SECRET_FILE")
_TLS_FLAGS: Final = {
    "tls.ca": "authorities that sign the nodes' certificates",
    "tls.crt": "certificate to show, for leave",
    "tls.key": "its private key",
}

Page = dict[str, Any]


class Unanswered(Exception):
    """A node gave no usable answer; the text says which node, and why."""


def main(argv: Sequence[str]) -> int:
    """Run one command; return the exit code.

    argparse ends the process itself for wrong usage (2) and for help (0).
    """
    arguments = _parser().parse_args(argv)
    try:
        content, text, exit_code = arguments.run(arguments)
    except Unanswered as exc:
        sys.stderr.write(f"mnemosyned: {printable(str(exc))}\n")
        return 1
    except ConfigError as exc:
        sys.stderr.write(f"mnemosyned: {exc}\n")
        return 2
    sys.stdout.write(json.dumps(content, indent=2) + "\n" if arguments.output == "json" else text)
    return int(exit_code)


# What `-o json` prints, what is printed otherwise, and the exit code.
Outcome = tuple[object, str, int]


def _parser() -> argparse.ArgumentParser:
    # Flags have one hyphen like the daemon's, or two. Defaults come from the daemon's variables, so that
    # `kubectl exec POD mnemosyned cluster check` needs no flags. argparse's own -h would not know -help.
    help_flag = CommandParser(add_help=False)
    help_flag.add_argument("-h", "-help", "--help", action="help", help="show this text")
    common = _common_flags(help_flag)
    parser = CommandParser(
        "mnemosyned cluster",
        description="Look at a cluster, or leave it.",
        parents=[help_flag],
        add_help=False,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(
        name: str, run: Callable[[argparse.Namespace], Outcome], text: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[common], help=text, description=text, add_help=False)
        added.set_defaults(run=run)
        return added

    command("members", _members, "list the members as the node knows them")
    command("ring", _ring, "show which part of all tokens each node owns")
    whois = command("whois", _whois, "tell which node owns a token")
    whois.add_argument("token", help="the token; - reads it from the standard input")
    command("check", _check, "ask every member for its view; exit code 1 if one is unhealthy or disagrees")
    leave = command("leave", _leave, "have the node leave the ring, drain and end")
    leave.add_argument("-cluster.secret", "--cluster.secret", dest="secret", metavar="SECRET")
    leave.add_argument("-cluster.secret.file", "--cluster.secret.file", dest="secret_file", metavar="FILE")
    return parser


def _common_flags(help_flag: CommandParser) -> CommandParser:
    """Return the flags that each command has: the node, and how to reach it."""
    common = CommandParser(parents=[help_flag], add_help=False)
    common.add_argument(
        "-node",
        "--node",
        type=_node,
        default=os.environ.get("MNEMOSYNED_CLUSTER_LISTEN") or "127.0.0.1:8080",
        metavar="HOST:PORT",
        help="gRPC address of any node (default: %(default)s) [MNEMOSYNED_CLUSTER_LISTEN]",
    )
    common.add_argument(
        "-admin-port",
        "--admin-port",
        type=_port,
        default=_own_admin_port(),
        metavar="PORT",
        help="admin port of the nodes (default: that of -node + 1; with MNEMOSYNED_CLUSTER_BIND or "
        "MNEMOSYNED_WORKERS, MNEMOSYNED_PORT + 1)",
    )
    common.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="form of the output (default: text)"
    )
    tls = common.add_argument_group(
        "TLS", "as the nodes' own flags and variables say; -tls.ca alone implies it"
    )
    for name, text in _TLS_FLAGS.items():
        tls.add_argument(
            f"-{name}", f"--{name}", dest=name, default=_environ(name), metavar="FILE", help=text
        )
    tls.add_argument("-tls", "--tls", action="store_true", help="use TLS")
    return common


def _environ(name: str) -> str:
    return os.environ.get(settings.FLAGS[name].variable, "")


def _context(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    """Return how to reach nodes; None: without TLS.

    Raises:
        ConfigError: MNEMOSYNED_TLS is not a boolean, or the file of authorities is unusable.
    """
    authorities = getattr(arguments, "tls.ca")
    try:
        if not (arguments.tls or authorities or boolean(_environ("tls") or "false")):
            return None
    except ValueError as exc:
        raise ConfigError(f"environment variable MNEMOSYNED_TLS: {exc}") from None
    try:
        return client_context(authorities)
    except FilesUnusable as exc:
        raise ConfigError(f"flag -tls.ca: {exc}") from None


def _node(text: str) -> str:
    try:
        return node_address(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _members(arguments: argparse.Namespace) -> Outcome:
    # Each state is what this node holds; another node may hold another for some seconds.
    page = _page(_admin(arguments), _context(arguments))
    rows = [
        (
            member["name"],
            member["address"],
            member["status"],
            str(member["incarnation"]),
            f"{member['ring_share']:.1%}",
            member.get("lease", ""),
        )
        for member in page["members"]
    ]
    return page["members"], _table(("NODE", "ADDRESS", "STATUS", "INCARNATION", "SHARE", "LEASE"), rows), 0


def _ring(arguments: argparse.Namespace) -> Outcome:
    page = _page(_admin(arguments), _context(arguments))
    shares = {
        one["name"]: one["ring_share"] for one in page["members"] if one["name"] in page["ring"]["nodes"]
    }
    text = _table(("NODE", "SHARE"), [(name, f"{share:.1%}") for name, share in shares.items()])
    content = {"fingerprint": page["ring"]["fingerprint"], "shares": shares}
    return content, f"{text}fingerprint {page['ring']['fingerprint']}\n", 0


def _whois(arguments: argparse.Namespace) -> Outcome:
    # An argument is visible to other users of the machine (`ps`); standard input is not.
    is_piped = arguments.token == "-"  # noqa: S105  # the usual sign for standard input
    token = sys.stdin.readline().strip() if is_piped else arguments.token
    if not token:
        raise ConfigError("the token is empty")
    page = _page(_admin(arguments), _context(arguments), token=token)
    return page, f"{page['owner']}\n", 0


def _check(arguments: argparse.Namespace) -> Outcome:
    """Compare all views of the cluster.

    Unhealthy is: a member that is not active (one that has left on purpose is fine), gives no page, has
    another ring, has an open breaker for a peer, has no valid lease, or shares its table with a daemon that
    is no member. During a change of the ring, views differ for a moment;
    a script should check again before it acts.

    The list of members is that of the node that was asked. In a partition it names the nodes of the other
    half as dead, and those are not asked.
    """
    context = _context(arguments)
    asked = _page(_admin(arguments), context)
    # Workers have no admin ports of their own; the page of a daemon with workers says where it has its one.
    arguments.admin_port = arguments.admin_port or int(asked.get("admin_port", 0))
    there = [one for one in asked["members"] if one["status"] not in {"dead", "left"}]
    with ThreadPoolExecutor(max_workers=16) as pool:
        # A certificate is valid for a name, so with TLS nodes are reached by name.
        where = "address" if context is None else "name"
        pages = list(
            pool.map(
                lambda one: (
                    _of_worker(asked, one["name"])
                    or _page_or_trouble(_admin(arguments, one[where]), context, one["name"])
                ),
                there,
            )
        )
    troubles = [
        f"{one['name']}: {one['status']}" for one in asked["members"] if one["status"] not in _HEALTHY
    ]
    for one, page in zip(there, pages, strict=True):
        troubles += [f"{one['name']}: {trouble}" for trouble in _troubles(page, asked)]
    summary = f"{len(there)} nodes, ring {asked['ring']['fingerprint']}"
    content = {"nodes": len(there), "ring": asked["ring"]["fingerprint"], "troubles": troubles}
    if troubles:
        return content, "".join(f"{trouble}\n" for trouble in troubles) + f"{summary}: unhealthy\n", 1
    return content, f"{summary}: healthy\n", 0


_HEALTHY: Final = frozenset({"active", "left"})


def _troubles(page: Page | Unanswered, asked: Page) -> list[str]:
    # "Half-open" counts too: that breaker was open, and its trial has not succeeded yet.
    if isinstance(page, Unanswered):
        return [str(page)]
    found = []
    if page["ring"]["fingerprint"] != asked["ring"]["fingerprint"]:
        found.append(f"routes by another ring, {page['ring']['fingerprint']}")
    found += [f"does not reach {one['name']}" for one in page["members"] if one["breaker"] != "closed"]
    # A node of a former version has none, and one that has just started registers for two seconds.
    lease = page.get("lease") or {}
    if lease.get("reason") not in {None, "", "registering"}:
        found.append(f"may serve no copies: {lease['reason']}")
    found += [f"shares its table with {name}, which is no member" for name in lease.get("strangers", ())]
    return found


def _leave(arguments: argparse.Namespace) -> Outcome:
    # The daemon's own parser reads the secret, so that flags, variables and files mean the same here. Without
    # a secret the call is unsigned: a node accepts it with a node's certificate only.
    flags = [f"-cluster.secret={arguments.secret}"] if arguments.secret else []
    flags += [f"-cluster.secret.file={arguments.secret_file}"] if arguments.secret_file else []
    environ = {name: os.environ[name] for name in _SECRET_VARIABLES if name in os.environ}
    secrets = settings.parse(flags, environ)[ClusterConfig].secret
    page = _page(_admin(arguments), _context(arguments))
    name = page["node"]
    if "workers" in page:
        if arguments.node not in page["workers"]:
            raise Unanswered(
                f"{arguments.node} is a daemon with workers: end it by SIGTERM, or name one of its nodes "
                f"with -node, if other hosts reach them: {', '.join(page['workers'])}"
            )
        name = arguments.node
    asyncio.run(_call_leave(arguments, name, secrets))
    return {"node": name, "leaving": True}, f"{name} is leaving\n", 0


async def _call_leave(arguments: argparse.Namespace, name: str, secrets: Sequence[str]) -> None:
    """Ask the node to leave; it answers before it drains.

    The signature contains the time. The clocks of this machine and of the node may differ by 30 s.

    Raises:
        Unanswered: the node is unreachable, refuses the signature, the name or the certificate, or does not
            prove that it is a node of this cluster.
    """
    address, context = arguments.node, _peer_context(arguments)
    # Over TLS the node has shown a certificate for the host that was asked for.
    host = address.rpartition(":")[0].strip("[]")
    names = () if context is None else (host,)
    peer_auth = PeerAuth([secret.encode() for secret in secrets], names, process=os.urandom(PROCESS_BYTES))
    peers = Peers(peer_auth, {"Leave": _Uncounted()}, server_name=lambda _: host)
    if context is not None:
        peers.identify(context)
    body = pb.LeaveRequest(node=name).SerializeToString()
    try:
        await peers.call(
            address, "Leave", body, timeout_s=_TIMEOUT_S, channel_kind=ChannelKind.CALLS, callee=name
        )
    except ClusterError as exc:
        raise Unanswered(f"{address}: {str(exc).removeprefix('mnemosyned: ')}") from None
    finally:
        await peers.close()


class _Uncounted:
    """No one reads the metrics of a command."""

    def begin(self) -> None:
        pass

    def end(self, code: str, elapsed_s: float) -> None:
        pass


def _peer_context(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    """Return how to call a node's Peer service, with the certificate to show; None: without TLS."""
    context = _context(arguments)
    certificate, private_key = getattr(arguments, "tls.crt"), getattr(arguments, "tls.key")
    if context is not None and certificate:
        authorities = getattr(arguments, "tls.ca")
        try:
            return peer_context(
                TlsFiles(
                    certificate=certificate, private_key=private_key or certificate, authorities=authorities
                )
            )
        except FilesUnusable as exc:
            raise ConfigError(f"flag -tls.crt: {exc}") from None
    if context is not None:
        context.set_alpn_protocols(["h2"])
    return context


def _page_or_trouble(where: str, context: ssl.SSLContext | None, name: str) -> Page | Unanswered:
    try:
        page = _page(where, context)
    except Unanswered as exc:
        return exc
    return _of_worker(page, name) or page


def _of_worker(page: Page, name: str) -> Page | None:
    """Return what the worker of this name shows, where the page is that of its daemon."""
    return cast("Page | None", page.get("workers", {}).get(name))


def _admin(arguments: argparse.Namespace, node: str = "") -> str:
    """Return the address of a node's admin port; of the node that is asked, if none is named.

    Raises:
        ConfigError: a variable of the environment is invalid.
    """
    host, _, port = (node or arguments.node).rpartition(":")
    return f"{host}:{arguments.admin_port or int(port) + 1}"


def _own_admin_port() -> int:
    """Return the admin port where this machine's node has a port for peers; 0 where it has none."""
    if not _environ("cluster.bind") and _environ("workers") in {"", "1"}:
        return 0
    try:
        return _port(_environ("port") or settings.FLAGS["port"].default) + 1
    except (ValueError, argparse.ArgumentTypeError):
        return 0


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def _page(where: str, context: ssl.SSLContext | None, **query: str) -> Page:
    """Return what the admin port of a node says of the cluster.

    The text of an error names the admin port, which a firewall may block while calls get through.

    Raises:
        Unanswered: no connection, no answer within 5 s, no cluster there, or no JSON.
    """
    scheme = "http" if context is None else "https"
    url = f"{scheme}://{where}/debug/cluster?{urllib.parse.urlencode(query)}"
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with direct.open(url, timeout=_TIMEOUT_S) as response:
            page = cast("Page", printable_value(json.load(response)))
    except urllib.error.HTTPError as exc:
        exc.close()
        is_unknown = exc.code == HTTPStatus.NOT_FOUND
        reason = "it is not a node of a cluster" if is_unknown else f"HTTP status {exc.code}"
        raise Unanswered(f"admin port {where}: {reason}") from None
    except urllib.error.URLError as exc:
        raise Unanswered(
            f"admin port {where}: {getattr(exc.reason, 'strerror', None) or exc.reason}"
        ) from None
    except (OSError, ValueError, HTTPException) as exc:
        raise Unanswered(f"admin port {where}: {exc or type(exc).__name__}") from None
    return page


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)
