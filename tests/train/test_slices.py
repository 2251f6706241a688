"""What slices send each other in a step: the mesh axis `data` goes between them, over a slow network."""
from mtp_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from mtp_jax.measure.plan import plan


def test_gradients_cross_between_slices_once_a_step_whatever_the_number_of_microbatches_and_futures():
  """A sum over two slices sends each device's part once. What comes with each future are its loss, hits and count."""
  def crossing_bytes(futures: int, accumulate: int) -> float:
    model = ModelConfig(vocab=264, width=32, layers=5, heads=2, kv_heads=2, head_width=16, feed_forward=64,
                        futures=futures, dtype='float32')
    train = TrainConfig(batch=16, evaluate_rows=16, accumulate=accumulate)
    made = plan(Config(model, data=DataConfig(length=32), train=train, mesh=MeshConfig(data=2, fsdp=4)), 'cpu:8')
    assert made.parameters == parameters
    return sum(size for by_axes in made.collective_bytes.values() for axes, size in by_axes.items() if 'data' in axes)

  matrices = 4 * 32 * 32 + 3 * 32 * 64
  parameters = 2 * 264 * 32 + 5 * matrices + (2 * 5 + 1) * 32
  crossing = crossing_bytes(futures=1, accumulate=1)
  gradient_bytes = 4 * ((2 * 264 * 32 + 5 * matrices) / 4 + (2 * 5 + 1) * 32)  # norms are whole on every device
  assert gradient_bytes < crossing < gradient_bytes + 100
  assert crossing_bytes(futures=1, accumulate=2) == crossing
  assert crossing <= crossing_bytes(futures=4, accumulate=2) < crossing + 100
