"""What is trained: targets, and the loss of every future with its gradient."""
from mtp_jax.objective.stream import chunked, cross_entropy, whole
from mtp_jax.objective.targets import Sums, all_targets, counts, states, target_bytes, targets
from mtp_jax.objective.walk import dense, loss

__all__ = ['Sums', 'all_targets', 'chunked', 'counts', 'cross_entropy', 'dense', 'loss', 'states', 'target_bytes', 'targets', 'whole']
