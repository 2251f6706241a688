"""A workdir as a model of EleutherAI's lm-evaluation-harness (lm_eval 0.4, the extra `lm_eval`).

    python -m mtp_jax.harness run --model mtp_jax --model_args workdir=runs/tiny --tasks my_task --include_path tasks

is lm_eval's own command line, to which this model is known. From Python:

    lm_eval.simple_evaluate(model=Harness(mtp_jax.load('runs/tiny')), tasks=['my_task'], task_manager=...)

Texts stand at the beginning of a document, after `bos`. Those longer than the rows of training are
scored in windows that share half a row (`evaluation.scoring`), so that a token is predicted from at
least half a row; lm_eval's own models cut the context off instead, and share nothing in `rolling`.
"""
import collections
from collections.abc import Sequence

import numpy as np

from mtp_jax.config import BadInput
from mtp_jax.decode.requests import check_is, number, one_or_several, sampling_parameters, stop_strings
from mtp_jax.lm import LanguageModel, load

try:
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
except ImportError as error:
  raise ImportError("lm_eval is not installed; pip install 'mtp_jax[lm_eval]'") from error

NEW_TOKENS = 256  # where a task does not say how many


@register_model('mtp_jax')
class Harness(LM):
  """What a task may ask of a model: loglikelihood, loglikelihood_rolling, generate_until.

  Args:
    workdir: of a run, or a loaded `LanguageModel`.
    step: of the checkpoint; by default the newest.
    batch_size: prompts that are continued at once. Scoring has config.train.evaluate_rows rows a batch.
    seed: of samples, where a task asks for some; sample i of a task has seed + i.
    draft: drafts in a pass; by default all futures. Greedy text does not depend on it.
    max_batch_size, device: lm_eval hands them over; without effect.

  Raises:
    BadInput: there is no such checkpoint, or an argument is out of range.
  """

  def __init__(self, workdir, step: int | None = None, batch_size: int | str = 8, seed: int = 0,
               draft: int | None = None, max_batch_size=None, device=None):
    super().__init__()
    self.lm = workdir if isinstance(workdir, LanguageModel) else load(workdir, step)
    self.batch_size = 8 if str(batch_size).startswith('auto') else number('batch_size', batch_size, 1, 2**16)
    self.seed, self.draft = number('seed', seed, 0, 2**30), draft
    self.lm.drafter('futures', draft)  # refuses what it cannot draft

  @property
  def tokenizer_name(self) -> str:
    """What lm_eval's cache of requests tells tokenizers apart by."""
    return self.lm.tokenizer.digest

  def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """(log-probability of a continuation after its context, whether greedy decoding gives it), of each request."""
    pairs = [self._encoded(*request.args) for request in requests]
    scores = self.lm.score([ids for ids, _ in pairs]) if pairs else []
    results = [(float(np.sum(score.logprobs[0, n:], dtype=np.float64)), bool(score.likeliest[0, n:].all()))
               for (_, n), score in zip(pairs, scores)]
    return self._cached('loglikelihood', requests, results)

  def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
    """The log-probability of each text; its end is not part of it."""
    scores = self.lm.score([request.args[0] for request in requests]) if requests else []
    return self._cached('loglikelihood_rolling', requests, [score.logprob for score in scores])

  def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
    """The continuation of each context, up to a stop string; of a context too long for a row, its end is continued.

    Raises:
      BadInput: a task asks for what `LanguageModel.generate` has not.
    """
    found, alike = {}, collections.defaultdict(list)
    for i, request in enumerate(requests):
      context, options = request.args
      alike[_options(options)].append((i, self.lm.tokenizer.encode(context)))
    for options, some in alike.items():
      some.sort(key=lambda entry: (not len(entry[1]), -len(entry[1])))  # those without a context come last
      while some:
        size = min(self.batch_size, sum(len(ids) > 0 for _, ids in some)) or 1
        numbers, contexts = zip(*some[:size])
        some = some[size:]
        found |= zip(numbers, self._continued(numbers, contexts, options))
    return self._cached('generate_until', requests, [found[i] for i in range(len(requests))])

  def _continued(self, numbers: Sequence[int], contexts: Sequence[np.ndarray], options: tuple) -> list[str]:
    """The continuations of contexts, given as ids; of one that is empty, a document from its beginning."""
    stop, new, temperature, top_k, top_p = options
    length = self.lm.config.data.length - 1  # beside bos
    room = length - min(new, length - length // 2)  # at least half a row is context
    ends = [ids[-room:] for ids in contexts]
    limits = [min(new, length - len(ids)) for ids in ends]
    prompts = ends if len(ends[0]) else None
    return self.lm.generate(prompts, max_tokens=limits, draft=self.draft, temperature=temperature, top_k=top_k,
                            top_p=top_p, seed=[self.seed + i for i in numbers], stop=list(stop)).text

  def _encoded(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
    """(ids of both, how many are of the context). Spaces between them belong to the continuation, as in lm_eval."""
    encode, kept = self.lm.tokenizer.encode, context.rstrip()
    return encode(context + continuation), len(encode(kept)) if kept else 0

  def _cached(self, name: str, requests: Sequence, results: list) -> list:
    """The results, handed to lm_eval's cache too."""
    for request, result in zip(requests, results, strict=True):
      self.cache_hook.add_partial(name, request.args, result)
    return results


def _options(given: dict) -> tuple:
  """(stop strings, new tokens, temperature, top_k, top_p) of a task's generation_kwargs, checked."""
  known = {'until', 'max_gen_toks', 'max_new_tokens', 'do_sample', 'temperature', 'top_k', 'top_p'}
  if given.keys() - known:
    raise BadInput(f'generation_kwargs: {", ".join(sorted(given.keys() - known))}: not known here; '
                   f'known are {", ".join(sorted(known))}')
  until, sampled = given.get('until'), given.get('do_sample', 'temperature' in given)
  check_is(bool, do_sample=sampled)
  until = one_or_several('until', () if until is None else until, (str,))
  stop = stop_strings([text for text in until if not (isinstance(text, str) and not text)])
  new = number('max_gen_toks', given.get('max_gen_toks', given.get('max_new_tokens', NEW_TOKENS)), 1, 2**24)
  temperature, top_k, top_p = given.get('temperature', 1.0), given.get('top_k', 0), given.get('top_p', 1.0)
  checked = sampling_parameters(1, temperature if sampled else 0.0, 0, top_k, top_p)
  temperature, top_k, top_p = (checked[i].item() for i in (0, 2, 3))
  return tuple(stop), new, temperature, top_k, top_p


def main() -> None:
  """lm_eval's command line."""
  from lm_eval.__main__ import cli_evaluate
  cli_evaluate()


if __name__ == '__main__':
  main()
