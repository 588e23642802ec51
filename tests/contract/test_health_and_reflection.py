from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse
from serving import ENGINES, Node, serving

from mnemosyned.storage.memory import MemoryStore

SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING
SERVICE = "mnemosynerpc.SessionManager"


@pytest.fixture(params=sorted(ENGINES))
async def node(request: pytest.FixtureRequest) -> AsyncIterator[Node]:
    store = MemoryStore()
    async with serving(store, request.param) as one:
        yield one


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_check_tells_the_state(node: Node, service: str) -> None:
    stub = HealthStub(node.channel)

    assert (await stub.Check(HealthCheckRequest(service=service))).status == SERVING
    node.health.set_serving(False)
    assert (await stub.Check(HealthCheckRequest(service=service))).status == NOT_SERVING


async def test_list_tells_them_all(node: Node) -> None:
    listed = await HealthStub(node.channel).List(HealthListRequest())

    assert {name: answer.status for name, answer in listed.statuses.items()} == {
        "": SERVING,
        SERVICE: SERVING,
        "grpc.health.v1.Health": SERVING,
    }


async def test_check_knows_only_our_services(node: Node) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await HealthStub(node.channel).Check(HealthCheckRequest(service="other"))

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watch_tells_each_change_and_ends_with_the_drain(node: Node) -> None:
    watch = HealthStub(node.channel).Watch(HealthCheckRequest(service=SERVICE))
    seen = [(await watch.read()).status]
    node.health.set_serving(False)
    seen.append((await watch.read()).status)
    node.health.set_serving(True)
    seen.append((await watch.read()).status)
    node.health.close()
    seen.append((await watch.read()).status)

    assert seen == [SERVING, NOT_SERVING, SERVING, NOT_SERVING]
    assert await watch.read() == grpc.aio.EOF
    await asyncio.wait_for(node.engine.drain(), 5)


async def test_watch_of_an_unknown_service_goes_on(node: Node) -> None:
    watch = HealthStub(node.channel).Watch(HealthCheckRequest(service="other"))

    assert (await watch.read()).status == HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


async def test_a_watcher_that_leaves_is_forgotten(node: Node) -> None:
    watch = HealthStub(node.channel).Watch(HealthCheckRequest())
    await watch.read()
    watch.cancel()
    stats = node.table.streams["/grpc.health.v1.Health/Watch"].stats
    async with asyncio.timeout(5):
        while stats.in_flight:
            await asyncio.sleep(0)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_describes_the_service(node: Node, version: str) -> None:
    path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    call = node.channel.stream_stream(
        path,
        request_serializer=ServerReflectionRequest.SerializeToString,
        response_deserializer=ServerReflectionResponse.FromString,
    )()
    await call.write(ServerReflectionRequest(list_services=""))
    listed = await call.read()
    await call.write(ServerReflectionRequest(file_containing_symbol=SERVICE))
    described = await call.read()
    await call.done_writing()

    assert SERVICE in {service.name for service in listed.list_services_response.service}
    assert described.file_descriptor_response.file_descriptor_proto
    assert await call.read() == grpc.aio.EOF


async def test_a_caller_that_vanishes_from_its_stream_is_no_error_of_ours(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    channel = grpc.aio.insecure_channel(node.address)
    call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")()
    await call.write(ServerReflectionRequest(list_services="").SerializeToString())
    assert await call.read()
    await channel.close()

    stats = node.table.streams["/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"].stats
    async with asyncio.timeout(5):
        while stats.in_flight:
            await asyncio.sleep(0.01)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.fixture
def buf() -> str:
    found = shutil.which("buf", path=str(Path(sys.executable).parent))
    assert found is not None
    return found


async def test_buf_curl_calls_it_by_reflection_alone(node: Node, buf: str) -> None:
    start = '{"session": {"subject_id": "user:1", "bag": {"k": "v"}}}'
    url = f"http://{node.address}/{SERVICE}/Start"
    process = await asyncio.create_subprocess_exec(
        buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", start, url,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 30)

    assert process.returncode == 0, err.decode()
    assert json.loads(out)["session"]["bag"] == {"k": "v"}
