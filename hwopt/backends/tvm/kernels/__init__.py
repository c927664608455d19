"""Kernel templates, one per operator family."""
