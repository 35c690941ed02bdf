"""Experiments: the library behind the verbs that train, compare and evaluate networks."""
