"""An override may be written in one word or in two."""
from mtp_jax.config import files


def test_the_value_of_an_override_may_be_the_next_word_unless_the_field_is_a_switch():
  arguments = ['--config.train.steps', '60', '--config.data.accept_changed', '--step', '3', '--config.data.seed=4']
  assert files.split(arguments) == (
      ['--config.train.steps=60', '--config.data.accept_changed', '--config.data.seed=4'], ['--step', '3'])
