"""Checkpoints of a run.

    record.py   the JSON in them, and what it lets a run resume
    store.py    their arrays; the only door to Orbax
"""
