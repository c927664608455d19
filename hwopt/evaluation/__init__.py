"""What a compression did to a model: the library that ships against the float original, sample by sample.

report = evaluate_artifact("build/model", "evaluate.npz", model="model.onnx", robustness=["noise", "jpeg"], attacks=["pgd"])
print(summary(report))
"""

from hwopt.evaluation.job import evaluate_artifact
from hwopt.evaluation.summary import summary

__all__ = ["evaluate_artifact", "summary"]
