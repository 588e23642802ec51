"""Who may connect and call, and what stays hidden.

Reading order: `tls` and `certificates` (files of TLS, names in certificates), `api_keys` (the file of callers
and their roles), `file_reloader` (changed files take effect without a restart), `process_title` (secrets on
the command line), `config` (the flags of all this).

How nodes authenticate one another is in cluster/peer_auth.py; tokens at rest are in sessions/token_hash.py.
"""
