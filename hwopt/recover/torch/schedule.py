"""How many steps, how large, and how torch is set up so that the same seed gives the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hwopt.recover.recipe import Recipe
from hwopt.recover.torch.student import Student


@contextmanager
def settled(recipe: Recipe) -> Iterator[int]:
    """Deterministic algorithms on a fixed number of threads, a generator of its own; everything is put back afterwards."""
    threads = recipe.threads or torch.get_num_threads()
    memory: Any = torch.utils.deterministic
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only, fill = torch.is_deterministic_algorithms_warn_only_enabled(), memory.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # takes time, and every operator here writes all of its result
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(recipe.seed)
            yield threads
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


def rate(recipe: Recipe, step: int, total: int) -> float:
    """Share of the learning rate at a step: up in a line, down along half a cosine (SGDR, arXiv:1608.03983, one period)."""
    rising = max(round(recipe.warmup * total), 1)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1)))


def check_steps(recipe: Recipe, total: int) -> frozenset[int]:
    """After how many steps the held-out samples are looked at."""
    return frozenset(math.ceil(total * (index + 1) / recipe.checks) for index in range(recipe.checks))


def make_optimizer(student: Student, recipe: Recipe) -> torch.optim.Optimizer:
    """With sgd one learning rate for all, as LSQ's factors g expect; with adam, whose steps have the size of the learning rate
    whatever the gradient's, a step size moves by a share of itself.
    """
    groups = []
    for name, parameter in student.named_parameters():
        size = float(parameter.detach().mean()) if name in student.quantizers.learned and recipe.optimizer == "adam" else 1.0
        groups.append({"params": [parameter], "lr": recipe.lr * size, "usual": recipe.lr * size})
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)
    return torch.optim.Adam(groups, lr=recipe.lr, fused=True)  # parameters are many and small
