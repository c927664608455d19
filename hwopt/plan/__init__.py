"""Decisions: what to change where, and why."""
