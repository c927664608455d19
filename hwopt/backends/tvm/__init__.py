"""Compiling a Graph with Apache TVM."""
