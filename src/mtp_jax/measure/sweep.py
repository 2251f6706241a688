"""Plans of one config on many meshes, or on slices of growing size."""
import dataclasses
import itertools
from collections.abc import Callable, Iterator

from mtp_jax.config import BadInput, Config, MeshConfig
from mtp_jax.measure.plan import Plan, TooLarge, mesh_text, plan, spread
from mtp_jax.measure.topology import devices, slice_count
from mtp_jax.report.plot import picture

# data, tensor, context of a mesh, for each slice; fsdp takes the rest
SPLITS = ((1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4))
EXPERTS = (1, 4, 8, 16)  # devices that divide the experts, where there are any
REMATS = ('full', 'attention', 'attention,qkv', 'dots', 'none')


def weak_scaling(config: Config, topologies: list[str], note: Callable[[str], None]) -> list[Plan]:
  """Plans on each topology with the same number of rows per chip; the mesh grows along its data
  axis.

  Args:
    note: is called with a line about each plan.

  Raises:
    BadInput: the size of a topology is not a multiple of the first one's.
  """
  first_size = len(devices(topologies[0]))
  first, plans = spread(config, devices(topologies[0]), topologies[0]), []
  for topology in topologies:
    size = len(devices(topology))
    if size % first_size:
      raise BadInput(f'--topology={topology}: {size} chips, no multiple of the first, '
                     f'{topologies[0]}')
    times, t = size // first_size, first.train
    train = dataclasses.replace(t, batch=times * t.batch, evaluate_rows=times * t.evaluate_rows)
    mesh = dataclasses.replace(first.mesh, data=times * first.mesh.data)
    plans.append(plan(dataclasses.replace(first, train=train, mesh=mesh), topology))
    note(f'{topology}: {_step_text(plans[-1])}')
  return plans


def sweep(config: Config, topology: str, note: Callable[[str], None],
          plan: Callable[[Config, str], Plan] = plan) -> list[Plan]:
  """Plans of the config with other meshes, rematerialisation and microbatches; the fastest that
  fits comes first.

  All meshes are tried with the config's own rematerialisation and, if none fits, with every block
  recomputed. While still none fits, the best mesh is tried with microbatches of half the size. Then
  the other kinds of rematerialisation are tried on the best mesh.

  Args:
    note: is called with a line about each plan.
    plan: makes a plan, or raises TooLarge.

  Raises:
    BadInput: the batch is too small for the chips.
    TooLarge: nothing fits.
  """
  plans, chips = [], devices(topology)

  def attempt(changed: Config) -> None:
    mesh = mesh_text(dataclasses.asdict(changed.mesh))
    text = f'mesh {mesh}, accumulate {changed.train.accumulate}, remat {changed.model.remat}'
    try:
      made = plan(changed, topology)
    except TooLarge:
      note(f'{text}: does not fit')
      return
    plans.append(made)
    unfit = '' if made.fits else '; does not fit'
    note(f'{text}: {made.hbm_bytes / 2**30:.2f} GiB, {_step_text(made)}{unfit}')

  def some_fit() -> bool:
    return any(made.fits for made in plans)

  def on_best_mesh() -> Config:
    return dataclasses.replace(config, mesh=MeshConfig(**min(plans, key=_rank).mesh))

  meshes = list(_meshes(config, chips)) or [spread(config, chips, topology).mesh]
  for remat in dict.fromkeys((config.model.remat, 'full')):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    for mesh in meshes:
      attempt(dataclasses.replace(config, mesh=mesh))
    if some_fit():
      break
  while not some_fit():
    try:
      train = dataclasses.replace(config.train, accumulate=2 * config.train.accumulate)
      config = dataclasses.replace(config, train=train)
      attempt(on_best_mesh() if plans else spread(config, chips, topology))
    except BadInput as error:
      raise TooLarge(f'--topology={topology}: no mesh, microbatch or rematerialisation fits '
                     f'({error}); take more chips') from None
  config = on_best_mesh()
  tried = {made.remat for made in plans if made.accumulate == config.train.accumulate}
  for remat in REMATS:
    if remat not in tried:
      attempt(dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat)))
  return sorted(plans, key=_rank)


def _rank(made: Plan) -> tuple:
  return not made.fits, made.step_seconds, made.hbm_bytes


def _step_text(made: Plan) -> str:
  return f'{made.step_seconds:.3f} s a step at least, by {made.bound}'


def _meshes(config: Config, chips: list) -> Iterator[MeshConfig]:
  """Meshes that the config allows; fsdp takes what the others leave."""
  slices, parts = slice_count(chips), EXPERTS if config.model.experts else (1,)
  for (data, tensor, context), expert in itertools.product(SPLITS, parts):
    fsdp, rest = divmod(len(chips), slices * data * tensor * context * expert)
    if rest:
      continue
    mesh = MeshConfig(data=data * slices, fsdp=fsdp, tensor=tensor, context=context, expert=expert)
    try:
      yield dataclasses.replace(config, mesh=mesh).mesh
    except BadInput:  # such as heads that do not divide
      continue


def plot(plans: list[Plan], path: str) -> None:
  """Draws the seconds of a step by what takes them, over the number of chips."""
  with picture(path, 7, 3.5) as axes:
    chips = [made.chips for made in plans]
    for kind in plans[0].seconds:
      seconds = [made.seconds[kind] for made in plans]
      if any(seconds):
        axes.plot(chips, seconds, marker='o', label=kind)
    axes.set(xscale='log', xlabel='chips', ylabel='seconds a step, at least', ylim=(0, None),
             xticks=chips, xticklabels=[f'{n:,}' for n in chips])
    axes.minorticks_off()
    axes.legend()
