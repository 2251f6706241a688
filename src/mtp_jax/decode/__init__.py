"""Decoding: the futures, or another drafter, guess the next tokens; the next forward verifies them.

    verify.py     which drafts are accepted, and what is said instead, from the laws alone
    decoder.py    a Model laid out for decoding, and its forward with a cache
    drafters.py   futures, another model, prompt lookup
    loop.py       the passes, on the device
    engine.py     the host's side: buckets of shapes, costs, text as it grows
"""
from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.drafters import Drafter, Lookup, Nothing, Other, futures
from mtp_jax.decode.engine import Engine, Text
from mtp_jax.decode.loop import Progress, advance, best_length, prefill
from mtp_jax.decode.verify import Sampler

__all__ = ['Decoder', 'Drafter', 'Engine', 'Lookup', 'Nothing', 'Other', 'Progress', 'Sampler', 'Text', 'advance', 'best_length', 'futures', 'prefill']
