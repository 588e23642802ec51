"""Server reflection, so that grpcurl and `buf curl` need no .proto file.

grpcio-reflection knows v1alpha; v1 is the same messages under another package name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio

from mnemosyned.api.session_manager import parsed
from mnemosyned.transport.call import Call
from mnemosyned.transport.methods import MethodTable

_V1ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
_V1: Final = "grpc.reflection.v1.ServerReflection"


def add_to(table: MethodTable, services: frozenset[str]) -> None:
    """Serve both versions; they describe the services named and themselves."""
    _describe_v1()
    servicer = aio.ReflectionServicer(services | {_V1ALPHA, _V1})

    async def answer(messages: AsyncIterator[bytes], _: Call) -> AsyncIterator[bytes]:
        responses: Any = servicer.ServerReflectionInfo(_requests(messages), None)
        async for response in responses:
            yield response.SerializeToString()

    for version in (_V1ALPHA, _V1):
        table.add_stream(version, "ServerReflectionInfo", answer)


async def _requests(messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for message in messages:
        yield parsed(reflection_pb2.ServerReflectionRequest, message)


def _describe_v1() -> None:
    v1alpha = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1alpha)
    v1 = text_format.MessageToString(v1alpha).replace("v1alpha", "v1")
    descriptor_pool.Default().Add(text_format.Parse(v1, FileDescriptorProto()))
