"""Several processes as one daemon, for all processors of a host: `-workers`.

                      clients                         other hosts           Prometheus, probes, people
                         |                                 |                          |
        one listening socket, shared by all       a peers' port each             admin port
              |                 |                      |       |                      |
          worker 1          worker 2 …             worker 1  worker 2 …          supervisor
              └── Unix sockets ─┘                                                     |
                                                             Unix sockets to each worker's admin server

A worker is a whole daemon (daemon.py) and a node of the cluster. The supervisor starts the workers, and again
when they die, passes signals on, and answers for all of them on the admin port. No call passes through it.

    supervisor.py   the life of the whole: start, signals, drain, restarts, when to give up
    process.py      one process of a worker: how it is started, what it tells, how it ends
    worker.py       where such a process begins
    sockets.py      what the supervisor opens: sockets for clients, the directory for the rest
    asking.py       a request to a worker's admin server
    health.py       /healthz and /healthr of all workers, and /debug/cluster
    totals.py       /metrics: what all workers count, added up

What a worker knows of this is in place.py, and who accepts the next connection in transport/turns.py.
"""
