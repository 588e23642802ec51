"""What is in deploy/: that its parts are valid, fit together, and start a daemon that takes its flags."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from certificates import Authority
from clusters import free_ports
from exported import exported_series
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded
from processes import Daemon

from http2.messages import framed
from mnemosyned.config.config import Config
from mnemosyned.node_config import ClusterConfig
from mnemosyned.security.api_keys import Role, line_of, new_key
from mnemosyned.security.config import AuthConfig, TlsConfig
from mnemosyned.settings import FLAGS, parse
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.storage.mongodb.address import parse as parse_mongodb
from mnemosyned.storage.mongodb.config import MongoConfig
from mnemosyned.storage.postgres.config import PostgresConfig
from mnemosyned.storage.redis.address import parse as parse_redis
from mnemosyned.storage.redis.config import RedisConfig
from mnemosyned.transport.config import GrpcConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose"
OVERLAYS = {
    path.name: path
    for path in [DEPLOY / "kubernetes" / "base", *(DEPLOY / "kubernetes" / "overlays").iterdir()]
}
VARIABLES = {flag.variable for flag in FLAGS.values()}
DASHBOARD = json.loads((COMPOSE / "grafana-dashboard.json").read_text())
RULES = yaml.safe_load((COMPOSE / "alerts.yaml").read_text())["groups"][0]["rules"]
SESSIONS = 'job="mnemosyned", instance="a", service="mnemosynerpc.SessionManager"'
# Series every half minute, for a quarter of an hour: the alert fires, and it does not.
ALERTS = {
    "MnemosynedDown": (
        {'up{job="mnemosyned", instance="a"}': "0x30"},
        {'up{job="mnemosyned", instance="a"}': "1x30"},
    ),
    "MnemosynedUnavailable": (
        {
            f'grpc_server_errors_total{{{SESSIONS}, code="UNAVAILABLE"}}': "0+2x30",
            f'grpc_server_requests_total{{{SESSIONS}, code="UNAVAILABLE"}}': "0+2x30",
            f'grpc_server_requests_total{{{SESSIONS}, code="OK"}}': "0+98x30",
        },
        {
            f'grpc_server_errors_total{{{SESSIONS}, code="UNAVAILABLE"}}': "0+1x30",
            f'grpc_server_requests_total{{{SESSIONS}, code="UNAVAILABLE"}}': "0+1x30",
            f'grpc_server_requests_total{{{SESSIONS}, code="OK"}}': "0+199x30",
        },
    ),
    "MnemosynedInternalErrors": (
        {f'grpc_server_errors_total{{{SESSIONS}, code="INTERNAL"}}': "0+1x30"},
        {f'grpc_server_errors_total{{{SESSIONS}, code="NOT_FOUND"}}': "0+1x30"},
    ),
    "MnemosynedStorageErrors": (
        {'mnemosyned_storage_postgres_errors_total{query="load"}': "0+1x30"},
        {'mnemosyned_storage_postgres_errors_total{query="load"}': "0+5x18 90x12"},
    ),
    "MnemosynedMemberDead": (
        {'mnemosyned_cluster_members{state="dead"}': "1x30"},
        {'mnemosyned_cluster_members{state="left"}': "1x30"},
    ),
    "MnemosynedUnprovenPeers": (
        {"mnemosyned_cluster_unproven_total": "0x10 0+1x20"},
        {"mnemosyned_cluster_unproven_total": "0x20 1x10"},
    ),
    "MnemosynedCallerGuesses": (
        {'mnemosyned_guess_exceeded_total{caller="address"}': "0x20 1x10"},
        {
            'mnemosyned_guess_exceeded_total{caller="address"}': "1x30",
            'mnemosyned_guess_answers_total{about="token"}': "0+100x30",
        },
    ),
    "MnemosynedCertificateEnds": (
        {"mnemosyned_tls_certificate_end_timestamp_seconds": f"{7 * 86400}x30"},
        {"mnemosyned_tls_certificate_end_timestamp_seconds": f"{8 * 86400}x30"},
    ),
    "MnemosynedAcceptFails": (
        {'grpc_server_accept_failures_total{error="EMFILE"}': "0+1x30"},
        {'grpc_server_accept_failures_total{error="ECONNABORTED"}': "0+1x30"},
    ),
    "MnemosynedWorkersDie": (
        {"mnemosyned_worker_restarts_total": "0x24 1 2 3 4 5 6"},
        {"mnemosyned_worker_restarts_total": "0x24 1x6"},
    ),
    "MnemosynedNotReady": ({"mnemosyned_ready": "0x30"}, {"mnemosyned_ready": "1x26 0x4"}),
    "MnemosynedNoLease": ({"mnemosyned_lease_valid": "0x30"}, {"mnemosyned_lease_valid": "1x28 0x2"}),
    "MnemosynedRingsDisagree": (
        {
            'mnemosyned_cluster_ring_info{job="m", instance="a", fingerprint="1"}': "1x30",
            'mnemosyned_cluster_ring_info{job="m", instance="b", fingerprint="2"}': "1x30",
        },
        {
            'mnemosyned_cluster_ring_info{job="m", instance="a", fingerprint="1"}': "1x30",
            'mnemosyned_cluster_ring_info{job="m", instance="b", fingerprint="1"}': "1x30",
        },
    ),
    "MnemosynedSlow": (
        {
            f'grpc_server_request_duration_seconds_bucket{{{SESSIONS}, le="0.5"}}': "0+98x30",
            f'grpc_server_request_duration_seconds_bucket{{{SESSIONS}, le="1"}}': "0+100x30",
            f'grpc_server_request_duration_seconds_bucket{{{SESSIONS}, le="+Inf"}}': "0+100x30",
        },
        {
            f'grpc_server_request_duration_seconds_bucket{{{SESSIONS}, le="0.5"}}': "0+995x30",
            f'grpc_server_request_duration_seconds_bucket{{{SESSIONS}, le="1"}}': "0+1000x30",
            f'grpc_server_request_duration_seconds_bucket{{{SESSIONS}, le="+Inf"}}': "0+1000x30",
        },
    ),
    "MnemosynedPoolExhausted": (
        {"mnemosyned_storage_postgres_waiting": "3x30"},
        {"mnemosyned_storage_postgres_waiting": "0 9x8 0 9x8 0 9x8 0 9x8"},
    ),
    "MnemosynedCleanupFails": (
        {"mnemosyned_cleanup_errors_total": "0x10 0+1x20"},
        {"mnemosyned_cleanup_errors_total": "0x20 1x10"},
    ),
    "MnemosynedFlood": (
        {'grpc_server_connections_ended_total{reason="flood"}': "0+40x30"},
        {'grpc_server_connections_ended_total{reason="client"}': "0+4000x30"},
    ),
    "MnemosynedCallersRefused": (
        {'mnemosyned_auth_refusals_total{reason="unknown"}': "0+40x30"},
        {'mnemosyned_auth_refusals_total{reason="unknown"}': "0+20x30"},
    ),
    "MnemosynedStalls": (
        {"mnemosyned_cluster_stalls_total": "0+1x30"},
        {"mnemosyned_cluster_stalls_total": "0x20 0+1x9"},
    ),
    "MnemosynedLogLinesLost": (
        {"mnemosyned_log_lines_dropped_total": "0x20 7x10"},
        {"mnemosyned_log_lines_dropped_total": "7x30"},
    ),
    "MnemosynedTouchesLost": (
        {"mnemosyned_touches_lost_total": "0x20 7x10"},
        {"mnemosyned_touches_lost_total": "7x30"},
    ),
    "MnemosynedDamagedSessions": (
        {"mnemosyned_damaged_sessions_total": "0x20 1x10"},
        {"mnemosyned_damaged_sessions_total": "7x30"},
    ),
}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def built(overlay: str) -> str:
    command = ["kubectl", "kustomize", str(OVERLAYS[overlay])]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=50).stdout


def resources(overlay: str) -> dict[str, dict[str, Any]]:
    """By kind, and name where a kind has several."""
    found = [one for one in yaml.safe_load_all(built(overlay)) if one]
    return {one["kind"]: one for one in found} | {one["metadata"]["name"]: one for one in found}


def container(overlay: str) -> dict[str, Any]:
    (only,) = resources(overlay)["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def environment(overlay: str, **values: str) -> dict[str, str]:
    """What the container's process sees, with what Kubernetes would put in."""
    seen = {"POD_NAME": "mnemosyned-1", "POD_NAMESPACE": "ours"} | values
    for one in container(overlay)["env"]:
        if "value" in one:
            seen[one["name"]] = re.sub(r"\$\((\w+)\)", lambda match: seen[match[1]], one["value"])
    return seen


def mounted(overlay: str, directory: Path) -> Config:
    """The configuration that the container's environment makes, its secrets mounted in a directory."""
    environ = environment(overlay)
    for name, value in environ.items():
        environ[name] = value.replace("/etc/mnemosyned", str(directory))
    return parse([], environ)


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "cluster-secret").write_text("hunter2-a-secret-for-these-tests-only\n")
    (tmp_path / "secret" / "postgres-address").write_text("postgres://u:p@h/d\n")
    authority = Authority(tmp_path / "tls")
    files = authority.files("mnemosyned-peers.ours.svc", "*.mnemosyned-peers.ours.svc")
    for name, path in (("tls.crt", files.certificate), ("tls.key", files.private_key)):
        shutil.copy(path, tmp_path / "tls" / name)
    shutil.copy(authority.path, tmp_path / "tls" / "ca.crt")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "keys").write_text(line_of(new_key(), Role.SESSION))
    return tmp_path


@needs_kubectl
@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_the_manifests_are_what_kubernetes_takes(overlay: str, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(built(overlay))
    command = [Path(sys.executable).parent / "kubernetes-validate", "--strict", tmp_path / "all.yaml"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)

    assert done.returncode == 0, done.stdout + done.stderr


@needs_kubectl
def test_the_environment_of_a_pod_makes_a_node_of_the_cluster(secrets: Path) -> None:
    config = mounted("base", secrets)

    assert config[ClusterConfig].listen == "mnemosyned-1.mnemosyned-peers.ours.svc:8090"
    assert config[ClusterConfig].seeds == ("mnemosyned-peers.ours.svc:8090",)
    assert config[ClusterConfig].bind == "[::]:8090"
    assert config[ClusterConfig].secret == ("hunter2-a-secret-for-these-tests-only",)
    assert config[PostgresConfig].address == "postgres://u:p@h/d"
    assert not config[TlsConfig].is_on


@needs_kubectl
def test_in_production_nodes_and_callers_are_known_over_tls(secrets: Path) -> None:
    config = mounted("production", secrets)

    assert config[TlsConfig].is_on
    assert config[TlsConfig].client_auth == "optional"
    assert config[TlsConfig].peer_names == ("*.mnemosyned-peers.ours.svc",)
    assert config[AuthConfig].keys_file == str(secrets / "keys" / "keys")
    assert {
        container("production")[f"{kind}Probe"]["httpGet"]["scheme"]
        for kind in ("startup", "liveness", "readiness")
    } == {"HTTPS"}


@needs_kubectl
def test_in_development_one_node_needs_nothing(secrets: Path) -> None:
    found = resources("development")

    assert mounted("development", secrets)[StorageConfig].name == "memory"
    assert found["StatefulSet"]["spec"]["replicas"] == 1
    assert not found["StatefulSet"]["spec"]["template"]["spec"].get("volumes")
    assert "PodDisruptionBudget" not in found


@needs_kubectl
@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_a_pod_may_do_little_and_has_time_to_drain(overlay: str) -> None:
    spec = resources(overlay)["StatefulSet"]["spec"]["template"]["spec"]
    security = container(overlay)["securityContext"]
    (_, pause_s) = container(overlay)["lifecycle"]["preStop"]["exec"]["command"]

    assert spec["securityContext"]["runAsNonRoot"] is True
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    # Then -drain.timeout, twice if calls ignore it, and the last writes.
    drain_s = parse([], {})[GrpcConfig].drain_timeout_s
    assert spec["terminationGracePeriodSeconds"] >= int(pause_s) + 2 * drain_s + 5


@needs_kubectl
@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_each_selector_finds_the_pods(overlay: str) -> None:
    found = resources(overlay)
    labels = found["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        found["StatefulSet"]["spec"]["selector"]["matchLabels"],
        found["mnemosyned-peers"]["spec"]["selector"],
        found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        *[
            found[kind]["spec"]["selector"]["matchLabels"]
            for kind in ("PodDisruptionBudget",)
            if kind in found
        ],
    ]

    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    assert found["StatefulSet"]["spec"]["serviceName"] == "mnemosyned-peers"
    admitted = {
        rule["ports"][0]["port"]: [one.get("podSelector", {}).get("matchLabels") for one in rule["from"]]
        for rule in found["NetworkPolicy"]["spec"]["ingress"]
    }
    # Clients have a label of their own, and reach no peers' port.
    assert admitted["grpc"] == [{"mnemosyned-client": "true"}]
    (nodes,) = admitted["peers"]
    assert nodes.items() <= labels.items()


def test_every_variable_in_the_deployments_is_a_flags() -> None:
    for path in [DEPLOY / "Dockerfile", *DEPLOY.rglob("*.yaml")]:
        named = set(re.findall(r"\bMNEMOSYNED_[A-Z_]+\b", path.read_text())) - {
            "MNEMOSYNED_CLUSTER_SECRET_FILE"
        }
        assert named <= VARIABLES, path


def test_every_image_has_a_version() -> None:
    compose = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    images = [one["image"] for one in compose["services"].values()]
    dockerfile = (DEPLOY / "Dockerfile").read_text()

    assert all(re.search(r":v?\d", image) for image in images)
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-slim", dockerfile, re.MULTILINE)


def test_the_composed_nodes_are_one_cluster() -> None:
    services = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    configs = [parse([], services[f"node-{number}"]["environment"]) for number in (1, 2, 3)]
    prometheus = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())
    (targets,) = prometheus["scrape_configs"][0]["static_configs"]

    assert {config[ClusterConfig].listen for config in configs} == set(configs[0][ClusterConfig].seeds)
    assert len({config[ClusterConfig].secret for config in configs}) == 1
    # No published port has the Peer service.
    published = {port.rpartition(":")[2] for n in (1, 2, 3) for port in services[f"node-{n}"]["ports"]}
    assert {config[ClusterConfig].bind.rpartition(":")[2] for config in configs}.isdisjoint(published)
    assert len(targets["targets"]) == 3


def test_the_composed_nodes_on_redis_store_where_the_server_is() -> None:
    composed = yaml.safe_load((COMPOSE / "redis.yaml").read_text())["services"]
    server = composed.pop("redis")
    configs = [parse([], service["environment"]) for service in composed.values()]

    for config in configs:
        address = parse_redis(config[RedisConfig].address)
        assert config[StorageConfig].name == "redis"
        assert address.hosts == (("redis", 6379),)
        assert address.login.password == server["command"][server["command"].index("--requirepass") + 1]
    assert set(composed) == {"node-1", "node-2", "node-3"}
    assert re.search(r":v?\d", server["image"])


def test_the_composed_nodes_on_mongodb_store_where_the_server_is() -> None:
    composed = yaml.safe_load((COMPOSE / "mongodb.yaml").read_text())["services"]
    server = composed.pop("mongodb")
    configs = [parse([], service["environment"]) for service in composed.values()]
    (initiate,) = [word for word in server["healthcheck"]["test"] if "rs.initiate" in word]

    for config in configs:
        address = parse_mongodb(config[MongoConfig].address)
        assert config[StorageConfig].name == "mongodb"
        # The members are known by the name by which the nodes reach them.
        assert f"host: '{address.hosts[0]}'" in initiate
        assert address.options["replicaSet"] == server["command"][server["command"].index("--replSet") + 1]
    assert set(composed) == {"node-1", "node-2", "node-3"}
    assert re.search(r":v?\d", server["image"])


def mounts(service: str) -> dict[Path, Path]:
    """What a composed service is lent, by where it sees it."""
    services = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    found = {}
    for line in services[service]["volumes"]:
        source, target, mode = line.split(":")
        assert mode == "ro"
        assert (COMPOSE / source).is_file()
        found[Path(target)] = COMPOSE / source
    return found


def expressions() -> list[str]:
    """All that the dashboard and the alerts ask Prometheus, with Grafana's variables filled in."""
    shown = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    asked = [*shown, *[rule["expr"] for rule in RULES]]
    return [one.replace("$__rate_interval", "1m").replace("$instance", "a|b") for one in asked]


def metrics_in(expression: str) -> set[str]:
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)", "", expression)
    return set(re.findall(r"\b[a-z][a-z0-9_]*\b(?!\s*\()", bare)) - {"or"}


def promtool(*arguments: str | Path) -> None:
    command = ["promtool", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr


async def test_every_metric_that_is_watched_is_exported() -> None:
    watched = {name for one in expressions() for name in metrics_in(one)}

    # `up` is Prometheus' own.
    assert watched - {"up"} <= await exported_series()
    assert len(watched) > 20


def test_every_panel_asks_the_data_source_that_is_provisioned() -> None:
    (source,) = yaml.safe_load((COMPOSE / "grafana-datasource.yaml").read_text())["datasources"]
    (node,) = DASHBOARD["templating"]["list"]

    for one in [node, *DASHBOARD["panels"]]:
        assert one["datasource"] == {"type": source["type"], "uid": source["uid"]}
    for panel in DASHBOARD["panels"]:
        assert panel["targets"]
        assert all("$instance" in target["expr"] for target in panel["targets"])


def test_no_panel_lies_on_another() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]

    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        is_apart = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert is_beside or is_apart


def test_grafana_and_prometheus_find_what_they_are_lent() -> None:
    grafana, prometheus = mounts("grafana"), mounts("prometheus")
    (provider,) = yaml.safe_load((COMPOSE / "grafana-dashboards.yaml").read_text())["providers"]
    config = Path("/etc/prometheus/prometheus.yml")
    lent = yaml.safe_load(prometheus[config].read_text())
    environment = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]["grafana"]["environment"]

    dashboard = Path(environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert grafana[dashboard].name == "grafana-dashboard.json"
    assert dashboard.parent == Path(provider["options"]["path"])
    # Prometheus looks for rules beside its configuration.
    assert all(config.parent / name in prometheus for name in lent["rule_files"])


@needs_promtool
def test_prometheus_takes_its_configuration_the_alerts_and_what_the_dashboard_asks(tmp_path: Path) -> None:
    asked = [{"record": f"asked_{number}", "expr": one} for number, one in enumerate(expressions())]
    rules = tmp_path / "asked.yaml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": asked}]}))

    promtool("check", "config", COMPOSE / "prometheus.yaml")
    promtool("check", "rules", rules)


def test_each_alert_says_how_bad_it_is_and_has_a_section_in_the_runbook() -> None:
    for rule in RULES:
        path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        headings = re.findall(r"^## (\w+)$", (ROOT / path).read_text(), re.MULTILINE)

        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["alert"] in headings
        assert anchor == rule["alert"].lower()


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    tests = []
    on_others = [
        (name, [{key.replace("_postgres_", engine): at for key, at in series.items()} for series in cases])
        for engine in ("_redis_", "_mongodb_")
        for name, cases in ALERTS.items()
        if any("_storage_postgres_" in key for key in cases[0])
    ]
    for name, cases in [*ALERTS.items(), *on_others]:
        for series, fires in zip(cases, (True, False), strict=True):
            wanted = [{"labels": f'{{alertname="{name}"}}', "value": 1}] if fires else []
            query = 'count by (alertname) (ALERTS{alertstate="firing"})'
            tests.append(
                {
                    "interval": "30s",
                    "input_series": [{"series": key, "values": value} for key, value in series.items()],
                    "promql_expr_test": [{"expr": query, "eval_time": "15m", "exp_samples": wanted}],
                }
            )
    path = tmp_path / "alerts.test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(COMPOSE / "alerts.yaml")], "tests": tests}))

    assert len(on_others) == 2 * 2
    assert ALERTS.keys() == {rule["alert"] for rule in RULES}
    promtool("test", "rules", path)


def test_the_check_that_haproxy_sends_is_a_call_of_the_health_service() -> None:
    text = (DEPLOY / "haproxy.cfg").read_text()
    sent = b"".join(
        bytes.fromhex(value) if kind == "-binary" else value[1:-1].encode().decode("unicode_escape").encode()
        for kind, value in re.findall(r"^ +tcp-check send(-binary)? (.+)$", text, re.MULTILINE)
    )
    received = H2Connection(H2Configuration(client_side=False)).receive_data(sent)
    (call,) = [event for event in received if isinstance(event, RequestReceived)]
    (body,) = [event.data for event in received if isinstance(event, DataReceived)]

    assert dict(call.headers or ()) == {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/grpc.health.v1.Health/Check",
        b":authority": b"nodes",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
    }
    assert body == framed(HealthCheckRequest().SerializeToString())
    assert isinstance(received[-1], StreamEnded)
    serving = framed(HealthCheckResponse(status=HealthCheckResponse.SERVING).SerializeToString())
    assert f"tcp-check expect min-recv 1 binary {serving.hex()}\n" in text


def test_all_that_the_image_copies_is_let_through_to_its_build() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)

    assert {f"!{name}" for line in copied for name in line.split()} == {
        line for line in ignored if line.startswith("!")
    }
    assert all((ROOT / line[1:]).exists() for line in ignored if line.startswith("!"))


def test_the_image_has_every_package_of_the_distribution() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = {name.split(".")[0] for name in setup["options"]["packages"].split()}
    copied = re.findall(r"^COPY (\S+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)

    assert packages == {Path(name).name for name in copied}


@pytest.mark.parametrize("wire", ["plain", "tls"])
def test_the_health_check_of_the_image_tells_whether_it_is_alive(wire: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    environ = {"MNEMOSYNED_PORT": str(port), "MNEMOSYNED_STORAGE": "memory"}
    if wire == "tls":
        files = Authority(tmp_path).files("localhost")
        environ |= {
            "MNEMOSYNED_TLS": "true",
            "MNEMOSYNED_TLS_CRT": files.certificate,
            "MNEMOSYNED_TLS_KEY": files.private_key,
        }

    def check() -> tuple[int, str]:
        # With a flag: a daemon that another test has left to process 1 is not looked at then.
        command = [sys.executable, "-m", "mnemosyned.commands.healthcheck", f"-port={port}"]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=30, env=os.environ | environ
        )
        return done.returncode, done.stderr

    with Daemon(f"-port={port}", environ=environ) as daemon:
        daemon.serving()
        assert check() == (0, "")
    code, text = check()

    assert code == 1
    assert len(text.splitlines()) == 1


def test_the_example_of_envoy_hashes_tokens_and_lets_only_services_of_clients_pass() -> None:
    resources = yaml.safe_load((DEPLOY / "envoy.yaml").read_text())["static_resources"]
    clusters = {one["name"]: one for one in resources["clusters"]}
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    (host,) = manager["route_config"]["virtual_hosts"]
    paths = [route["match"].get("path") or route["match"]["prefix"] for route in host["routes"]]
    hashed = [route["route"] for route in host["routes"] if "hash_policy" in route["route"]]
    headers = [[policy["header"]["header_name"] for policy in route["hash_policy"]] for route in hashed]
    by_token = clusters["nodes-by-token"]

    assert {path.split("/")[1] for path in paths} == {"mnemosynerpc.SessionManager", "grpc.health.v1.Health"}
    assert {route["route"]["cluster"] for route in host["routes"]} == set(clusters)
    assert headers == [["x-mnemosyne-token", "authorization"], ["x-mnemosyne-token"]]
    assert {route["cluster"] for route in hashed} == {"nodes-by-token"}
    assert by_token["lb_policy"] == "RING_HASH"
    assert by_token["common_lb_config"]["consistent_hashing_lb_config"]["hash_balance_factor"] > 100
    assert clusters["nodes"]["lb_policy"] == "ROUND_ROBIN"
    for cluster in clusters.values():
        assert cluster["health_checks"][0]["grpc_health_check"] == {}
