"""Search: which layers follow whom, by measured divergence.

1. Head maps and errors of every pair of layers in closed form (calibrate.py).
2. Every layer follows its best leader alone, measured. Divergence over error says how much an error in that layer
   matters; error times that is the forecast for its other leaders.
3. Greedy: of the candidates with the lowest forecasts, the plan takes the one that measures best; what was measured
   becomes the forecast of the ones not taken.
4. While time remains: a follower's leader is changed, or a follower exchanged for another layer, where that measures
   better. At the end each follower's map is chosen again, its heads together, from what it sees
   once those before it follow.

Every measurement is kept in `Findings`, so that a search that is broken off goes on where it was, and is the same
search: time decides how far it gets, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study.calibrate import best_map, pair_errors
from minisa.study.findings import Findings, Point
from minisa.study.head_maps import remap
from minisa.study.judge import Judge
from minisa.study.loss import NO_NUMBERS

WIDTH = 4  # candidates measured at every step of the greedy search


class Search:
    """A search on one model.

    plain: without followers. calibration [N, T]: what head maps are made from. held_out [M, T]: what is measured on.
    deadline: time.monotonic() from which on nothing is measured that is not needed. report: called with a line for
    people, saved when findings have grown.
    """

    def __init__(
        self,
        plain: Transformer,
        calibration: Tensor,
        held_out: Tensor,
        findings: Findings,
        *,
        deadline: float,
        report: Callable[[str], None] = lambda line: None,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.plain, self.calibration, self.held_out = plain, calibration, held_out
        self.findings, self.deadline, self.report, self.saved = findings, deadline, report, saved
        self.n_layers = plain.config.n_layers
        self._judge: Judge | None = None
        self._base = SharingPlan.none(self.n_layers)
        self._forecasts: dict[tuple[int, int], float] = {}

    def run(self, n_followers: int) -> list[Point]:
        """The plans of 1, 2, … n_followers followers, the last of them bettered while time remains.

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
        points[-1] = self._remapped(self._bettered(points[-1]))
        return points

    def mapped(self, plan: SharingPlan) -> Point:
        """A plan that is given, with head maps."""
        self._calibrate()
        chosen = self._plan(_leaders(plan))
        return self._remapped(Point(chosen, self._measure(chosen)))

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self.deadline

    def _calibrate(self) -> None:
        if self.findings.pairs:
            return
        total = len(self.calibration) * self.n_layers

        def progress(done: int, _: int) -> None:
            if done % self.n_layers == 0:
                self.report(f"head maps: {done} of {total} layers of text")

        errors = pair_errors(self.plain, self.calibration, progress=progress)
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
            alone = max(self._measure(self._plan({follower: best})), 1e-6)
            self.report(f"layer {follower} alone, led by {best}: {alone:.4f}")
            for leader, error in errors.items():
                self._forecasts[leader, follower] = alone * error / errors[best]

    def _grown(self, plan: SharingPlan) -> Point:
        """The best plan found with one follower more."""
        leaders = _leaders(plan)
        base = self._measure(plan) if leaders else 0.0
        self._base = plan
        # A layer once: its best leader speaks for it until it has been measured.
        candidates = sorted(self._candidates(plan), key=lambda pair: self._forecasts[pair])
        once: dict[int, tuple[int, int]] = {}
        for pair in candidates:
            once.setdefault(pair[1], pair)
        best: Point | None = None
        for pair in list(once.values())[:WIDTH]:
            grown = self._plan({**leaders, pair[1]: pair[0]})
            if best is not None and self.out_of_time and _key(grown) not in self.findings.measured:
                break
            point = Point(grown, self._measure(grown))
            self._forecasts[pair] = max(point.divergence - base, 1e-6)
            if best is None or point.divergence < best.divergence:
                best = point
        if best is None:
            raise MinisaError(f"--followers: after {plan} no layer is left that could follow: ask for fewer")
        return best

    def _bettered(self, point: Point) -> Point:
        """Followers exchanged and leaders changed, the most promising first, until nothing helps or time is up."""
        tried: set[str] = {_key(point.plan)}
        while True:
            moves = [plan for plan in self._moves(point.plan) if _key(plan) not in tried]
            self._base = point.plan
            better = None
            for plan in moves:
                if self.out_of_time and _key(plan) not in self.findings.measured:
                    return point
                tried.add(_key(plan))
                found = Point(plan, self._measure(plan))
                if found.divergence < point.divergence:
                    better = found
                    break
            if better is None:
                return point
            self.report(f"exchanged: {better.plan} diverges {better.divergence:.4f}")
            point = better

    def _moves(self, plan: SharingPlan) -> Iterator[SharingPlan]:
        """Plans one exchange away, in the order of their forecasts; each follower's two best substitutes."""
        leaders = _leaders(plan)
        moves: list[tuple[float, dict[int, int]]] = []
        for follower, leader in leaders.items():
            rest = {layer: source for layer, source in leaders.items() if layer != follower}
            own = self._forecasts[leader, follower]
            options = sorted(self._candidates(self._plan(rest)), key=lambda pair: self._forecasts[pair])
            best_of: dict[int, tuple[int, int]] = {}
            for option in options:
                best_of.setdefault(option[1], option)
            others = [option for option in best_of.values() if option[1] != follower][:2]
            renewed = [option for option in options if option[1] == follower and option[0] != leader][:2]
            for source, layer in (*others, *renewed):
                moves.append((self._forecasts[source, layer] - own, {**rest, layer: source}))
        moves.sort(key=lambda move: move[0])
        return (self._plan(leaders) for _, leaders in moves)

    def _candidates(self, plan: SharingPlan) -> Iterator[tuple[int, int]]:
        """(leader, follower) that the plan could take in: neither follows yet, and the follower leads nobody."""
        for follower in plan.leaders[1:]:
            if follower not in plan.spans:
                yield from ((leader, follower) for leader in plan.leaders if leader < follower)

    def _remapped(self, point: Point) -> Point:
        """With head maps made again in the plan itself, where that measures better."""
        spans = str(point.plan)
        if spans not in self.findings.maps:
            maps = remap(self.plain, point.plan, self.calibration).head_maps
            self.findings.maps[spans] = {i: heads for i in point.plan.followers if (heads := maps[i]) is not None}
            self.saved()
        plan = SharingPlan.following(self.n_layers, _leaders(point.plan), self.findings.maps[spans])
        found = Point(plan, self._measure(plan))
        self.report(f"head maps again: {found.divergence:.4f}, before {point.divergence:.4f}")
        return min(found, point, key=lambda either: either.divergence)

    def _plan(self, leaders: dict[int, int]) -> SharingPlan:
        maps = {layer: self.findings.pairs[leader, layer][1] for layer, leader in leaders.items()}
        return SharingPlan.following(self.n_layers, leaders, maps)

    def _measure(self, plan: SharingPlan) -> float:
        key = _key(plan)
        if key not in self.findings.measured:
            self.findings.measured[key] = self._judging().divergence(plan)
            self.saved()
        return self.findings.measured[key]

    def _judging(self) -> Judge:
        if self._judge is None:
            self.report("the plain model on the held-out text")
            self._judge = Judge(self.plain, self.held_out)
        if self._base != self._judge.plan:
            self._judge.rebase(self._base)  # what is measured next differs little from it
        return self._judge


def _leaders(plan: SharingPlan) -> dict[int, int]:
    return {layer: plan.sources[layer] for layer in plan.followers}


def _key(plan: SharingPlan) -> str:
    """A plan and its head maps in one line, e.g. "21<19:0,1,2 27<25"."""
    return " ".join(_parts(plan)) or "none"


def _parts(plan: SharingPlan) -> Iterable[str]:
    for layer in plan.followers:
        heads = plan.head_maps[layer]
        yield f"{layer}<{plan.sources[layer]}" + (f":{','.join(map(str, heads))}" if heads else "")
