"""What people and machines see of the daemon: `logs`, `metrics`, and `fingerprint`, a token's name in a log.

A leaf: these modules know no other part of the daemon. Each part counts for itself, and logs through the
standard library.
"""
