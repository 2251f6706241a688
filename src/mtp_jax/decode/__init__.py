"""Decoding: a drafter guesses the next tokens, the next forward of the model verifies them.

    requests.py     checks of what a caller asks for
    verify.py       which drafts are accepted, and which token follows them
    decoder.py      a Model arranged for decoding, and its forward with caches
    placement.py    on a mesh: which device holds what
    drafters.py     the model's futures, another model, prompt lookup
    loop.py         the passes, on the device
    detokenizer.py  text while it is generated, stop strings
    engine.py       the host's side: padded shapes, timing, streaming
    generation.py   what a caller gets
"""
