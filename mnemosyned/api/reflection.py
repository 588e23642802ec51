"""Server reflection, so that grpcurl and `buf curl` need no .proto file.

Clients ask for one of two versions of the service, and try v1 first. The package grpcio-reflection has only
v1alpha, but the two have the same messages: v1 is v1alpha under another package name. Hence one servicer
answers both, and only its description of itself is made twice.

Of our services, those that clients may call are described (assembly.py). The Peer service is not: it is
between nodes of one release or the next, and no client could sign a call of it.

The packages are imported with the first call, since few daemons ever get one: they take long to import.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cache
from typing import Any, Final

from mnemosyned.api.parsing import parsed
from mnemosyned.transport.call import Call
from mnemosyned.transport.methods import MethodTable
from mnemosyned.transport.places import StreamPlaces

_V1ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
_MAX_MESSAGE_BYTES: Final = 16 * 1024  # the name of a file or a symbol
# A tool has one for as long as it runs.
_MAX_STREAMS: Final = 4
_MAX_ALL_STREAMS: Final = 100
_V1: Final = "grpc.reflection.v1.ServerReflection"


def add_to(table: MethodTable, services: frozenset[str]) -> None:
    """Serve both versions; they describe the named services and themselves."""
    places = StreamPlaces(per_connection=_MAX_STREAMS, total=_MAX_ALL_STREAMS)

    async def handle(messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        with places.take(call):
            async for response in answers(messages):
                yield response

    async def answers(messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        # On a thread: it imports packages.
        servicer = await asyncio.to_thread(_servicer, services)
        # The servicer is made for a server of grpcio, but uses nothing of its context.
        responses: Any = servicer.ServerReflectionInfo(_requests(messages), None)
        async for response in responses:
            yield response.SerializeToString()

    for version in (_V1ALPHA, _V1):
        table.add_stream(version, "ServerReflectionInfo", handle, max_message_bytes=_MAX_MESSAGE_BYTES)


@cache
def _servicer(services: frozenset[str]) -> Any:  # noqa: ANN401  # its stubs have no such class
    from grpc_reflection.v1alpha.reflection import aio

    _describe_v1()
    return aio.ReflectionServicer(services | {_V1ALPHA, _V1})


async def _requests(messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

    async for message in messages:
        yield parsed(ServerReflectionRequest, message)


def _describe_v1() -> None:
    from google.protobuf import descriptor_pool, text_format
    from google.protobuf.descriptor_pb2 import FileDescriptorProto
    from grpc_reflection.v1alpha import reflection_pb2

    # Through the text form, where one replacement renames package, services and types alike. The pool accepts
    # a file that it already has, if the content is the same, so calling it twice does no harm.
    v1alpha = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1alpha)
    v1 = text_format.MessageToString(v1alpha).replace("v1alpha", "v1")
    descriptor_pool.Default().Add(text_format.Parse(v1, FileDescriptorProto()))
