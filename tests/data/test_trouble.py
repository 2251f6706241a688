"""Files as people have them are read right, or named with the reason; see corpus_of_trouble.py."""
import corpus_of_trouble
import pytest


@pytest.mark.parametrize('name', corpus_of_trouble.CASES)
def test_each_input_is_read_right_or_named_with_the_reason(name):
  code, outcome = corpus_of_trouble.outcome(name)
  expected = corpus_of_trouble.CASES[name][2]
  assert expected in outcome and code == (0 if 'documents' in expected and 'give' not in expected else 2)
