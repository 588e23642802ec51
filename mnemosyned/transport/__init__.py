"""How calls arrive: the method table, the port that gRPC engines implement, and two engines.

Reading order: `methods` (what is served), `call` (what becomes of a call, on every engine), `engine` (the
port, and what gRPC requires), `frame` (gRPC's own framing, pure), `status` (errors as statuses),
`h2corn_engine` and `grpcio_engine`, `traces` (spans around methods), `config` (the flags of the gRPC port).
"""
