"""Tools for asyncio that know nothing of sessions, clusters or caches.

`batcher` turns single calls into batches; `tasks` owns background tasks; `periodic` repeats work and
survives its bugs; `deadline` is the instant until which a caller waits; `rate_limit` bounds log lines;
`units` has units of time.
"""
