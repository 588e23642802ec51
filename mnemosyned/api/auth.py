"""Which caller may call which method of the SessionManager: `-auth.keys`.

A caller shows an API key in the metadata `x-api-key`, or a certificate in the TLS handshake. The file of
callers (security/api_keys.py) gives it one of three roles, each of which may do all that the one before may:

    readonly   Get, Context, Exists
    session    Start, SetValue, Abandon, and their older names
    admin      List, Delete, and any method that is added and not named here

Two mistakes are possible in a call, and have two statuses, as in HTTP:

- UNAUTHENTICATED: the call has no credential, or an unknown key. A key that is unknown is not helped by a
  certificate: a caller that sends a key wants that key's role.
- PERMISSION_DENIED: the credential is valid, and its role does not allow the method.

The guard wraps the handlers of the table for clients, and stands before the router (assembly.py). Hence a
call that is forwarded to its token's owner has passed the guard at the entry node, and the owner does not
ask again: it has neither the key nor the certificate. The health service and reflection need no role, since
balancers and tools call them without a credential.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from aio.later import Later
from mnemosyned.api.session_manager import SERVICE_NAME
from mnemosyned.errors import PermissionDenied, Unauthenticated
from mnemosyned.security.api_keys import Callers, Role
from mnemosyned.transport.call import Call, Encoded
from mnemosyned.transport.methods import MethodTable, UnaryHandler

if TYPE_CHECKING:
    from mnemosyned.observe.metrics import AuthMetrics

KEY_METADATA: Final = "x-api-key"
# By method of the SessionManager. A method that is not here needs ADMIN: one that is forgotten here is then
# closed to most callers, which is noticed, and not open to all, which is not.
LEAST_ROLE: Final = {
    "Get": Role.READONLY,
    "Context": Role.READONLY,
    "Exists": Role.READONLY,
    "Start": Role.SESSION,
    "Create": Role.SESSION,
    "SetValue": Role.SESSION,
    "SetData": Role.SESSION,
    "Abandon": Role.SESSION,
}


def guard(table: MethodTable, callers: Callable[[], Callers], metrics: AuthMetrics) -> None:
    """Replace each method of the SessionManager in the table by one that asks for the caller's role first.

    `callers` returns the callers of now, so that a changed file takes effect with the next call.
    """
    for path, method in list(table.unary.items()):
        _, service, name = path.split("/")
        if service == SERVICE_NAME:
            guarded = _guarded(name, method.handle, callers, metrics)
            table.add_unary(service, name, guarded, max_message_bytes=method.max_message_bytes)


def _guarded(
    name: str, handle: UnaryHandler, callers: Callable[[], Callers], metrics: AuthMetrics
) -> UnaryHandler:
    least = LEAST_ROLE.get(name, Role.ADMIN)

    def guarded(message: bytes, call: Call) -> Encoded | Later[Encoded] | Coroutine[Any, Any, Encoded]:
        key = call.metadata(KEY_METADATA)
        role = callers().role_of(key, call.certificate_names)
        if role is None:
            metrics.refused("missing" if key is None else "unknown")
            # The text does not repeat the key: it may be a good one of another cluster.
            what = "the call has no API key" if key is None else "the API key is unknown"
            raise Unauthenticated(f"mnemosyned: {what} (metadata {KEY_METADATA})")
        if role < least:
            metrics.refused("role")
            raise PermissionDenied(f"mnemosyned: {name} needs the role {least.word}, and this is {role.word}")
        return handle(message, call)

    return guarded
