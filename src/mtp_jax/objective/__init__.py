"""What is trained: the targets of a batch, and the loss of every future with its gradient.

    targets.py   a batch as a step reads it, and the target of every future
    walk.py      the loss: heads forward and backward, one group after another
    stream.py    cross-entropy of a chunk of positions, and its gradient
    table.py     the unembedding, which neighbouring devices share
"""
from mtp_jax.objective.stream import chunked, cross_entropy, cross_entropy_and_gradients, whole
from mtp_jax.objective.table import Table
from mtp_jax.objective.targets import Labels, Read, Sums
from mtp_jax.objective.walk import dense, future_states, loss, trunk_state

__all__ = ['Labels', 'Read', 'Sums', 'Table', 'chunked', 'cross_entropy', 'cross_entropy_and_gradients', 'dense',
           'future_states', 'loss', 'trunk_state', 'whole']
