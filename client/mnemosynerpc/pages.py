"""All sessions that List can show, page by page: each that exists throughout comes once, used or not.

    request, page_token "" ──> page, next_page_token ──> request, page_token … ──> the last page, ""

A page may be short, or without sessions, and not be the last one.
"""

from __future__ import annotations

from collections.abc import Iterator

from mnemosynerpc.session_pb2 import ListRequest, ListResponse, Session
from mnemosynerpc.session_pb2_grpc import SessionManagerStub


def pages(
    stub: SessionManagerStub, request: ListRequest, *, timeout_s: float = 10.0
) -> Iterator[ListResponse]:
    """Yield the pages from the one of the request on; without a page token, from the beginning, by token.

    The time is for each page. Raises grpc.RpcError; then the request's `page_token` is that of the page that
    failed, and the same call goes on there.
    """
    # Set, and perhaps empty: by token from the first page on.
    request.page_token = request.page_token
    while True:
        page = stub.List(request, timeout=timeout_s)
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def sessions(stub: SessionManagerStub, request: ListRequest, *, timeout_s: float = 10.0) -> Iterator[Session]:
    """Yield the sessions of all pages. Raises grpc.RpcError."""
    for page in pages(stub, request, timeout_s=timeout_s):
        yield from page.sessions
