"""What each parameter of a PostgreSQL address does here. Pure.

    used      this daemon honours it, as libpq does
    setting   a run-time parameter of PostgreSQL: set on each connection
    dropped   it has no meaning here; the log and -check-config say so, with what to use instead
    refused   dropping it would weaken security, or it asks for what a session store cannot work with
    unknown   refused, with the nearest name that is known

The names are those of libpq (PostgreSQL 18), of Go's drivers, and of what providers, poolers and
object-relational mappers print in addresses. A parameter that is dropped may have values that are refused
(`unless`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Final


@dataclass(frozen=True, slots=True)
class Dropped:
    """A parameter without a meaning here."""

    word: str  # why, or what to use instead
    unless: Mapping[str, str] = field(
        default_factory=dict
    )  # values that are refused, and why; "*": all others
    harmless: frozenset[str] = frozenset()


USED: Final = frozenset({
    "host", "hostaddr", "port", "user", "password", "passfile", "dbname", "service", "servicefile",
    "sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl", "sslnegotiation", "sslsni",
    "sslcertmode", "ssl", "requiressl", "ssl_min_protocol_version", "ssl_max_protocol_version",
    "application_name", "fallback_application_name", "options", "load_balance_hosts", "target_session_attrs",
    "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout",
    "krbsrvname", "gsslib",
})  # fmt: skip

# Whatever else a user may want to set; the time-outs and the plan's switches are this daemon's own.
SETTINGS: Final = frozenset({
    "search_path", "role", "synchronous_commit", "work_mem", "maintenance_work_mem", "timezone", "datestyle",
    "intervalstyle", "extra_float_digits", "client_min_messages", "log_statement", "log_duration",
    "log_min_duration_statement", "log_min_messages", "default_transaction_deferrable", "row_security",
    "temp_buffers", "geqo", "tcp_keepalives_idle", "tcp_keepalives_interval",
    "tcp_keepalives_count", "client_connection_check_interval", "transaction_timeout", "commit_delay",
    "bytea_output", "default_tablespace", "track_activities", "lc_messages",
})  # fmt: skip

_POOL: Final = Dropped("-postgres.pool.size is the limit of connections")
_PREPARED: Final = Dropped("statements are prepared; a pooler needs session mode")
_TIMEOUT: Final = Dropped("-postgres.statement.timeout is the limit of a statement")
_CONNECT: Final = Dropped("-postgres.connect.timeout is the limit")
_OWN: Final = Dropped("this daemon sets it itself")
_OTHER: Final = Dropped("it is for another client library")
_OFF: Final = frozenset({"", "0", "false", "off", "no", "disable", "disabled"})

DROPPED: Final[dict[str, Dropped]] = {
    # libpq's own.
    "channel_binding": Dropped(
        "the driver has no channel binding; sslmode=verify-full makes sure of the server",
        {
            "require": "the driver has no channel binding; use sslmode=verify-full and sslrootcert instead, "
            "which make sure of the server too"
        },
    ),
    "gssencmode": Dropped(
        "the driver has no GSSAPI encryption",
        {"require": "the driver has no GSSAPI encryption; remove it, and use sslmode=verify-full"},
    ),
    "gssdelegation": Dropped("the driver delegates no credentials"),
    "require_auth": Dropped(
        "", {"*": "the driver cannot limit the server's choice; remove it, and use sslmode=verify-full"},
        frozenset({""}),
    ),
    "requirepeer": Dropped(
        "", {"*": "the driver cannot check the server's user; remove it"}, frozenset({""})
    ),
    "sslcrldir": Dropped("", {"*": "name one file in sslcrl instead"}, frozenset({""})),
    "sslcompression": Dropped("TLS has no compression"),
    "sslkeylogfile": Dropped("", {"*": "it would write keys of connections to a file"}, frozenset({""})),
    "connect_timeout": _CONNECT,
    "client_encoding": Dropped(
        "it is always UTF-8",
        {"*": "sessions are UTF-8; remove it"},
        frozenset({"utf8", "utf-8", "'utf-8'", "unicode", "auto", "UTF8", "UTF-8", "UNICODE"}),
    ),
    "replication": Dropped("", {"*": "sessions need an ordinary connection; remove it"}, _OFF),
    "min_protocol_version": Dropped("the driver speaks protocol 3.0"),
    "max_protocol_version": Dropped("the driver speaks protocol 3.0"),
    "tty": _OTHER,
    # This daemon's own settings (session_settings.py).
    "statement_timeout": _TIMEOUT,
    "lock_timeout": _TIMEOUT,
    "idle_in_transaction_session_timeout": _TIMEOUT,
    "idle_session_timeout": _OWN,
    "jit": _OWN,
    "enable_seqscan": _OWN,
    "plan_cache_mode": _OWN,
    "default_transaction_isolation": _OWN,
    "standard_conforming_strings": _OWN,
    # Go's drivers.
    "binary_parameters": _OTHER,
    "disable_prepared_binary_result": _OTHER,
    "default_query_exec_mode": _PREPARED,
    "statement_cache_mode": _PREPARED,
    "statement_cache_capacity": _PREPARED,
    "description_cache_capacity": _PREPARED,
    "pool_max_conns": _POOL,
    "pool_min_conns": _POOL,
    "pool_min_idle_conns": _POOL,
    "pool_max_conn_lifetime": _POOL,
    "pool_max_conn_lifetime_jitter": _POOL,
    "pool_max_conn_idle_time": _POOL,
    "pool_health_check_period": _POOL,
    "sslinline": Dropped("", {"*": "certificates are read from files"}, _OFF),
    # Poolers and providers.
    "pgbouncer": _PREPARED,
    "pool_mode": _PREPARED,
    "supa": _OTHER,
    "uselibpqcompat": _OTHER,
    # Prisma, SQLAlchemy, psycopg, asyncpg, Rails, node-postgres, JDBC.
    "schema": Dropped("-postgres.schema names the schema of the table"),
    "currentSchema": Dropped("-postgres.schema names the schema of the table"),
    "sslaccept": Dropped("sslmode decides", {"strict": "use sslmode=verify-full"}),
    "sslidentity": Dropped("", {"*": "use sslcert and sslkey, with PEM files"}, frozenset({""})),
    "connection_limit": _POOL,
    "pool": _POOL,
    "pool_size": _POOL,
    "poolsize": _POOL,
    "max": _POOL,
    "min": _POOL,
    "min_size": _POOL,
    "max_size": _POOL,
    "max_overflow": _POOL,
    "pool_timeout": _TIMEOUT,
    "pool_recycle": _POOL,
    "pool_pre_ping": _POOL,
    "checkout_timeout": _TIMEOUT,
    "idle_timeout": _POOL,
    "reaping_frequency": _POOL,
    "socket_timeout": _TIMEOUT,
    "socketTimeout": _TIMEOUT,
    "command_timeout": _TIMEOUT,
    "query_timeout": _TIMEOUT,
    "connectTimeout": _CONNECT,
    "loginTimeout": _CONNECT,
    "timeout": _CONNECT,
    "statement_cache_size": _PREPARED,
    "prepared_statements": _PREPARED,
    "prepared_statement_cache_size": _PREPARED,
    "prepare_threshold": _PREPARED,
    "prepareThreshold": _PREPARED,
    "preferQueryMode": _PREPARED,
    "ApplicationName": Dropped("use application_name"),
    "tcpKeepAlive": Dropped("use keepalives"),
    "reWriteBatchedInserts": _OTHER,
    "async_fallback": _OTHER,
    "charset": _OTHER,
    "encoding": _OTHER,
    "adapter": _OTHER,
}  # fmt: skip

# What libpq reads from the environment for what an address leaves out.
VARIABLES: Final = {
    "PGHOST": "host",
    "PGHOSTADDR": "hostaddr",
    "PGPORT": "port",
    "PGDATABASE": "dbname",
    "PGUSER": "user",
    "PGPASSWORD": "password",
    "PGPASSFILE": "passfile",
    "PGSERVICE": "service",
    "PGSERVICEFILE": "servicefile",
    "PGOPTIONS": "options",
    "PGAPPNAME": "application_name",
    "PGSSLMODE": "sslmode",
    "PGREQUIRESSL": "requiressl",
    "PGSSLNEGOTIATION": "sslnegotiation",
    "PGSSLCERT": "sslcert",
    "PGSSLKEY": "sslkey",
    "PGSSLROOTCERT": "sslrootcert",
    "PGSSLCRL": "sslcrl",
    "PGSSLCRLDIR": "sslcrldir",
    "PGSSLSNI": "sslsni",
    "PGSSLCERTMODE": "sslcertmode",
    "PGSSLMINPROTOCOLVERSION": "ssl_min_protocol_version",
    "PGSSLMAXPROTOCOLVERSION": "ssl_max_protocol_version",
    "PGTARGETSESSIONATTRS": "target_session_attrs",
    "PGLOADBALANCEHOSTS": "load_balance_hosts",
    "PGCHANNELBINDING": "channel_binding",
    "PGREQUIREAUTH": "require_auth",
    "PGREQUIREPEER": "requirepeer",
    "PGGSSENCMODE": "gssencmode",
    "PGKRBSRVNAME": "krbsrvname",
    "PGGSSLIB": "gsslib",
}


def complaint_about(name: str, value: str) -> str:
    """Return why a parameter is refused; empty: it is not."""
    if name in USED or name.lower() in SETTINGS or _is_of_an_extension(name):
        return ""
    dropped = DROPPED.get(name)
    if dropped is None:
        near = get_close_matches(name.lower(), [*USED, *SETTINGS, *DROPPED], n=1, cutoff=0.7)
        return "is not known" + (f"; perhaps {near[0]}" if near else "")
    if value in dropped.unless:
        return f"cannot be {value}: {dropped.unless[value]}"
    if "*" in dropped.unless and value not in dropped.harmless:
        return f"cannot be used: {dropped.unless['*']}"
    return ""


def word_about(name: str) -> str:
    """Return why a parameter is dropped; empty: it is not."""
    return DROPPED[name].word or "it asks for nothing" if name in DROPPED else ""


def is_setting(name: str) -> bool:
    """Tell whether a parameter is one of PostgreSQL's own, or of an extension of it."""
    return name.lower() in SETTINGS or _is_of_an_extension(name)


def _is_of_an_extension(name: str) -> bool:
    prefix, dot, rest = name.partition(".")
    return bool(dot and prefix.isidentifier() and rest.isidentifier())
