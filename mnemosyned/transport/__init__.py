"""How calls arrive: the method table, the port that gRPC engines implement, and two engines.

Reading order: `methods` (what is served), `call` (what becomes of a call, on every engine), `engine` (the
port, and what gRPC requires), `frame` (gRPC's own framing, pure), `status` (errors as statuses). Then the
default engine: `h2_engine` (what all connections share), `acceptor` (how connections arrive) and
`h2_connection` (one of them), on the decisions of `http2/server.py`. Then `grpcio_engine` (the reference),
`traces` (spans around methods) and `config` (the flags of the gRPC port).
"""
