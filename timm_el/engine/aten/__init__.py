"""Handlers of torch's operators: the step, or the view, that each is. HANDLERS has them by name, without underscore.

A handler takes the pass (`lower.Lowering`) and the operator, and returns a `Ref`, or a list of one for each output.
"""
from . import elementwise, layers, shapes

__all__ = ['FACTORIES', 'HANDLERS']

FACTORIES = {  # what they give does not depend on the values of what they are given
    'new_zeros', 'new_ones', 'new_full', 'new_empty', 'zeros_like', 'ones_like', 'full_like', 'empty_like',
    'new_empty_strided'}
HANDLERS = {**shapes.HANDLERS, **elementwise.HANDLERS, **layers.HANDLERS}
