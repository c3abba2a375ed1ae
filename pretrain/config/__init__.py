"""What a run is: the typed schema, and the only place that holds a default.

A run is one YAML file. Any key can be overridden as `section.key=value`. Whatever does not fit the schema
is refused with one line that names the file, the key, the value and what would do.
"""

from pretrain.config.data import DataConfig, PhaseConfig, SourceConfig
from pretrain.config.loading import dump_config, load_config
from pretrain.config.objectives import (
    OBJECTIVES,
    BstConfig,
    JtpConfig,
    MtpConfig,
    NextLatConfig,
    NextTokenConfig,
    ObjectiveConfig,
)
from pretrain.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    FaultsConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)

__all__ = [
    "OBJECTIVES",
    "BatchConfig",
    "BstConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "FaultsConfig",
    "JtpConfig",
    "ModelConfig",
    "MtpConfig",
    "NextLatConfig",
    "NextTokenConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "RunConfig",
    "SourceConfig",
    "dump_config",
    "load_config",
]
