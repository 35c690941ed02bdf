"""Conversion: a float network becomes a binarized one, in place."""
from .binarize import binarize
from .report import Report, ReportRow

__all__ = ['binarize', 'Report', 'ReportRow']
