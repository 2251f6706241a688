"""Fields of earlier versions: what stands for them now, and configs that were saved with them."""

FIX = {'train.tensorboard': "set config.train.trackers=('tensorboard',), or () for none"}


def upgraded(values: dict) -> dict:
  """A config as JSON that an earlier version saved, in the fields of this one."""
  train = dict(values.get('train', {}))
  if 'tensorboard' in train:
    train['trackers'] = ['tensorboard'] if train.pop('tensorboard') else []
  if train.get('checkpoints_kept') == 1:  # the newest may be damaged
    train['checkpoints_kept'] = 2
  return values | {'train': train} if train else values
