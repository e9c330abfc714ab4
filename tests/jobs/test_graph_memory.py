"""Graphs of a vision encoder that is recomputed take the memory of recomputation."""

from __future__ import annotations

import pytest

from jobs.bench.graph_memory import trunk_memory


@pytest.mark.slow
def test_graphs_of_a_recomputed_trunk_hold_no_activations():
    counted = trunk_memory("full", model="tiny")
    assert 0 < counted.kept < counted.held
    # With all activations kept they hold 2.7 times as much as the step takes without graphs.
    assert counted.held < 1.2 * counted.eager_peak
