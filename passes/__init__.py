"""Transformations, one per file; found through the entry point group hwopt.passes."""
