"""The config of an experiment: its fields and the checks on them. Importing this needs no JAX.

    schema.py    the sections and fields;          checks.py   which values are valid
    weights.py   weights as paths in words;        files.py    config files and --config.section.field=value
    errors.py    BadInput: what the user can fix;  paths.py    paths, with ~
    earlier_versions.py    fields of earlier versions

Only this folder imports ml_collections.
"""
from mtp_jax.config.earlier_versions import upgraded
from mtp_jax.config.errors import BadInput, nearest
from mtp_jax.config.paths import check_local, expanded, folder_path, local_path
from mtp_jax.config.schema import (
    SECTIONS,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    check_name,
)
from mtp_jax.config.weights import forward_curriculum, reverse_curriculum, weight_at

__all__ = [
    'SECTIONS', 'BadInput', 'Config', 'DataConfig', 'MeshConfig', 'ModelConfig', 'ObjectiveConfig',
    'OptimizerConfig', 'TrainConfig', 'check_local', 'check_name', 'expanded', 'folder_path',
    'forward_curriculum', 'local_path', 'nearest', 'reverse_curriculum', 'upgraded', 'weight_at']
