"""From files to batches, in files that build on one another; nothing here needs JAX or a screen.

    files.py            paths, directories and globs to files          (the door to fsspec)
    kinds.py            what each file is, by content and name
    records.py          files to documents, and what is wrong with a record
    folder.py           a folder whose files appear complete or not at all
    shards.py           tokens on disk: checksummed blocks             (the door to ArrayRecord)
    prepared_set.py     a prepared set: its index, opened and verified
    split.py            what is held out, by content
    parts.py            the inputs cut into parts, and a part tokenized
    workers.py          parts tokenized in parallel processes
    prepare.py          inputs to a prepared set, once, resumable
    train_tokenizer.py  a SentencePiece model from a sample of the inputs
    packing.py          which tokens of a stream make a row
    rows.py             rows to batches: mixture, order, epochs        (the door to Grain)
    texts.py            texts in memory as rows
    dataset.py          a grain.MapDataset of documents as a source
    corpus.py           what a config trains on, and its identity
    progress.py         what a caller may hand in to follow the work
"""
