"""Decoding: the futures, or another drafter, guess the next tokens; the next forward verifies them.

    verify.py     which drafts are accepted, and what is said instead, from the laws alone
    decoder.py    a Model laid out for decoding, and its forward with a cache
    drafters.py   futures, another model, prompt lookup
    loop.py       the passes, on the device
    engine.py     the host's side: buckets of shapes, costs, text as it grows
"""
