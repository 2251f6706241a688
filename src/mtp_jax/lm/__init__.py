"""A trained language model: load it, generate, evaluate, score."""
from mtp_jax.decode.generation import Generation
from mtp_jax.evaluation.scoring import Score
from mtp_jax.lm.language_model import LanguageModel
from mtp_jax.lm.loading import load

__all__ = ['Generation', 'LanguageModel', 'Score', 'load']
