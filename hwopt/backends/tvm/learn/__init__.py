"""Costs learned from measured kernels: what is measured, the features, the trees, and the cost model that uses them."""
