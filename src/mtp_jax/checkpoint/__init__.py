"""Checkpoints of a run.

    record.py        the JSON in them, which of them is whole, and what it lets a run resume
    manifest.py      digests of their files
    fingerprint.py   a digest of arrays, the same on any mesh
    store.py         their arrays; the only door to Orbax
"""
