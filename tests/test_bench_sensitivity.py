"""The sensitivity benchmark: what it compares, and what it says it leaves out."""

from __future__ import annotations

import pytest

from benchmarks import sensitivity
from hwopt.errors import UsageError
from hwopt.pipeline import Pass, Phase, parse
from hwopt.plugins import find_passes


def passes(*texts: str) -> list[Pass]:
    return [parse(text, find_passes()) for text in texts]


def test_configurations_change_each_place_once() -> None:
    found = passes(*(f"share-weights{{site=conv{i},bits={bits}}}" for i in range(20) for bits in (2, 3)))
    found += passes("prune-channels{site=conv0,ratio=0.5}", "prune-channels{site=conv0,ratio=0.25}")
    chosen = sensitivity.configurations(found, 12)
    assert len(chosen) > 6 and chosen == sensitivity.configurations(found, 12)
    for one in chosen:
        places = [(candidate.phase == Phase.PRUNE, candidate.site) for candidate in one]
        assert len(set(places)) == len(places)


def test_missing_pictures_are_a_note_with_the_folder(tmp_path) -> None:
    found = sensitivity.run(models="efficientnet_lite0", data=tmp_path)
    assert found["rows"] == []
    assert str(tmp_path) in found["notes"][0]


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(UsageError, match="unknown model 'dmo'; did you mean demo"):
        sensitivity.run(models="dmo")
