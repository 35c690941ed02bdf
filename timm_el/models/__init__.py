"""Registered models. Importing this package registers them with timm, and units as leaves of timm's graphs.

A graph that goes through a unit has neither its weights as one bit nor its estimator, and could not be deployed.
"""
from timm.models import register_notrace_module

from ..layers import BinaryUnit
from .converted import *
from .efficientnet import *
from .reactnet import *
from .resnet import *

register_notrace_module(BinaryUnit)
