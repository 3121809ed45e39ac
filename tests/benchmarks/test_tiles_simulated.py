"""The simulated cluster in the limits whose answers are known."""

import pytest

from stemtomo.pipeline.tile_need import Alone
from tests.benchmarks.tiles_simulated import Costs, Graph, meeting_of_group, meeting_period, step_seconds

FREE = Costs(pattern_s=1e-3, task_s=0.0, latency_s=0.0, bytes_per_s=1e15, scatter=0.0)


def test_a_chain_takes_its_sum_and_what_is_independent_runs_side_by_side():
    graph = Graph()
    one, other = graph.add(0, 2.0, []), graph.add(1, 3.0, [])
    last = graph.add(0, 1.0, [one, other])
    assert graph.run(FREE)[last] == 4.0
    costs = Costs(1e-3, task_s=0.2, latency_s=0.0, scatter=0.0)
    # Dispatched after 0.1 and 0.2; the later end is seen after 3.2 + 0.1, the last one begins 0.1 later.
    assert graph_of_three().run(costs)[2] == pytest.approx(3.2 + 0.1 + 0.1 + 1.0)


def graph_of_three():
    graph = Graph()
    one, other = graph.add(0, 2.0, []), graph.add(1, 3.0, [])
    graph.add(0, 1.0, [one, other])
    return graph


def test_without_overhead_a_step_is_the_patterns_of_a_tile():
    assert step_seconds((4, 4), 2, 1000, 0.0, FREE) == pytest.approx(1.0, rel=1e-3)


def test_with_a_slow_scheduler_a_step_is_its_tasks():
    slow = Costs(pattern_s=1e-9, task_s=1e-2, latency_s=0.0, bytes_per_s=1e15, scatter=0.0)
    # 1 x 2 tiles: a gradient, a strip and a total for each, and one sum.
    assert step_seconds((1, 2), 1, 1, 0.0, slow) == pytest.approx((3 * 2 + 1) * 1e-2, rel=0.35)
    many = step_seconds((4, 4), 8, 1, 0.0, slow)
    strips = 4 * 2 + 8 * 3 + 4 * 4
    assert many == pytest.approx(8 * (2 * 16 + strips + 1) * 1e-2, rel=0.1)


def test_groups_of_workers_do_better_than_all_on_one_tilt():
    costs = Costs(pattern_s=1e-3, task_s=5e-4)
    # 36 workers: a tilt each, or all on one tilt after another.
    assert step_seconds((1, 1), 36, 8000, 0.0, costs) / 36 < step_seconds((6, 6), 1, 8000 / 36, 1e5, costs)


def test_tiles_that_meet_wait_for_the_slowest_and_no_longer_where_nothing_costs():
    graph = Graph()
    ends = meeting_of_group(graph, (2, 2), 0, [1.0, 2.0, 3.0, 1.0], 0.5, 0.0, 1)
    # The gauges of four tiles, 1 ms each, and small sums.
    assert graph.run(FREE)[ends].max() == pytest.approx(3.5 + 4e-3, abs=1e-3)


def test_a_meeting_moves_its_bytes_and_takes_its_tasks():
    slow = Costs(pattern_s=1e-9, task_s=1e-2, latency_s=0.0, bytes_per_s=1e15, scatter=0.0)
    # 1 x 2 tiles: eight tasks each with the strip of the blend, three for the pair, two sums and the gauges.
    assert meeting_period((1, 2), 1, Alone(1, 1, 0), 1, slow) == pytest.approx((2 * 8 + 3 + 3) * 1e-2, rel=0.25)
    thin = Costs(pattern_s=1e-9, task_s=0.0, latency_s=0.0, bytes_per_s=1e6, scatter=0.0)
    # The pair is compared on one of both, then both send each other their shares: two strips one after the other.
    assert meeting_period((1, 2), 1, Alone(1, 1, int(6e6)), 1, thin) == pytest.approx(2 * 2.0, rel=0.1)
