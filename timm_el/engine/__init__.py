"""The engine: deployed networks, their programs, operators and kernels."""
from .artifact import ProgramFile, read_program
from .deploy import deploy
from .export import export, program_of
from .modules import DeployedConv, DeployedLinear, DeployedPool
from .native import SlowEngineWarning, chip_rate, count_rate, info, runner, use_isa
from .units import DeployedUnit, FusedUnit, LinkUnit, SplitUnit

__all__ = [
    'deploy', 'export', 'program_of', 'ProgramFile', 'read_program', 'DeployedConv', 'DeployedLinear', 'DeployedPool',
    'DeployedUnit', 'FusedUnit', 'LinkUnit', 'SplitUnit', 'info', 'SlowEngineWarning', 'use_isa', 'chip_rate',
    'count_rate', 'runner',
]
