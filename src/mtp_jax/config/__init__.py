"""The schema of an experiment and its checks; the door to ml_collections. Nothing here needs JAX."""
from mtp_jax.config.errors import BadInput, nearest
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

__all__ = ['SECTIONS', 'BadInput', 'Config', 'DataConfig', 'MeshConfig', 'ModelConfig', 'ObjectiveConfig', 'OptimizerConfig', 'TrainConfig',
           'check_name', 'forward_curriculum', 'nearest', 'reverse_curriculum', 'weight_at']
