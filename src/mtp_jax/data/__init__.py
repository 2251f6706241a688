"""From files to batches, in rooms that build on one another; nothing here needs JAX.

    inputs.py      files to documents, and what is wrong with a record  (the door to fsspec)
    shards.py      tokens on disk and back: hash-checked blocks          (the door to ArrayRecord)
    prepare.py     inputs to a prepared set, in parallel, once, resumable
    packing.py     which tokens of a stream make a row
    rows.py        rows to batches: mixture, order, epochs            (the door to Grain)
    corpus.py      what a config trains on: its sources, and what fixes their batches
"""
