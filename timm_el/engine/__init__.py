"""The engine: deployed networks, their operators and kernels."""
from .blocks import DeployedBlock, DeployedStage
from .deploy import deploy
from .modules import DeployedConv, DeployedLinear, DeployedPool, DeployedUnit
from .native import SlowEngineWarning, chip_rate, count_rate, info, runner, use_isa

__all__ = [
    'deploy', 'DeployedBlock', 'DeployedConv', 'DeployedLinear', 'DeployedPool', 'DeployedStage', 'DeployedUnit',
    'info', 'SlowEngineWarning', 'use_isa', 'chip_rate', 'count_rate', 'runner',
]
