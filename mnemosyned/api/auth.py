"""Which of the callers may call a method; for clients alone, since peers have asked before they forward."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from mnemosyned.api.session_manager import SERVICE_NAME
from mnemosyned.errors import PermissionDenied, Unauthenticated
from mnemosyned.security.api_keys import Callers, Role
from mnemosyned.transport.call import Call
from mnemosyned.transport.methods import MethodTable, UnaryHandler

if TYPE_CHECKING:
    from mnemosyned.observe.metrics import AuthMetrics

KEY_METADATA: Final = "x-api-key"
# Of the SessionManager's; what is not here needs ADMIN.
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
    """Let each method of the SessionManager be called by those alone whose role allows it."""
    for path, method in list(table.unary.items()):
        _, service, name = path.split("/")
        if service == SERVICE_NAME:
            guarded = _guarded(name, method.handle, callers, metrics)
            table.add_unary(service, name, guarded, max_message_bytes=method.max_message_bytes)


def _guarded(
    name: str, answer: UnaryHandler, callers: Callable[[], Callers], metrics: AuthMetrics
) -> UnaryHandler:
    least = LEAST_ROLE.get(name, Role.ADMIN)

    def guarded(message: bytes, call: Call) -> bytes | Coroutine[Any, Any, bytes]:
        key = call.metadata(KEY_METADATA)
        role = callers().role_of(key, call.certificate_names)
        if role is None:
            metrics.refused("missing" if key is None else "unknown")
            what = "the call has no API key" if key is None else "the API key is not known here"
            raise Unauthenticated(f"mnemosyned: {what} (metadata {KEY_METADATA})")
        if role < least:
            metrics.refused("role")
            raise PermissionDenied(f"mnemosyned: {name} needs the role {least.word}, and this is {role.word}")
        return answer(message, call)

    return guarded
