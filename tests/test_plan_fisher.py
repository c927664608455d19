"""Planning with errors by gradients: their level, when they are used, and what neighbours cost together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from hwopt.errors import UsageError
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, run_pass
from hwopt.plan import fisher
from hwopt.plan.errors import measure_errors
from hwopt.plan.fisher import by_gradients, error_pairs, estimated
from hwopt.plan.options import Option
from passes.prune_channels import PruneChannels
from passes.quantize import Quantize
from passes.share_weights import ShareWeights
from tests.random_graphs import random_samples
from tests.test_sensitivity import classifier, layers, measured

pytest.importorskip("torch")


def task() -> tuple[Graph, Context, list[Pass]]:
    graph = classifier()
    ctx = Context(calibration=random_samples(graph, 2, 24))
    found: list[Pass] = [Quantize((site,)) for site in layers(graph)]
    found += [ShareWeights((site,), bits) for site in layers(graph) for bits in (2, 4)]
    found += [PruneChannels((layers(graph)[3],), keep=keep, criterion="l2") for keep in (4, 8, 12)]
    return graph, ctx, [one for one in found if run_pass(one, graph, ctx) is not graph]


def options(candidates: list[Pass], level: float = 0.0) -> list[Option]:
    blank = {field.name: None for field in dataclasses.fields(Option)}
    return [Option(**blank | {"group": "+".join(one.site), "passes": (one,), "error": level}) for one in candidates]


def measure(known: dict[str, float], how: str) -> list[float]:
    graph, ctx, candidates = task()
    assert ctx.calibration is not None
    found = measure_errors(graph, ctx, options(candidates), ctx.calibration, 1, lambda *_: None, known, how)
    return [option.error for option in found]


def test_each_family_gets_the_level_of_its_measured_errors() -> None:
    graph, ctx, candidates = task()
    assert ctx.calibration is not None
    found = estimated(graph, ctx, candidates, ctx.calibration, lambda changed: 5.0 * measured(graph, changed, ctx.calibration))
    for family in ("quantize", "share-weights", "prune-channels"):
        mine = [one for one in candidates if one.name == family]
        ratios = [found.error(one) / measured(graph, run_pass(one, graph, ctx), ctx.calibration) for one in mine]
        assert 5 / 2 < np.exp(np.mean(np.log(ratios))) < 5 * 2, family
    assert found.calibration is not None and found.calibration.rank_correlation > 0.7


def test_errors_by_gradients_rank_options_like_measured_ones() -> None:
    assert stats.spearmanr(measure({}, "fisher"), measure({}, "measured")).statistic > 0.95


def test_known_errors_are_not_computed_again() -> None:
    _, _, candidates = task()
    known = {str(one): 7.0 for one in candidates}
    assert set(measure(known, "fisher")) == {7.0}


def test_gradients_are_used_where_measuring_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, ctx, candidates = task()
    data = ctx.calibration
    assert data is not None
    assert not by_gradients("auto", graph, candidates, data)
    monkeypatch.setattr(fisher, "MACS", 1.0)
    assert by_gradients("auto", graph, candidates, data)
    assert not by_gradients("measured", graph, candidates, data)
    monkeypatch.setattr(fisher, "missing", lambda _: "torch is not installed")
    assert not by_gradients("auto", graph, candidates, data)
    with pytest.raises(UsageError, match="torch is not installed; use --sensitivity measured"):
        by_gradients("fisher", graph, candidates, data)
    with pytest.raises(UsageError, match="did you mean fisher"):
        by_gradients("fischer", graph, candidates, data)


def test_neighbours_that_hurt_each_other_get_a_pair() -> None:
    graph, ctx, candidates = task()
    assert ctx.calibration is not None
    quantized = options([one for one in candidates if one.name == "quantize"], level=1.0)
    pairs = list(error_pairs(graph, ctx, quantized, ctx.calibration))
    assert pairs and all(pair.error > 0 and pair.one.group != pair.other.group for pair in pairs)
    bound = max(2.0 * (pair.one.error * pair.other.error) ** 0.5 for pair in pairs)
    assert all(pair.error <= bound for pair in pairs)  # Cauchy-Schwarz: at most twice the geometric mean
