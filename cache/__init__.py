"""A bounded cache that loads what it lacks, and never keeps what a write has replaced.

Reading order: `lru` (the entries and their bounds), `backend` (the same entries as an aiocache cache),
`singleflight` (one load for many callers), `read_through` (all of it together, with the fence around every
fill). The package knows neither sessions nor the network: keys are strings, values anything.
"""
