"""The gRPC services, on values of protobuf: what a client or a peer may ask, and which node handles it.

Reading order: `session_manager` (messages to use cases, and the three forms of an RPC), `router` (the token's
owner, or this node), `peer` (what other nodes ask), `auth` (roles of callers), `health` and `reflection` (the
standard services).

A service adds its methods to a table (transport/methods.py). No module here knows an engine or a storage.
"""
