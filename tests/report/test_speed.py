"""The metrics of speed."""
import math

from mtp_jax.report.speed import Speed


class NoEvents:
  def write(self, *_):
    pass


def test_a_utilisation_above_one_is_not_told():
  """Its peak was measured while other work kept the machine busy."""
  for flops, told in ((1e-9, True), (1e30, False)):
    speed = Speed(0, 1.0, NoEvents())
    speed.add(1, flops)
    mfu = speed.since_last(1, 10)['mfu']
    assert 0 < mfu <= 1 if told else math.isnan(mfu)
