"""Passes that a user writes out: what they may say, and that what means nothing is refused before any work."""

from __future__ import annotations

import pytest

from hwopt.demo import MODEL
from hwopt.errors import HwoptError, PassError
from hwopt.ir import Graph
from hwopt.job import choose_families, prepare, quiet
from hwopt.pipeline import Pass

SENSELESS = [
    ("quantize{dtype=int3}", "no dtype 'int3'; did you mean int8"),
    ("quantize{calibrator=foo}", "no calibrator 'foo'; known: auto, entropy, minmax"),
    ("quantize{rounding=foo}", "no rounding 'foo'"),
    ("quantize{weights=int2}", "no weights 'int2'"),
    ("quantize{weights=int4,dtype=bf16}", "leave weights or dtype out"),
    ("quantize{calibrator=percentile,percent=0}", "percent=0.0 is not above 50"),
    ("quantize{percent=nan}", "percent=nan is not above 50"),
    ("quantize{dynamic=true,weights=int4}", "dynamic=true has int8 weights"),
    ("quantize-weights{bits=0}", "bits is 3, 4 or 8"),
    ("quantize-weights{bits=4,group=-32}", "group a number of inputs"),
    ("quantize-weights{method=foo}", "no method 'foo'"),
    ("quantize-weights{act_order=true}", "add method=gptq"),
    ("low-rank{rank=0}", "which rank?; write rank=16, or rank=vbmf"),
    ("low-rank{method=plain}", "which rank?"),
    ("low-rank{rank=-4}", "rank=-4 is below zero"),
    ("low-rank{rank=many}", "rank=many is no rank"),
    ("low-rank{rank=4,damping=nan}", "damping must not be negative"),
    ("low-rank{rank=4,kind=foo}", "no kind 'foo'; known: cp, tucker"),
    ("share-weights{bits=0}", "bits=0 is not between 2 and 8"),
    ("share-weights{dim=0}", "dim=0 is no size"),
    ("share-weights{group=-8}", "group=-8,dim=1 is no size"),
    ("share-weights{axis=foo}", "no axis 'foo'"),
    ("sparsify{pattern=4:2}", "write pattern=2:4"),
    ("sparsify{ratio=1}", "ratio=1.0 is not between 0 and 1"),
    ("sparsify{criterion=foo}", "no criterion 'foo'"),
    ("smooth{strength=2}", "strength=2.0 is not between 0 and 1"),
    ("prune-channels{keep=0}", "keep must be at least 1"),
    ("prune-channels{refit=false}", "how much?; write keep=48 or ratio=0.5"),
]


@pytest.mark.parametrize(("text", "message"), SENSELESS, ids=[text for text, _ in SENSELESS])
def test_what_a_stated_pass_cannot_mean_is_said_before_anything_is_loaded(text: str, message: str) -> None:
    with pytest.raises(HwoptError) as caught:
        choose_families(text)
    assert message in str(caught.value)


def prepared(passes: str) -> Graph:
    return prepare(MODEL, "host", {"image": (1, 1, 28, 28)}, None, None, None, None, passes, 1, 0, quiet).graph


@pytest.mark.parametrize("text", ["quantize{site=dense.0.frist}", "prune-channels{site=dense.0.frist,keep=8}"])
def test_a_site_that_the_model_lacks_is_said_before_anything_is_built(text: str) -> None:
    with pytest.raises(PassError) as caught:
        prepared(text)
    assert "did you mean dense.0.first" in str(caught.value)


def test_of_many_nodes_five_at_most_are_named() -> None:
    for site in ("dense", "nothing-like-it"):
        with pytest.raises(PassError) as caught:
            prepared(f"quantize{{site={site}}}")
        assert len(str(caught.value)) < 200


def test_a_site_may_be_a_part_that_an_earlier_pass_makes() -> None:
    assert prepared("low-rank{site=head,rank=4},quantize{site=head:down}").nodes


def test_words_that_are_known_are_words_of_a_field() -> None:
    class Painted(Pass):
        choices = {"colour": ("red", "green")}
        colour = "blue"

    with pytest.raises(PassError, match="no colour 'blue'; known: green, red"):
        Painted().check()
