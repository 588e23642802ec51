"""What a session is and what may be done with it: no gRPC, no sockets, no SQL.

Reading order: `model` and `token` (values and limits), `bag` and `encoded` (stored and sent forms),
`lifetime` (the rules of time), `store` (the port that storage engines implement), `service` (the use
cases), `coherence` (who must drop which copy before which acknowledgement), `batched` (single calls in,
batches out), `touches` and `cleanup` (work in the background), `clock` (the storage's clock), `token_hash`
(tokens at rest), `config` (the flags of all this).
"""
