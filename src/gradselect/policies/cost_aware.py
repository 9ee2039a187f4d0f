"""CostAware: a depth of the backward pass by gain per time, then blocks above it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from gradselect.blocks import (
    LAYERS,
    Depth,
    Norms,
    log_gamma,
    random_stream,
    resolve_count,
    resolve_count_now,
    taking_part,
    tells,
)
from gradselect.core import Measure
from gradselect.usage import UsageError, check_one_of, check_positive, check_whole

from .epsilon_greedy import AbstractEpsilonGreedy


@final
@dataclass(eq=False, kw_only=True)
class CostAware(AbstractEpsilonGreedy):
    """Draw how deep the backward pass goes by expected gain per time, then blocks above by AdaGradSelect's rule.

    The time of a step depends on its lowest block, because input gradients are computed of all that lies above. A *cut*
    is a layer: a step trains a block of it, and others of it and above.

        explore (as AdaGradSelect)   full backward;  G_b += gain of b;  S = the k blocks of largest G_b;  f_b += 1 in S
        exploit, each m-th step      cut = the lowest layer, blocks below it included        m = full_every
        exploit, otherwise           cut c with probability  floor / C + (1 - floor) r_c / sum(r)     C: number of cuts
                                     r_c = expected gain / expected time of a step with this cut
        in both                      p ~ Dirichlet(f + delta);  S = the block of largest p_b at the cut, and the k - 1
                                     others of largest p_b at and above it

    All of this is our choice:

    * **Gain** is |g|_1, to which the first-order gain of an Adam step is proportional, or |g|_2^2, for a gradient step;
      added up over explore steps, in which all blocks are measured alike. Expectations weigh blocks by f_b + delta.
    * **Time** is `cost`, the FLOPs of the step: forward pass, input gradients from the cut upwards, weight gradients.
    * **A block at the cut** always trains: no step goes deeper than it has to, the lower layers get their turn, and the
      mean time depends little on which blocks win, so it is known before training.
    * **f_b** counts explore steps only, in which every block can be selected. Exploit draws would count how often a
      block was available: blocks near the head lie above every cut, and would lock in.
    * **Blocks above the layers** (norm, head) train beside a block at the cut: with k = 1 in explore steps only.
    * **Blocks below the layers** (an embedding) force the whole depth, so only each m-th step can select them.
    * **Candidates** are by default all blocks but embeddings, final norms and heads over the vocabulary, as with
      AdaGradSelect.
    * **k** is a share of all candidates. Cuts that leave fewer than k blocks are not drawn: every step trains k blocks.

    Args:
        fraction: share of the candidate blocks that trains in a step, k = max(1, round(fraction * blocks)). Default
            0.2 unless `count` is given.
        count: k itself, instead of `fraction`.
        full_every: m. The least share of exploit steps of the whole depth is 1 / m. 1: all of them.
        floor: share of the other exploit steps whose cut is drawn uniformly. With C cuts each has a chance of at least
            floor / C. 1: no regard to gain and time.
        gain: "l2", or "l1", to which Adam's first-order gain lr |g|_1 is proportional. Which is better is not settled.
        explore_steps: N, in optimizer steps; a quarter of the run is a good start. None: `gradselect train` or the
            Trainer's callback fills it in: the steps of the first epoch, but at most a quarter of the run.
        epsilon_end: value of eps_t = epsilon_end^(t / N), the chance that step t explores, at t = N.
        delta: added to every count. A larger one draws more evenly.
        among: names or globs of the candidate blocks, e.g. `("layer.1?",)`. "layers" stands for all but embeddings,
            final norms and heads over the vocabulary. None: all.
        seed: seed of every draw.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        >>> policy = CostAware(count=1, explore_steps=1, full_every=4).bind(gs.partition(model))
        >>> policy.commit(0, ("layer.3",), dict.fromkeys(policy.names, 1.0))  # an explore step with equal gains
        >>> [round(chance, 2) for chance in policy.cut_chances().values()]
        [0.22, 0.23, 0.26, 0.29]

    Reference: the explore phase and the Dirichlet draw are those of Kumar, Gupta, Chawla, "AdaGradSelect",
    arXiv 2512.15764.
    """

    method_name = "costaware"

    fraction: float | None = None
    count: int | None = None
    full_every: int = 2
    floor: float = 0.25
    gain: Literal["l2", "l1"] = "l2"
    explore_steps: int | None = None
    epsilon_end: float = 0.01
    delta: float = 1.0
    among: Sequence[str] | None = (LAYERS,)
    seed: int = 0

    counts: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    gains: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    filled_explore_steps: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.check_shared_settings()
        check_whole("full_every", self.full_every)
        check_positive("floor", self.floor, at_most=1, example=0.25)
        check_one_of("gain", self.gain, ("l1", "l2"))

    def start(self) -> None:
        self.candidates = taking_part(self.candidates, self.among)
        resolve_count(num_blocks=len(self.candidates), fraction=self.fraction, count=self.count)
        if not any(self.cost.depths[name].is_in_layer for name in self.names):
            raise UsageError(
                f"CostAware draws how many layers the backward pass visits, but none of its {len(self.names)} blocks "
                f"is in a layer ({', '.join(self.names[:3])}); name blocks of layers in among=..., or write "
                "AdaGradSelect(fraction=0.2)"
            )
        self.counts = dict.fromkeys(self.names, 0.0)
        self.gains = dict.fromkeys(self.names, 0.0)

    def measured(self) -> Measure:
        return self.gain

    def draws_evenly(self) -> bool:
        return False

    def propose(self, step: int) -> tuple[str, ...] | None:
        if self.explores(step):
            return None
        generator = random_stream(seed=self.seed, step=step, purpose="exploit")
        shares = {name: log_gamma(generator, self.counts[name] + self.delta) for name in self.names}
        at_cut, above = self._draw_cut(step)
        keys = dict.fromkeys(self.names, -math.inf) | {name: shares[name] for name in above}
        keys[max(at_cut, key=lambda name: shares[name])] = math.inf
        return self.best(step, keys)

    def keep_at(self, step: int) -> int:
        return resolve_count_now(num_blocks=len(self.candidates), fraction=self.fraction, count=self.count)

    def score(self, step: int, block: str, norm: float) -> float:
        return self.gains[block] + self._gain(norm) if math.isfinite(norm) else -math.inf

    def commit(self, step: int, selected: Sequence[str], norms: Norms) -> None:
        if not self.explores(step):
            return
        for name in selected if tells(norms) else ():
            self.counts[name] += 1
        for name, norm in norms.items():
            self.gains[name] += self._gain(norm) if math.isfinite(norm) else 0.0

    def cut_chances(self) -> dict[str, float]:
        """Return the chance of each cut in the next exploit step that is no full one, by the cut's deepest block."""
        rates = self._rates()
        total = sum(rates.values())
        even = 1 / max(1, len(rates))
        return {
            name: self.floor * even + (1 - self.floor) * (rate / total if total > 0 else even)
            for name, rate in rates.items()
        }

    def _draw_cut(self, step: int) -> tuple[list[str], list[str]]:
        """Return the blocks at the cut of exploit step `step`, and all that the step can select."""
        units = self._units()
        if step % self.full_every != self.full_every - 1 and (chances := self.cut_chances()):
            generator = random_stream(seed=self.seed, step=step, purpose="depth")
            [drawn] = generator.choices(list(chances), weights=list(chances.values()))
            names = list(units.values())
            place = next(place for place, members in enumerate(names) if drawn in members)
            return names[place], [name for members in names[place:] for name in members]
        lowest = next((unit for unit in units if unit.is_in_layer), next(iter(units)))
        at_cut = [name for unit, members in units.items() if unit <= lowest for name in members]
        return at_cut, list(self.names)

    def _units(self) -> dict[Depth, list[str]]:
        """Return layers, and components around them, with their blocks; the deepest first."""
        depths = self.cost.depths
        units: dict[Depth, list[str]] = {}
        for name in sorted(self.names, key=depths.__getitem__):
            units.setdefault(Depth(depths[name].unit), []).append(name)
        return units

    def _rates(self) -> dict[str, float]:
        """Return gain per time of each cut that leaves k blocks, by its deepest block, the deepest cut first."""
        others = self.keep_at(0) - 1
        units = self._units()
        above, num_above, rates = _Means(), 0, {}
        for unit, members in reversed(units.items()):
            at_cut = _Means()
            for name in members:
                weight, entries = self.counts[name] + self.delta, self.cost.weight_gradients([name])
                for means in (at_cut, above):
                    means.add(weight, self.gains[name], entries)
            num_above += len(members)
            if unit.is_in_layer and num_above > others:
                backward = self.cost.input_gradients(members[:1]) + at_cut.entries + others * above.entries
                rates[members[0]] = (at_cut.gain + others * above.gain) / self.cost.relative(backward)
        return dict(reversed(rates.items()))

    def _gain(self, norm: float) -> float:
        return norm if self.gain == "l1" else norm**2


@dataclass
class _Means:
    """Means over blocks, weighted as they are drawn: gain, and FLOPs of weight gradients."""

    weight: float = 0.0
    gain: float = 0.0
    entries: float = 0.0

    def add(self, weight: float, gain: float, entries: float) -> None:
        self.weight += weight
        self.gain += weight / self.weight * (gain - self.gain)
        self.entries += weight / self.weight * (entries - self.entries)
