"""export, import: weights to and from other frameworks."""
from mtp_jax.cli.command import JSON, STEP, TOKENIZER, WORKDIR, Command, need, need_at_least, print_result
from mtp_jax.config import BadInput, local_path
from mtp_jax.config.errors import cannot
from mtp_jax.config.paths import folder_path

NAMES = 'llama, qwen2, qwen3, mimo, mellum, deepseek_v3, glm4_moe or meta'


def export(flags) -> int:
  """Writes a checkpoint as other frameworks load it: safetensors, config, tokenizer, model card.

  `inspect` lists the formats that can hold a model, and why the others cannot. What is written has
  no name of its own before it is whole.
  """
  for name in ('workdir', 'format', 'output'):
    need(flags, name)
  need_at_least(flags, step=-1, shard_bytes=1)
  from mtp_jax.checkpoint.record import locate, read_record
  from mtp_jax.config import Config
  from mtp_jax.formats.fitting import check
  workdir, step = locate(flags.workdir, None if flags.step < 0 else flags.step)
  check(flags.format, Config.from_dict(read_record(workdir, step)['config']).model)
  from mtp_jax.formats.export import export
  from mtp_jax.formats.source import of_checkpoint
  source = of_checkpoint(workdir, step, flags.tokenizer or None)
  dtype = flags.dtype or source.model.dtype
  done = export(source, flags.format, flags.output, dtype, flags.shard_bytes, flags.fold,
                flags.copies)
  folded = ', the final norm folded' if done['folded'] else ''
  print_result(flags, {'step': source.record['step'], 'format': flags.format, **done}, [
      f'{flags.output}: step {source.record["step"]} as {flags.format}, {done["tensors"]:,} tensors, '
      f'{done["bytes"]:,} bytes of {dtype}{folded}',
      f'how to serve it: {flags.output}/README.md'])
  return 0


def import_(flags) -> int:
  """Reads a folder of another framework into a workdir, for train, generate, score and evaluate.

  The checkpoint is of step 0, with a new optimizer. Every tensor of the folder must be one of the
  model.
  """
  for name in ('input', 'workdir'):
    need(flags, name)
  need_at_least(flags, length=0)
  folder, workdir = local_path(flags.input, '--input'), folder_path(flags.workdir)
  with cannot('write', f'--workdir={workdir}', 'give a folder that can be written'):
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
      raise BadInput(f'--workdir={workdir}: is there already; give a new folder')
  from mtp_jax.formats.importing import open_folder
  opened = open_folder(folder, '--input', flags.format, flags.tokenizer, flags.length)
  from mtp_jax.formats import workdir as workdirs
  config, model = workdirs.write(opened, workdir)
  from mtp_jax.model import costs
  parameters = costs.parameters(model)
  c = config.model
  print_result(flags, {'format': opened.format, 'parameters': parameters,
                       'config': config.to_dict()}, [
      f'{workdir}: {opened.format}, {parameters["total"]:,} parameters, {c.trunk_layers} layers in the trunk, '
      f'futures {c.futures}' + (f' ({c.kind})' if c.futures > 1 else ''),
      f'train it with: --config={workdir}/config.py --workdir={workdir}'])
  return 0


COMMANDS = {
    'export': Command(
        export, 'weights for transformers, vLLM and SGLang',
        (WORKDIR, STEP, TOKENIZER,
         ('format', None, NAMES),
         ('output', None, 'a new folder'),
         ('dtype', '', "of the tensors, float32 or bfloat16; '': config.model.dtype"),
         ('shard_bytes', 5 * 10**9, 'of a file, at most'),
         ('fold', True, 'mimo: fold the final norm, where a module reads the state before it'),
         ('copies', True,
          'deepseek_v3, glm4_moe: embedding and unembedding again in every module, for older readers'),
         JSON),
        'export --workdir=runs/tiny --format=llama --output=exported/tiny'),
    'import': Command(
        import_, 'weights of another framework into a workdir',
        (('input', None, 'folder with config.json and *.safetensors'),
         ('format', '', f"{NAMES}; '': as config.json tells"),
         ('workdir', None, 'a new folder'),
         ('tokenizer', '', "a SentencePiece model file, or bytes; '': that of the folder"),
         ('length', 0,
          'tokens of a row; 0: as the folder tells, of other than our exports at most 2048'),
         JSON),
        'import --input=exported/tiny --workdir=runs/imported'),
}
