"""Search: which layers follow whom, by measured divergence.

1. Head maps and errors of every pair of layers in closed form (calibrate.py).
2. Every layer follows its best leader alone, measured. Divergence over error says how much an error in that layer
   matters; error times that is the forecast for its other leaders.
3. Greedy: of the candidates with the lowest forecasts, the plan takes the one that measures best; what was measured
   becomes the forecast of the ones not taken.
4. While time remains: a follower's leader is changed, or a follower exchanged for another layer, where that measures
   better. At the end each follower's map is chosen again (head_maps.py), where that measures better.

Every measurement is kept in `Findings`. A search that is broken off goes on where it was, and is the same search: time
decides how far it gets, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study.calibrate import best_map, pair_errors
from minisa.study.head_maps import Heads, remap
from minisa.study.judge import Judge
from minisa.study.loss import NO_NUMBERS

WIDTH = 4  # candidates measured at every step of the greedy search

Pair = tuple[int, int]  # leader and follower
Key = tuple[tuple[int, ...], tuple[Heads | None, ...]]  # a plan's sources and head maps


@dataclass
class Findings:
    """All that a search has found out so far."""

    pairs: dict[Pair, tuple[float, Heads]] = field(default_factory=dict)  # error and head map
    measured: dict[Key, float] = field(default_factory=dict)  # divergence


@dataclass(frozen=True, slots=True)
class Point:
    """A plan and its divergence, nats a token."""

    plan: SharingPlan
    divergence: float


@dataclass
class Search:
    """A search on one model.

    plain: without followers. calibration [N, T]: what head maps are made from. held_out [M, T]: what is measured on.
    deadline: time.monotonic() from which on only what is needed is measured. report: called with a line for people,
    saved when findings have grown.
    """

    plain: Transformer
    calibration: Tensor
    held_out: Tensor
    findings: Findings
    deadline: float
    report: Callable[[str], None] = lambda line: None
    saved: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.n_layers = self.plain.config.n_layers
        self._judge: Judge | None = None  # made only when something is left to measure
        self._base = SharingPlan.none(self.n_layers)  # what is measured next differs little from it
        self._forecasts: dict[Pair, float] = {}

    def run(self, n_followers: int) -> list[Point]:
        """The plans of 1, 2, … n_followers followers, the last of them improved while time remains.

        Raises MinisaError where so many cannot follow.
        """
        if not 1 <= n_followers < self.n_layers:
            raise MinisaError(f"--followers is {n_followers}: expected 1 to {self.n_layers - 1}, layer 0 must lead")
        self._calibrate()
        self._forecast()
        points = []
        plan = SharingPlan.none(self.n_layers)
        for number in range(1, n_followers + 1):
            points.append(self._grown(plan))
            plan = points[-1].plan
            self.report(f"{number} of {n_followers} followers: {plan} diverges {points[-1].divergence:.4f}")
        points[-1] = self._remapped(self._improved(points[-1]))
        return points

    def mapped(self, plan: SharingPlan) -> Point:
        """A given plan, with head maps."""
        self._calibrate()
        return self._remapped(self._point(self._plan(_leaders(plan))))

    def _calibrate(self) -> None:
        if self.findings.pairs:
            return
        total = len(self.calibration)
        errors = pair_errors(
            self.plain, self.calibration, progress=lambda done: self.report(f"head maps: {done} of {total} windows")
        )
        if errors.isnan().any():
            raise MinisaError(NO_NUMBERS)
        for follower in range(1, self.n_layers):
            for leader in range(follower):
                found = errors[leader, follower]
                error = max(found.min(0).values.sum().item(), 1e-9)  # it divides
                self.findings.pairs[leader, follower] = (error, best_map(found))
        self.saved()

    def _forecast(self) -> None:
        """Every layer alone, measured with its best leader; the other leaders' divergence in proportion."""
        for follower in range(1, self.n_layers):
            errors = {leader: self.findings.pairs[leader, follower][0] for leader in range(follower)}
            best = min(errors, key=lambda leader: errors[leader])
            alone = max(self._point(self._plan({follower: best})).divergence, 1e-6)
            self.report(f"layer {follower} alone, led by {best}: {alone:.4f}")
            for leader, error in errors.items():
                self._forecasts[leader, follower] = alone * error / errors[best]

    def _grown(self, plan: SharingPlan) -> Point:
        """The best plan found with one follower more."""
        leaders = _leaders(plan)
        base = self._point(plan).divergence if leaders else 0.0
        self._base = plan
        points: list[Point] = []
        for leader, follower in list(_one_each(self._candidates(plan)).values())[:WIDTH]:
            grown = self._plan({**leaders, follower: leader})
            if points and self._too_late(grown):
                break
            points.append(self._point(grown))
            self._forecasts[leader, follower] = max(points[-1].divergence - base, 1e-6)
        if not points:
            raise MinisaError(f"--followers: after {plan} no layer is left that could follow: ask for fewer")
        return min(points, key=lambda point: point.divergence)

    def _improved(self, point: Point) -> Point:
        """Followers exchanged and leaders changed, the most promising first, until nothing helps or time is up."""
        tried = {_key(point.plan)}
        better: Point | None = point
        while better is not None:
            point, better = better, None
            self._base = point.plan
            for plan in self._moves(point.plan):
                if _key(plan) in tried:
                    continue
                if self._too_late(plan):
                    return point
                tried.add(_key(plan))
                found = self._point(plan)
                if found.divergence < point.divergence:
                    self.report(f"exchanged: {found.plan} diverges {found.divergence:.4f}")
                    better = found
                    break
        return point

    def _moves(self, plan: SharingPlan) -> Iterator[SharingPlan]:
        """Plans one exchange away, in the order of their forecasts: for each follower the two best other layers, and
        the two best other leaders."""
        leaders = _leaders(plan)
        moves: list[tuple[float, dict[int, int]]] = []
        for follower, leader in leaders.items():
            rest = {layer: source for layer, source in leaders.items() if layer != follower}
            options = self._candidates(self._plan(rest))
            others = [pair for pair in _one_each(options).values() if pair[1] != follower][:2]
            renewed = [pair for pair in options if pair[1] == follower and pair[0] != leader][:2]
            for pair in (*others, *renewed):
                change = self._forecasts[pair] - self._forecasts[leader, follower]
                moves.append((change, {**rest, pair[1]: pair[0]}))
        moves.sort(key=lambda move: move[0])
        return (self._plan(leaders) for _, leaders in moves)

    def _candidates(self, plan: SharingPlan) -> list[Pair]:
        """Pairs that the plan could take in, the lowest forecast first: both lead themselves, and the follower leads
        nobody."""
        pairs = (
            (leader, follower)
            for follower in plan.leaders[1:]
            if follower not in plan.spans
            for leader in plan.leaders
            if leader < follower
        )
        return sorted(pairs, key=lambda pair: self._forecasts[pair])

    def _remapped(self, point: Point) -> Point:
        """With head maps chosen again in the plan itself, where that measures better."""
        found = self._point(remap(self.plain, point.plan, self.calibration))
        self.report(f"head maps again: {found.divergence:.4f}, before {point.divergence:.4f}")
        return min(found, point, key=lambda either: either.divergence)

    def _plan(self, leaders: dict[int, int]) -> SharingPlan:
        maps = {layer: self.findings.pairs[leader, layer][1] for layer, leader in leaders.items()}
        return SharingPlan.following(self.n_layers, leaders, maps)

    def _too_late(self, plan: SharingPlan) -> bool:
        """Whether there is no time left to measure the plan."""
        return time.monotonic() >= self.deadline and _key(plan) not in self.findings.measured

    def _point(self, plan: SharingPlan) -> Point:
        """The plan, measured if it has not been yet."""
        key = _key(plan)
        if key not in self.findings.measured:
            if self._judge is None:
                self.report("the plain model on the held-out text")
                self._judge = Judge(self.plain, self.held_out)
            if self._base != self._judge.plan:
                self._judge.rebase(self._base)
            self.findings.measured[key] = self._judge.divergence(plan)
            self.saved()
        return Point(plan, self.findings.measured[key])


def _leaders(plan: SharingPlan) -> dict[int, int]:
    return {layer: plan.sources[layer] for layer in plan.followers}


def _one_each(pairs: Iterable[Pair]) -> dict[int, Pair]:
    """{follower: the first of its pairs}."""
    first: dict[int, Pair] = {}
    for pair in pairs:
        first.setdefault(pair[1], pair)
    return first


def _key(plan: SharingPlan) -> Key:
    return plan.sources, plan.head_maps
