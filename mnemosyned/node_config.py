"""The settings of a node of a cluster.

`-cluster.listen` alone makes a cluster of one node, which others may join by naming it as a seed. Seeds are
asked only to join: afterwards the members know each other by gossip, and a seed may end.

The secret may be given as a flag, in the environment, or in a file; the words of the file are added to those
of the flag. Two secrets are accepted during a rotation:

    all nodes: old ──> all nodes: old,new ──> all nodes: new,old ──> all nodes: new
                       (accepts both)         (signs with new)

Each arrow is SIGHUP to one node after the other, or a restart (reload.py). At every moment, all nodes accept
what any node signs.

By default the Peer service is on the gRPC port, where every client reaches it. With `-cluster.bind` it has a
port of its own, which a firewall can close to clients (ports.py). Peers dial `-cluster.listen` in both cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final, Self

from mnemosyned.config.flags import ConfigError, Section, setting
from mnemosyned.config.parsers import (
    boolean,
    integer,
    label,
    node_addresses,
    optional_node_address,
    secret_file,
    secrets,
    words_in,
)
from mnemosyned.security.config import AuthConfig, TlsConfig
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.transport.config import GrpcConfig
from mnemosyned.transport.engine import UNIX_PREFIX

if TYPE_CHECKING:
    from mnemosyned.config.config import Config

MAX_PORT: Final = 65_535
_MAX_SECRETS: Final = 2  # each call is compared with all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig(Section):
    """This node's address, how it finds the other nodes, and how nodes authenticate one another."""

    TITLE = "Cluster"
    EXAMPLE = (
        "mnemosyned -cluster.listen=10.0.0.1:8080 -cluster.seeds=10.0.0.2:8080,10.0.0.3:8080 "
        "-cluster.secret.file=secret"
    )

    listen: str = setting(
        "cluster.listen",
        "",
        optional_node_address,
        "this node's address as its peers dial it, host:port; it is also the node's name",
    )
    seeds: tuple[str, ...] = setting(
        "cluster.seeds",
        "",
        node_addresses,
        "addresses of other nodes, comma-separated; may be repeated; one name may have many addresses",
        is_list=True,
    )
    bind: str = setting(
        "cluster.bind",
        "",
        optional_node_address,
        "address to listen on for peers, host:port; empty: peers and clients share the gRPC port",
    )
    secret: tuple[str, ...] = setting(
        "cluster.secret",
        "",
        secrets,
        "secret that all nodes share; two, comma-separated, in a rotation: the first signs",
        is_secret=True,
        is_list=True,
    )
    secret_file: str = setting(
        "cluster.secret.file",
        "",
        secret_file,
        "file with the secret, or with two in a rotation, one a line",
    )
    label: str = setting(
        "cluster.label", "", label, "name of the cluster; nodes with another name are refused"
    )

    is_plaintext: bool = setting(
        "cluster.plaintext",
        "false",
        boolean,
        "nodes of other hosts may be called without TLS: there is no warning at the start",
    )
    max_members: int = setting(
        "cluster.max-members", "1000", integer(2, 65_536), "most members that this node remembers"
    )

    # As seeds are given by one DNS name in Kubernetes, the own address may be among what a name resolves to.
    # That is sorted out when the seeds are asked (cluster/gossip.py); here are only addresses as written.
    @property
    def foreign_seeds(self) -> tuple[str, ...]:
        """The seeds without this node's own address: one list of seeds may be given to every node."""
        return tuple(seed for seed in self.seeds if seed != self.listen)

    def resolved(self, _: Mapping[str, str]) -> Self:
        """See Section: `secret` includes those of the file."""
        if not self.secret_file:
            return self
        words = words_in("cluster.secret.file", self.secret_file)
        try:
            return replace(self, secret=self.secret + secrets(",".join(words)))
        except ValueError as exc:
            raise ConfigError(f"flag -cluster.secret.file: {self.secret_file}: {exc}") from None

    def check(self, config: Config) -> None:
        """See Section."""
        storage = config[StorageConfig]
        if self.foreign_seeds and not storage.engine.capabilities.is_shared:
            raise ConfigError(
                f"flag -storage: {storage.name} is for a single node, and -cluster.seeds names others"
            )
        if self.foreign_seeds and not self.listen:
            raise ConfigError("flag -cluster.seeds names others, who need -cluster.listen to dial this node")
        if len(self.secret) > _MAX_SECRETS:
            raise ConfigError(
                f"flag -cluster.secret: more than {_MAX_SECRETS} secrets; two are for a rotation"
            )
        # Otherwise a caller without a key could call as a node, which no role limits.
        has_proof = bool(self.secret or config[TlsConfig].peer_names)
        if self.listen and config[AuthConfig].keys_file and not has_proof:
            raise ConfigError(
                "flag -cluster.listen: with -auth.keys, nodes need -cluster.secret.file or -tls.peer-names"
            )
        if config[GrpcConfig].advertise and not self.listen:
            raise ConfigError("flag -grpc.advertise is given, and -cluster.listen is not")
        self._check_bind(config[GrpcConfig])

    def check_ports_of(self, workers: int, grpc: GrpcConfig) -> None:
        """Check that each of several workers can have a peers' port of its own. Raises ConfigError.

        Worker k has the port of `-cluster.listen`, and of `-cluster.bind`, plus k-1.
        """
        if not self.listen:
            return
        if grpc.host.startswith(UNIX_PREFIX) and not self.bind:
            raise ConfigError("flag -cluster.bind: with -workers and -host=unix: peers need an address")
        given = {"listen": self.listen} | ({"bind": self.bind} if self.bind else {})
        for flag, address in given.items():
            last = split_address(address)[1] + workers - 1
            if last > MAX_PORT:
                raise ConfigError(f"flag -cluster.{flag}: {workers} workers need ports up to {last}")
        # What is given last is what is listened on.
        (flag, address) = list(given.items())[-1]
        first = split_address(address)[1]
        host = split_address(address)[0] if self.bind else grpc.host
        if not grpc.port or not _overlap(host, grpc.host):
            return
        for name, taken in (("gRPC", grpc.port), ("admin", grpc.port + 1)):
            if first <= taken < first + workers:
                raise ConfigError(
                    f"flag -cluster.{flag}: {workers} workers take the ports from {first} on for peers, and "
                    f"{taken} is the {name} port (-port); give another one, such as {grpc.port + 10}"
                )

    def _check_bind(self, grpc: GrpcConfig) -> None:
        if not self.bind:
            return
        if not self.listen:
            raise ConfigError("flag -cluster.bind is given, and -cluster.listen is not")
        host, port = split_address(self.bind)
        if not grpc.port or not _overlap(host, grpc.host):
            return
        for name, taken in (("gRPC", grpc.port), ("admin", grpc.port + 1)):
            if port == taken:
                raise ConfigError(f"flag -cluster.bind: {self.bind} is the {name} port of this node (-port)")


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of host:port; IPv6 without its brackets."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def joined_address(host: str, port: int) -> str:
    """Return host:port; IPv6 with brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _overlap(one: str, other: str) -> bool:
    return one == other or _is_any_address(one) or _is_any_address(other)


def _is_any_address(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        # What a name resolves to shows when the port is opened.
        return False
