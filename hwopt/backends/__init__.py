"""Ways to run or compile a Graph."""
