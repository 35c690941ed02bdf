"""The engine: deployed networks, their operators and kernels."""
from .deploy import DeployedBlock, DeployedConv, DeployedUnit, deploy
from .native import chip_rate, count_rate, info, use_isa

__all__ = [
    'deploy', 'DeployedBlock', 'DeployedConv', 'DeployedUnit', 'info', 'use_isa', 'chip_rate', 'count_rate',
]
