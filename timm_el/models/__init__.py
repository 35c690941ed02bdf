"""Registered models. Importing this package registers them with timm."""
from .efficientnet import *
from .reactnet import *
from .resnet import *
