"""The unembedding in the loss, shared by neighbours: what devices send, and what they hold."""
import jax
import jax.numpy as jnp
import pytest

from mtp_jax.config import MeshConfig, ObjectiveConfig
from mtp_jax.measure.traffic import traffic
from mtp_jax.mesh import make_mesh
from mtp_jax.objective import Labels, Table, cross_entropy_and_gradients, table
from mtp_jax.sharding import spec


def compiled(c, sizes: MeshConfig, batch: int, length: int, chunk: int = 0):
  """The loss of one future and its gradients, on a mesh."""
  mesh = make_mesh(sizes)

  def run(h_gBLD, unembed_VD, labels):
    tokens = batch * length // (sizes.data * sizes.fsdp * sizes.context)
    return cross_entropy_and_gradients(c, ObjectiveConfig(chunk=chunk), h_gBLD, Table.of(c, unembed_VD, tokens), labels)

  def on_mesh(letters, dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec(letters)))

  shape = 1, batch, length
  with jax.set_mesh(mesh):
    labels = Labels(*(on_mesh('gBL', dtype, *shape) for dtype in (jnp.int32, jnp.float32, jnp.bool)))
    arguments = on_mesh('gBLD', c.dtype, *shape, c.width), on_mesh('VD', jnp.float32, c.vocab, c.width), labels
    return jax.jit(run).lower(*arguments).compile()


@pytest.mark.parametrize('sizes, vocab, r', [
    (MeshConfig(fsdp=8), 24, 1), (MeshConfig(fsdp=8), 384, 4), (MeshConfig(fsdp=4, tensor=2), 768, 4),
    (MeshConfig(data=2, fsdp=4), 128, 2), (MeshConfig(fsdp=4, context=2), 128, 2)], ids=str)
def test_as_many_neighbours_share_a_table_as_send_fewest_bytes(tiny, monkeypatch, sizes, vocab, r):
  """Counted in the compiled programs of every number that divides the devices; 32 tokens on each of them."""
  c, sent = tiny(vocab=vocab, width=256), {}  # numbers of a token that a softmax needs are few beside its state
  with jax.set_mesh(make_mesh(sizes)):
    assert table.sharers(c, 32) == r
  for tried in (n for n in (1, 2, 4, 8) if sizes.fsdp % n == 0):
    monkeypatch.setattr(table, 'sharers', lambda c, tokens, tried=tried: tried)
    rows = 32 * 8 // sizes.tensor // 16
    moved = traffic(compiled(c, sizes, rows, 16).as_text())
    sent[tried] = sum(collective.sent_bytes for collective in moved.collectives)
  assert min(sent, key=sent.get) == r, sent


def test_no_device_holds_a_table_or_its_gradient_that_neighbours_could_share(tiny):
  """Eight devices and a large vocabulary: of 4,096 rows each has 512 and their gradient, not all."""
  c = tiny(vocab=4096, width=64)
  memory = compiled(c, MeshConfig(fsdp=8), 16, 4, 2).memory_analysis()
  rows, whole = 4096 * 64 * 4 // 8, 4096 * 64 * 4
  assert 2 * rows < memory.temp_size_in_bytes < whole
