"""The generated C driver: memory plan, weights, header, runtime."""

from hwopt.emit.build import Library, Tensor, build_library
from hwopt.emit.memory import MemoryPlan, plan_memory
from hwopt.emit.program import Buffer, Call, Program

__all__ = ["Buffer", "Call", "Library", "MemoryPlan", "Program", "Tensor", "build_library", "plan_memory"]
