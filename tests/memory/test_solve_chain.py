"""The planner against judges that share no code with it. By hand, ten times as many chains: pytest --full."""

from __future__ import annotations

import itertools
import pickle
import random
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from chainjudges import (
    Blocks,
    brute_force,
    by_counts,
    greedy,
    highs,
    random_blocks,
    simulate,
    uniform,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from prfl_fast import doctor
from prfl_fast.memory import ChainPlan, InfeasibleBudget, Mode, solve_chain
from prfl_fast.memory.solver import chain as door
from prfl_fast.memory.solver import twin
from prfl_fast.memory.solver.problem import Best, Chain, Limits, Solution
from prfl_fast.memory.solver.simple import try_simple_plans

# Bytes per second. A copy takes 10/3 ns a byte, or about as long as a block, or next to nothing; all are rounded.
RATES = (3 * 10**8, 23 * 10**8, 7 * 10**10)
RATE = RATES[1]


@pytest.fixture(scope="module", autouse=True)
def native() -> Any:
    """The compiled core, or None; its absence is announced here and not in the tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return door._native()


@pytest.fixture(params=["native", "twin"])
def engine(request: pytest.FixtureRequest, native: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "native" and native is None:
        pytest.skip("the compiled core is not built")
    if request.param == "twin":
        monkeypatch.setattr(door, "_native", lambda: None)
    yield request.param


def check(blocks: Blocks, plan: ChainPlan, budget: int, host: int, rate: int | None) -> None:
    """The plan is what it says, by the simulator."""
    peak, added, on_host = simulate(blocks, plan.choice, rate)
    assert (plan.peak_bytes, plan.extra_ns, plan.offloaded_bytes) == (peak, added, on_host)
    assert peak <= budget and on_host <= host
    assert plan.optimal == (plan.gap == 0) == (plan.bound_ns == plan.extra_ns)
    assert 0 <= plan.bound_ns <= plan.extra_ns


def limits_of(rng: random.Random, blocks: Blocks, offload: bool) -> tuple[int, int]:
    """A budget and a host capacity: from what holds nothing to what holds nearly all, seldom more."""
    kept = sum(max(mode.kept for mode in block) for block in blocks)
    peak = max(mode.forward_peak + mode.backward_transient for block in blocks for mode in block)
    host = sum(max(mode.offloaded for mode in block) for block in blocks)
    return rng.randint(0, (kept + peak) * rng.choice([3, 5, 8, 11]) // 10), rng.randint(0, host) if offload else 0


@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
def test_random_chains_against_brute_force(request: pytest.FixtureRequest, engine: str, offload: bool) -> None:
    rng = random.Random(f"brute force {offload}")
    solved = infeasible = 0
    for _ in range(600 if request.config.getoption("--full") else 60):
        rate = rng.choice(RATES) if offload else None
        scale = rng.choice([4, 60, 10**4, 10**9, 10**15])
        family = rng.choice(["random", "anti", "tied", "zero"])
        blocks = random_blocks(rng, rng.choice([1, 3, 5, 6]), 4, scale, offload, family)
        budget, host = limits_of(rng, blocks, offload)
        fastest, least = brute_force(blocks, budget, host, rate)
        if fastest is None:
            with pytest.raises(InfeasibleBudget) as caught:
                solve_chain(blocks, budget, host_bytes=host, bytes_per_second=rate)
            assert caught.value.least_bytes == least
            infeasible += 1
            budget = least
            fastest, _ = brute_force(blocks, budget, host, rate)
        plan = solve_chain(blocks, budget, host_bytes=host, bytes_per_second=rate)
        check(blocks, plan, budget, host, rate)
        assert plan.optimal and plan.extra_ns == fastest
        solved += 1
    assert solved >= 60 and infeasible >= 5


@pytest.mark.parametrize("family", ["random", "anti", "tied"])
@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
def test_longer_chains_against_highs(request: pytest.FixtureRequest, native: Any, family: str, offload: bool) -> None:
    rng = random.Random(f"highs {family} {offload}")
    compared = 0
    for _ in range(25 if request.config.getoption("--full") else 3):
        rate = rng.choice(RATES) if offload else None
        blocks = random_blocks(rng, 12, 6, 200, offload, family)
        budget, host = limits_of(rng, blocks, offload)
        judged = highs(blocks, budget, host, rate)
        if judged is None:
            with pytest.raises(InfeasibleBudget) as caught:
                solve_chain(blocks, budget, host_bytes=host, bytes_per_second=rate)
            budget = caught.value.least_bytes
            assert highs(blocks, budget - 1, host, rate) is None
            judged = highs(blocks, budget, host, rate)
            assert judged is not None
        peak, added, on_host = simulate(blocks, judged, rate)
        assert peak <= budget and on_host <= host
        plan = solve_chain(blocks, budget, host_bytes=host, bytes_per_second=rate)
        check(blocks, plan, budget, host, rate)
        assert plan.optimal and plan.extra_ns == added
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
def test_raising_the_budget_never_raises_the_time(native: Any, offload: bool) -> None:
    rng = random.Random(f"budgets {offload}")
    rate = RATE if offload else None
    for _ in range(4):
        blocks = random_blocks(rng, 9, 5, 10**6, offload, "anti")
        most, host = 15 * 10**6, 10**6 if offload else 0
        with pytest.raises(InfeasibleBudget) as caught:
            solve_chain(blocks, 0, host_bytes=host, bytes_per_second=rate)
        least = caught.value.least_bytes
        before = None
        for budget in [least, *sorted(rng.randint(least, most) for _ in range(25)), most, 1 << 70]:
            plan = solve_chain(blocks, budget, host_bytes=host, bytes_per_second=rate)
            assert plan.optimal and (before is None or plan.extra_ns <= before)
            before = plan.extra_ns


def test_one_byte_less_than_the_least_is_an_error_and_the_least_is_not(engine: str) -> None:
    rng = random.Random("least")
    for offload in (False, True) * 10:
        blocks = random_blocks(rng, 14, 5, 10**9, offload)
        options: dict[str, Any] = {"host_bytes": 10**9 if offload else 0, "bytes_per_second": RATE}
        with pytest.raises(InfeasibleBudget) as caught:
            solve_chain(blocks, 0, **options)
        least = caught.value.least_bytes
        assert solve_chain(blocks, least, **options).peak_bytes == least
        with pytest.raises(InfeasibleBudget, match=f"{least} bytes") as again:
            solve_chain(blocks, least - 1, **options)
        assert again.value.least_bytes == least


def chain_of(blocks: Blocks, host: int) -> Chain:
    return door._normalised(blocks, host, door._rate(RATE))[0]


# Grids of few cells, searches of few labels, fronts of few points: everything that is cut short.
SCARCE = Limits(2_000, 200, 4_000, 300, 20_000, 600, 2_000, 3_000, 20, 1)
SCARCE_ROOMY = SCARCE._replace(candidates=10_000)  # what is too much is seen at the end of a block only
NARROW = SCARCE._replace(fine_labels=10**6, labels=600, candidates=400)  # room, and not work, is what is missing


def test_the_twin_and_the_compiled_core_find_the_same(native: Any) -> None:
    if native is None:
        pytest.skip("the compiled core is not built")
    rng = random.Random("twin")
    capped = thinned = 0
    for trial in range(300):
        offload, limits = trial % 2 == 1, rng.choice([SCARCE, SCARCE_ROOMY, NARROW, Limits()])
        scale, family = rng.choice([20, 10**6, 10**12]), rng.choice(["random", "anti", "tied"])
        blocks = random_blocks(rng, rng.choice([1, 6, 13, 16]), 7, scale, offload, family)
        budget, host = limits_of(rng, blocks, offload)
        chain = chain_of(blocks, host)
        host = min(host, sum(max(step.offloaded for step in block) for block in chain))
        seeds = [[rng.randrange(len(block)) for block in chain] for _ in range(rng.choice([0, 3]))]
        if rng.random() < 0.5:  # a seed that only luck can beat
            seeds.append(native.solve_chain(chain, budget, host, Limits(), [])[1] or [0] * len(chain))
        ours = twin.solve(chain, budget, host, limits, seeds)
        assert ours == Solution(*native.solve_chain(chain, budget, host, limits, seeds))
        capped += ours.found and ours.bound < ours.extra
        thinned += not ours.least_exact
    assert capped >= 5 and thinned >= 3  # else the comparison would say little about searches that are cut short


@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
def test_a_search_cut_short_certifies_its_gap(native: Any, offload: bool) -> None:
    rng = random.Random(f"gap {offload}")
    open_gaps = 0
    for trial in range(120):
        blocks = random_blocks(rng, 12, 6, 10**9, offload, "tied" if rng.random() < 0.5 else "anti")
        budget, host = limits_of(rng, blocks, offload)
        chain = chain_of(blocks, host)
        host = min(host, sum(max(step.offloaded for step in block) for block in chain))
        try:
            best = solve_chain(blocks, budget, host_bytes=host, bytes_per_second=RATE)
        except InfeasibleBudget as error:
            budget = error.least_bytes
            best = solve_chain(blocks, budget, host_bytes=host, bytes_per_second=RATE)
        cut = twin.solve(chain, budget, host, SCARCE if trial % 2 else SCARCE_ROOMY, [])
        if not cut.found:  # only a thinned front may miss a plan so close to the least
            assert not cut.least_exact and cut.least > budget
            continue
        assert door._peak(chain, cut.choice) <= budget
        assert cut.bound <= best.extra_ns and best.bound_ns <= cut.extra
        assert cut.bound < cut.extra or cut.extra == best.extra_ns
        open_gaps += cut.bound < cut.extra
    assert open_gaps >= 5


@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
def test_never_slower_than_greedy_nor_than_one_mode_for_all(native: Any, offload: bool) -> None:
    """However short the search is cut; what holds is shown for the floor alone as well."""
    rng = random.Random(f"floor {offload}")
    rate = RATE if offload else None
    judged = {"greedy": 0, "uniform": 0}
    for trial in range(40):
        family = ("random", "anti", "tied", "zero")[trial % 4]
        blocks = random_blocks(rng, 12, 6, rng.choice([20, 10**9]), offload, family)
        host = limits_of(rng, blocks, offload)[1]
        with pytest.raises(InfeasibleBudget) as caught:
            solve_chain([*blocks, [Mode(1, 1, 0, 0)]], 0, host_bytes=host, bytes_per_second=rate)
        budget = caught.value.least_bytes + rng.randint(0, sum(max(mode.kept for mode in block) for block in blocks))
        plan = solve_chain(blocks, budget, host_bytes=host, bytes_per_second=rate)
        check(blocks, plan, budget, host, rate)
        chain, original = door._normalised(blocks, host, door._rate(RATE))
        seeds = door._one_mode_for_all(original)
        floor = Best()
        try_simple_plans(chain, budget, host, seeds, [0] * len(chain), floor)
        cut = twin.solve(
            chain, budget, host, SCARCE._replace(coarse_work=1, middle_work=1, fine_work=1, points=1 << 18), seeds
        )
        for name, rule in (("greedy", greedy), ("uniform", uniform)):
            added = rule(blocks, budget, host, rate)
            if added is not None:
                assert floor.found and floor.extra <= added
                assert plan.extra_ns <= added and cut.extra <= added
                judged[name] += added > plan.extra_ns
    assert judged["greedy"] >= 5 and judged["uniform"] >= 1  # where both are beaten: the law is no equality


def test_seeds_are_a_floor_of_their_own() -> None:
    """Two equal blocks: greedy takes the bait of the first mode and is stuck; one mode for both is better."""
    bait, better, lean = Mode(5, 5, 0, 50), Mode(6, 6, 0, 10), Mode(0, 0, 0, 100)
    blocks: Blocks = [[bait, better, lean]] * 2
    chain = chain_of(blocks, 0)
    nothing = Limits(1, 0, 1, 0, 1, 0, 1, 1, 1, 1)
    seeded = twin.solve(chain, 12, 0, nothing, [[1, 1]])
    assert seeded.extra == 20 and seeded.choice == [1, 1]
    assert twin.solve(chain, 11, 0, nothing, [[1, 1], [0, 1]]).extra == 60  # the first does not fit


def test_a_gap_is_told_and_not_called_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random("told")
    monkeypatch.setattr(door, "_native", lambda: None)
    monkeypatch.setattr(door, "_TWIN_LIMITS", SCARCE)
    blocks = [[Mode(k, k, 0, 10**9 - k) for k in (rng.randint(0, 10**9) for _ in range(6))] for _ in range(14)]
    plan = solve_chain(blocks, 7 * 10**9)
    check(blocks, plan, 7 * 10**9, 0, None)
    assert not plan.optimal and 0 < plan.gap < 1
    assert plan.gap == pytest.approx((plan.extra_ns - plan.bound_ns) / plan.extra_ns, rel=1e-15)


def test_equal_blocks_by_their_counts(engine: str) -> None:
    rng = random.Random("counts")
    block = [Mode(k, k + t, t, e) for k, t, e in ((22, 8, 0), (13, 9, 23), (4, 18, 31), (1, 21, 60))]
    for _ in range(6):
        stretch = [rng.randint(10**8, 10**9) for _ in block]
        modes = [
            Mode(m.kept * s, m.forward_peak * s, m.backward_transient * s, m.extra_ns * 10**6)
            for m, s in zip(block, stretch, strict=True)
        ]
        budget = rng.randint(10**11, 2 * 10**11)
        wanted = by_counts(modes, 28, budget)
        plan = solve_chain([modes] * 28, budget)
        assert plan.optimal and plan.extra_ns == wanted


def test_no_order_of_equal_blocks_beats_the_plan(engine: str) -> None:
    """With stalls and copies the order counts, so counts of modes alone would not do: the plan's order is the best."""
    rng = random.Random("orders")
    mattered = 0
    for _ in range(12):
        block = random_blocks(rng, 1, 4, 10**4, True)[0]
        blocks, rate = [block] * 6, RATES[0]
        budget, host = limits_of(rng, blocks, True)
        try:
            plan = solve_chain(blocks, budget, host_bytes=host, bytes_per_second=rate)
        except InfeasibleBudget as error:
            budget = error.least_bytes
            plan = solve_chain(blocks, budget, host_bytes=host, bytes_per_second=rate)
        judged = [simulate(blocks, order, rate) for order in set(itertools.permutations(plan.choice))]
        fitting = [added for peak, added, _ in judged if peak <= budget]
        assert min(fitting) == plan.extra_ns
        mattered += len(fitting) < len(judged) or max(fitting) > plan.extra_ns
    assert mattered >= 3


sizes = st.one_of(st.integers(0, 9), st.integers(0, 1 << 63), st.sampled_from([2**58, 2**59, 2**62, 2**64]))


@st.composite
def any_mode(draw: st.DrawFn) -> Mode:
    """Any mode that ``Mode`` lets pass; sizes beyond 64 bits among them."""
    kept, extra, forward, backward = (draw(sizes) for _ in range(4))
    offloaded = draw(st.one_of(st.just(0), sizes))
    peak, transient = kept + offloaded + draw(sizes), offloaded + draw(sizes)
    return Mode(kept, peak, transient, extra, offloaded, forward, backward)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    blocks=st.lists(st.lists(any_mode(), min_size=0, max_size=3), min_size=0, max_size=4),
    budget=st.one_of(sizes, st.sampled_from([-1, True, 1.5, float("nan"), None, "9"])),
    host=st.one_of(sizes, st.sampled_from([-1, False, 2.0])),
    rate=st.sampled_from([None, 1, 10**9, 2.5, 10**30, 5e-324, 0, -1, float("nan"), float("inf"), True, "fast"]),
)
def test_whatever_comes_both_engines_answer_alike(native: Any, blocks: Any, budget: Any, host: Any, rate: Any) -> None:
    if native is None:
        pytest.skip("the compiled core is not built")

    def answer() -> Any:
        try:
            return solve_chain(blocks, budget, host_bytes=host, bytes_per_second=rate)
        except (TypeError, ValueError) as error:
            told = str(error)
            assert re.match(r"(blocks(\[\d+\])?|budget_bytes|host_bytes|bytes_per_second): .*(expected|hold)", told), (
                told
            )
            return type(error), told, getattr(error, "least_choice", None)

    compiled = answer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "_native", lambda: None)
        assert answer() == compiled


def test_an_impossible_budget_tells_the_plan_of_the_least_bytes(engine: str) -> None:
    rng = random.Random("named")
    for offload in (False, True) * 5:
        blocks = random_blocks(rng, 6, 4, 10**6, offload)
        host, rate = (10**6, RATE) if offload else (0, None)
        with pytest.raises(
            InfeasibleBudget, match=r"^budget_bytes: 0 bytes can't hold the chain; the least that would"
        ) as e:
            solve_chain(blocks, 0, host_bytes=host, bytes_per_second=rate)
        peak, _, on_host = simulate(blocks, e.value.least_choice, rate)
        assert peak == e.value.least_bytes == brute_force(blocks, 0, host, rate)[1]
        assert on_host <= host and e.value.exact
        again = pickle.loads(pickle.dumps(e.value))
        assert (str(again), again.least_choice, again.argument) == (str(e.value), e.value.least_choice, "budget_bytes")


def test_a_least_that_is_not_proved_is_not_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random("thinned")
    monkeypatch.setattr(door, "_native", lambda: None)
    monkeypatch.setattr(door, "_TWIN_LIMITS", SCARCE)
    sizes = [(rng.randint(1, 10**9), rng.randint(1, 10**9)) for _ in range(12)]  # 2^12 ways to share them out
    blocks = [[Mode(k, k, 0, 0), Mode(0, o, o, 0, offloaded=o)] for k, o in sizes]
    with pytest.raises(InfeasibleBudget, match="the least that was found to do is") as caught:
        solve_chain(blocks, 0, host_bytes=3 * 10**9, bytes_per_second=RATE)
    assert not caught.value.exact


def test_other_threads_run_while_the_core_searches(native: Any) -> None:
    if native is None:
        pytest.skip("the compiled core is not built")
    rng = random.Random("threads")
    # Time saved is bytes kept, from 10^9 integers: not proved in any time, so that the search does all its work.
    blocks = [[Mode(k, k, 0, 10**9 - k) for k in (rng.randint(0, 10**9) for _ in range(12))] for _ in range(40)]
    seen: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            seen.append(time.monotonic())

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.monotonic()
    plan = solve_chain(blocks, 18 * 10**9)
    end = time.monotonic()
    done.set()
    ticker.join()
    assert not plan.optimal
    inside = [at for at in seen if start < at < end]
    # With the lock held there would be none between the first and the last tenth.
    assert any(start + (end - start) * 0.1 < at < end - (end - start) * 0.1 for at in inside)


def test_the_simulator_on_a_chain_done_by_hand() -> None:
    blocks = [
        [Mode(2, 9, 5, 7, offloaded=4, forward_ns=10, backward_ns=20)],
        [Mode(3, 6, 1, 1, offloaded=0, forward_ns=3, backward_ns=8)],
    ]
    # At 10^9 bytes/s a byte takes 1 ns: copy out 4 against 3 (stall 1), copy in 4 against 8 + 1 (none).
    # Device: 9; then 2 + 4 + 6 = 12; backward 2 + 3 + 4 + 1 = 10; then 2 + 5 = 7.
    assert simulate(blocks, [0, 0], 10**9) == (12, 7 + 1 + 1, 4)
    # The last block's copies are hidden by nothing: 2 x 4 ns.
    assert simulate(blocks[:1], [0], 10**9) == (9, 7 + 8, 4)


def test_offloading_is_used_where_it_pays() -> None:
    keep, recompute = Mode(10, 12, 2, 0, 0, 50, 100), Mode(1, 12, 12, 40, 0, 50, 100)
    offload = Mode(0, 12, 12, 0, 10, 50, 100)
    head = [Mode(0, 1, 1, 0, 0, 50, 100)]
    blocks: Blocks = [[keep, recompute, offload]] * 6
    blocks.append(head)
    hidden = solve_chain(blocks, 25, host_bytes=60, bytes_per_second=10**9)  # 10 ns a copy: hidden
    assert (hidden.extra_ns, hidden.optimal) == (0, True) and hidden.offloaded_bytes >= 40
    some = solve_chain(blocks, 25, host_bytes=29, bytes_per_second=10**9)
    assert some.offloaded_bytes == 20 and some.extra_ns > 0
    slow = solve_chain(blocks, 25, host_bytes=60, bytes_per_second=10**6)  # 10 000 ns a copy
    none = solve_chain(blocks, 25)
    assert slow == none and none.offloaded_bytes == 0


def test_numbers_beyond_double_precision_stay_exact(engine: str) -> None:
    large = 2**54
    blocks = [[Mode(large + 1, large + 1, 0, 0), Mode(large, large, 0, 2**53 + 1)]] * 2
    assert solve_chain(blocks, 2 * large + 2).extra_ns == 0
    assert solve_chain(blocks, 2 * large + 1).extra_ns == 2**53 + 1
    assert solve_chain(blocks, 2 * large).extra_ns == 2**54 + 2
    with pytest.raises(InfeasibleBudget) as caught:
        solve_chain(blocks, 2 * large - 1)
    assert caught.value.least_bytes == 2 * large


def test_the_smallest_chains(engine: str) -> None:
    assert solve_chain([[Mode(0, 0, 0, 0)]], 0) == ChainPlan((0,), 0, 0, True, 0.0, 0, 0)
    assert solve_chain([[Mode(0, 0, 0, 1), Mode(1, 1, 0, 0)]], 1).extra_ns == 0  # better by the least there is
    assert solve_chain([(Mode(1, 1, 0, 5), Mode(0, 2, 0, 5))], 2).extra_ns == 5
    assert solve_chain((((Mode(3, 3, 0, 0)), Mode(1, 2, 1, 9)),), 2).choice == (1,)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    mode = Mode(*numpy.arange(4, dtype=numpy.int32)[[1, 3, 0, 2]])
    assert mode == Mode(1, 3, 0, 2) and type(mode.kept) is int


OK = [[Mode(1, 2, 1, 3)]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Mode(-1, 2, 1, 3), ValueError, "kept: expected 0 or more, got -1"),
        (lambda: Mode(1, 2.0, 1, 3), TypeError, "forward_peak: expected a whole number, got 2.0"),
        (lambda: Mode(1, 2, True, 3), TypeError, "backward_transient: expected a whole number, got True"),
        (lambda: Mode(1, 2, 1, "3"), TypeError, "extra_ns: expected a whole number, got '3'"),
        (lambda: Mode(2, 1, 1, 3), ValueError, r"forward_peak: expected at least kept \+ offloaded \(2\)"),
        (lambda: Mode(2, 4, 3, 3, offloaded=3), ValueError, r"forward_peak: expected at least kept \+ offloaded \(5\)"),
        (lambda: Mode(2, 5, 2, 3, offloaded=3), ValueError, r"backward_transient: expected at least offloaded \(3\)"),
        (lambda: solve_chain([], 1), ValueError, "blocks: expected at least one block"),
        (lambda: solve_chain(7, 1), TypeError, "blocks: expected a sequence of blocks, got int"),
        (lambda: solve_chain([*OK, []], 1), ValueError, r"blocks\[1\]: expected at least one Mode"),
        (lambda: solve_chain([OK[0][0]], 1), TypeError, r"blocks\[0\]: expected a sequence of Mode, got Mode"),
        (lambda: solve_chain([*OK, [(1, 2, 1, 3)]], 1), TypeError, r"blocks\[1\]\[0\]: expected a Mode, got tuple"),
        (lambda: solve_chain(OK, 1.5), TypeError, "budget_bytes: expected a whole number, got 1.5"),
        (lambda: solve_chain(OK, -1), ValueError, "budget_bytes: expected 0 or more, got -1"),
        (lambda: solve_chain(OK, 9, host_bytes=-1), ValueError, "host_bytes: expected 0 or more, got -1"),
        (lambda: solve_chain(OK, 9, bytes_per_second=0), ValueError, "bytes_per_second: expected a finite number"),
        (lambda: solve_chain(OK, 9, bytes_per_second=float("nan")), ValueError, "bytes_per_second: expected a finite"),
        (lambda: solve_chain(OK, 9, bytes_per_second="9"), TypeError, "bytes_per_second: expected a number, got '9'"),
        (
            lambda: solve_chain([[Mode(0, 1, 1, 0), Mode(0, 1, 1, 0, 1)]], 9, host_bytes=1),
            ValueError,
            "bytes_per_second: expected the rate of the host link",
        ),
        (
            lambda: solve_chain([[Mode(0, 2, 2, 0, 2)]] * 3, 9, host_bytes=5, bytes_per_second=1),
            ValueError,
            "host_bytes: expected at least 6, for no plan offloads less, got 5",
        ),
        (lambda: solve_chain([[Mode(1, 2**58, 1, 0)]] * 2, 9), ValueError, r"blocks: expected less than 2\^59 bytes"),
        (
            lambda: solve_chain([[Mode(0, 2, 2, 0, 2**31)]], 9, host_bytes=2**31, bytes_per_second=1),
            ValueError,
            "forward_peak",
        ),
        (
            lambda: solve_chain([[Mode(0, 2**31, 2**31, 0, 2**31)]], 9, host_bytes=2**31, bytes_per_second=1),
            ValueError,
            r"blocks: expected less than 2\^59 nanoseconds added",
        ),
    ],
)
def test_bad_input_is_one_error_that_names_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_missing_core_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prfl_fast._native", None)
    forget_the_core()
    try:
        with pytest.warns(UserWarning, match="compiled planner is not there") as caught:
            plan = solve_chain(OK, 2)
        assert len(caught) == 1 and plan.choice == (0,)
        solve_chain(OK, 2)  # a second warning would be an error
        monkeypatch.setattr(doctor, "_OPTIONAL", ())
        assert "the same in Python runs instead" in doctor.examine().compiled["planner core"]
    finally:
        forget_the_core()


def forget_the_core() -> None:
    door._load.cache_clear()
    door._native.cache_clear()
