"""Files with secrets that others may write, nonsense in files, and what other users of the host can read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from certificates import Authority
from processes import mnemosyned
from redteam.lab import Lab, attack, require, wait_until
from secrecy import CANARY

_KIND: Final = "file"
_SECRET: Final = f"{CANARY}-secret-of-a-file-that-is-long-enough"
_MEMORY: Final = ("-storage=memory", "-port=0")
_POSTGRES: Final = "postgres://u@127.0.0.1:1/d"
_REDIS: Final = f"redis://:{CANARY}-the-password@127.0.0.1:1/0"
_MONGODB: Final = f"mongodb://u:{CANARY}-the-password@127.0.0.1:1/d"
# Nonsense must not be repeated: it may be a secret in the wrong file.
_NONSENSE: Final = {
    "words": f"{CANARY} nonsense\n".encode(),
    "bytes": bytes(range(256)) * 4,
    "an unknown role": f"god sha256:{'0' * 64}\n".encode(),
    "a short hash": b"admin sha256:1234\n",
}


def _write(path: Path, content: bytes | str, mode: int = 0o600) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return path


def _valid(lab: Lab) -> dict[str, tuple[Path, list[str]]]:
    """Return, for each flag that names a file with a secret, such a file and all flags that go with it."""
    _, out, err = mnemosyned("key", "session")
    (digest,) = (word for word in (out + err).split() if word.startswith("sha256:"))
    files = {
        "auth.keys": _write(lab.scratch / "auth.keys", f"session {digest}\n"),
        "cluster.secret.file": _write(lab.scratch / "secret", _SECRET),
        "token.key.file": _write(lab.scratch / "token", _SECRET),
        "postgres.address.file": _write(lab.scratch / "address", _POSTGRES),
        "redis.address.file": _write(lab.scratch / "redis", _REDIS),
        "mongodb.address.file": _write(lab.scratch / "mongodb", _MONGODB),
        "tls.key": lab.scratch / "ca" / "node" / "key.pem",
        "config": _write(lab.scratch / "config.toml", 'log.level = "info"\n'),
    }
    tls = Authority(lab.scratch / "ca").flags("127.0.0.1")
    for path in (lab.scratch / "ca" / "node").iterdir():
        path.chmod(0o600)
    others: dict[str, list[str]] = {
        "cluster.secret.file": [f"-postgres.address={_POSTGRES}", "-cluster.listen=127.0.0.1:7000"],
        "token.key.file": [f"-postgres.address={_POSTGRES}"],
        "tls.key": [*_MEMORY, *(flag for flag in tls if not flag.startswith("-tls.key"))],
        "postgres.address.file": [],
        "redis.address.file": ["-storage=redis"],
        "mongodb.address.file": ["-storage=mongodb"],
    }
    return {name: (path, [*others.get(name, _MEMORY), f"-{name}={path}"]) for name, path in files.items()}


def _complaint(flags: Sequence[str]) -> str:
    """Return what -check-config says against the flags; empty if it finds them valid."""
    code, out, err = mnemosyned("-check-config", *flags)
    return (err or out or "no word") if code else ""


@attack(_KIND, "files with secrets that others may write", quick_on=("h2",), engines=("h2",))
def _writable(lab: Lab) -> None:
    taken = []
    for name, (path, flags) in _valid(lab).items():
        for mode in (0o602, 0o622, 0o666):
            path.chmod(0o600)
            complaint = _complaint(flags)
            require(not complaint, f"-{name} is refused as it should be: {complaint}")
            path.chmod(mode)
            if not _complaint(flags):
                taken.append(f"-{name} {mode:o}")
        link = path.with_name(f"{path.name}.link")
        link.symlink_to(path)
        if not _complaint([flag.replace(str(path), str(link)) for flag in flags]):
            taken.append(f"-{name} by a link")
    require(not taken, f"valid, though others may write them: {taken}")


@attack(_KIND, "a file of keys that others may write, at a start", engines=("h2",))
def _writable_at_start(lab: Lab) -> None:
    path, flags = _valid(lab)["auth.keys"]
    path.chmod(0o666)
    # It would run on if it were taken; a refusal is one line, and an exit code.
    code, _, err = mnemosyned(*flags, "-log.level=fatal", "-check-config")
    require(code, "the daemon would start")
    require(err.count("\n") == 1, f"the refusal is not one line: {err}")


@attack(_KIND, "files with secrets that others may read", engines=("h2",))
def _readable(lab: Lab) -> None:
    path, flags = _valid(lab)["auth.keys"]
    path.chmod(0o644)
    daemon = lab.node(*[flag for flag in flags if flag not in _MEMORY], watches=False)
    warned = wait_until(lambda: any(str(path.name) in line and "read" in line for line in daemon.lines), 3.0)
    require(warned, "there is no warning of a file that others may read")


def _nonsense_for(name: str) -> dict[str, bytes]:
    if name in ("config", "auth.keys"):
        # Without a line, they say nothing that is wrong.
        return _NONSENSE
    if name in ("cluster.secret.file", "token.key.file"):
        # Any long words are a secret.
        return {"bytes": _NONSENSE["bytes"], "nothing": b""}
    return _NONSENSE | {"nothing": b""}


@attack(_KIND, "nonsense in files, and -check-config", engines=("h2",))
def _nonsense(lab: Lab) -> None:
    taken = []
    for name, (path, flags) in _valid(lab).items():
        for what, content in _nonsense_for(name).items():
            before = path.read_bytes()
            _write(path, content)
            if not _complaint(flags):
                taken.append(f"-{name}: {what}")
            _write(path, before)
    others = Authority(lab.scratch / "other").issue("127.0.0.1")
    tls = Authority(lab.scratch / "ca2").flags("127.0.0.1")
    mixed = [flag for flag in tls if not flag.startswith("-tls.key")] + [f"-tls.key={others / 'key.pem'}"]
    if not _complaint([*_MEMORY, *mixed]):
        taken.append("-tls.key of another certificate")
    for flag in ("tls.crt", "tls.ca"):
        path = _write(lab.scratch / "nonsense.pem", _NONSENSE["words"])
        rest = [one for one in tls if not one.startswith(f"-{flag}")]
        if not _complaint([*_MEMORY, *rest, f"-{flag}={path}"]):
            taken.append(f"-{flag}: words")
    require(not taken, f"valid, though nonsense: {taken}")


def _not_root() -> str:
    return "" if os.geteuid() == 0 and shutil.which("setpriv") else "needs root and setpriv"


@attack(_KIND, "the memory and the environment of a daemon, for its own user", needs=_not_root)
def _dumpable(lab: Lab) -> None:
    as_user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    daemon = lab.node(prefix=as_user)
    process = Path(f"/proc/{daemon.process.pid}")
    limits = (process / "limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    # The kernel gives the files of a process that must not be dumped to root.
    owner = (process / "environ").stat().st_uid
    require(
        owner == 0, f"any process of the daemon's user may read its memory; core limit: {core.split()[4]}"
    )


@attack(_KIND, "the list of processes", engines=("h2",))
def _process_list(lab: Lab) -> None:
    keys = _write(lab.scratch / "keys", _SECRET)
    daemon = lab.node(
        f"-token.key.file={keys}",
        f"-cluster.secret={_SECRET}",
        "-cluster.listen=127.0.0.1:7000",
        storage="postgres",
        watches=False,
    )
    shown = Path(f"/proc/{daemon.process.pid}/cmdline").read_bytes()
    require(_SECRET.encode() not in shown, "the list of processes shows the secret")
    password = lab.dsn.partition("@")[0].rpartition(":")[2].encode()
    require(password not in shown, "the list of processes shows the password of the database")
