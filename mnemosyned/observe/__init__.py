"""What people and machines see of the daemon: `logs`, `metrics`, and `fingerprint`, a token's name in a log.

Other parts depend on this package as little as it does on them. Each part counts its own work, and logs
through the standard library; the modules here collect and render that.
"""
