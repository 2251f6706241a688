"""From files to batches, in rooms that build on one another; nothing here computes with JAX.

    inputs.py      files to documents: text, JSON lines, Parquet, anywhere fsspec reaches; what is wrong with a record
    shards.py      documents' tokens on disk and back: hash-checked blocks, a stream one reads from any place
    prepare.py     inputs to a prepared set, in parallel, once, resumable
    packing.py     which tokens of a stream make a row
    rows.py        rows to batches: sources, mixture, order, epochs   (the door to Grain)
    inspection.py  a set as a person sees it
"""
