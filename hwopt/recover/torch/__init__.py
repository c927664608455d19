"""The parts of recovery that compute: they import torch, the rest of the package does not."""
