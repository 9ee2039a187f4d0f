"""The search: architecture and weights in turns, then early selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from gradselect.usage import UsageError

from .allocation import Allocation
from .relaxation import Gated, Relaxation
from .selection import Scores, Stability, best_set, fit_budget, to_drop, to_fix
from .settings import SearchSettings
from .sites import check_sites, products, sites_of

Loss = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a model of transformers computes from the labels of a batch."""
    return model(**batch).loss


@final
class AdapterSearch:
    """Search for the layers that get a LoRA and for their ranks, within a budget of parameters.

    The model holds a LoRA of the largest rank on every layer that may get one. Each step first moves the logits of the
    choices by a validation batch, then the adapter's weights by training batches. The architecture step draws which
    layers are on in one step, and which ranks they have in the next. When the set of the best layers within the budget
    is stable, the worst layers are dropped for good, round by round, and ranks that no longer move are fixed.

    Args:
        model: a `PeftModel` with a plain LoRA of the rank `settings.ranks[-1]`.
        settings: budget, ranks and the rest.
        loss: loss of a batch; by default the model's own.
        optimizer: of everything in the model that trains. Default: AdamW with learning rate 3e-4.
        max_grad_norm: gradients of the weight step are clipped to this norm; 0: they are not.

    Raises:
        UsageError: the LoRA or the budget does not fit.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...                                     num_hidden_layers=2, num_attention_heads=2))
        >>> config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        >>> model = get_peft_model(base, config)
        >>> search = AdapterSearch(model, SearchSettings(budget=100, num_steps=4, ranks=(1, 4)))
        >>> tokens = torch.arange(16).reshape(2, 8)
        >>> while not search.is_done:
        ...     losses = search.step([{"input_ids": tokens, "labels": tokens}], {"input_ids": tokens, "labels": tokens})
        >>> found = search.finish()
        >>> found.num_parameters <= 100, found.lora_config(config).r in (1, 4)
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        settings: SearchSettings,
        *,
        loss: Loss = model_loss,
        optimizer: torch.optim.Optimizer | None = None,
        max_grad_norm: float = 0.0,
    ) -> None:
        self.sites = sites_of(model)
        check_sites(self.sites, settings)
        self.relaxation = Relaxation(len(self.sites), settings)
        self._model, self._settings, self._loss = model, settings, loss
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=3e-4) if optimizer is None else optimizer
        self._max_grad_norm = max_grad_norm
        logits = [self.relaxation.switches, self.relaxation.sizes]
        self._logits_optimizer = torch.optim.Adam(logits, lr=settings.rate, betas=(0.5, 0.999), weight_decay=1e-4)
        self._costs = torch.tensor(
            [[site.num_parameters(rank=rank) for rank in settings.ranks] for site in self.sites], dtype=torch.float64
        )
        self._scores = Scores(self._costs[:, -1], decay=settings.decay)
        self._stability = Stability(threshold=settings.threshold)
        self._history: list[Tensor] = []
        self._rounds_left = settings.prunings
        self._stable_from: int | None = None
        self._gated = Gated(self.sites)
        self.num_steps = 0

    @property
    def is_done(self) -> bool:
        """True after the last step, or earlier, when the layers and all ranks are decided."""
        return self.num_steps >= self._settings.num_steps or self._rounds_left == 0

    def step(self, train: Sequence[Any], validation: Any) -> tuple[float, float]:
        """Move the logits by a validation batch, then the weights by the mean loss of the training batches.

        Returns:
            Loss of the training batches and of the validation batch.

        Raises:
            UsageError: a loss is NaN or infinite.
        """
        self._model.train()
        validation_loss = self._architecture_step(validation)
        on_validation = [products(site) for site in self.sites]
        train_loss = self._weight_step(train)
        self._scores.update([products(site) for site in self.sites], on_validation)
        if self._max_grad_norm:
            nn.utils.clip_grad_norm_(self._trained, self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.num_steps >= self._settings.first_pruning:
            self._select_early()
        self.num_steps += 1
        return train_loss, validation_loss

    def finish(self) -> Allocation:
        """Return the layers and ranks that were found, within the budget, and take the gates off the model."""
        self._gated.close()
        kept = self.relaxation.is_kept.tolist()
        ranks = [rank if keep else 0 for rank, keep in zip(self.relaxation.best_ranks(), kept, strict=True)]
        costs = [site.num_parameters(rank=1) for site in self.sites]
        found = fit_budget(ranks, self._scores.values.tolist(), costs, self._settings)
        return Allocation(
            ranks={site.name: rank for site, rank in zip(self.sites, found, strict=True) if rank},
            num_parameters=sum(rank * cost for rank, cost in zip(found, costs, strict=True)),
            budget=self._settings.budget,
            num_sites=len(self.sites),
            stable_from=self._stable_from,
            num_steps=self.num_steps,
            scale=self.sites[0].scale,
        )

    def _architecture_step(self, batch: Any) -> float:
        """Move the logits: layers in even steps, ranks in odd ones. First order: the weights stay."""
        choices = self.relaxation
        if self.num_steps % 2 == 0:
            self._gated.set(choices.gates(choices.draw_switches(self.num_steps), choices.best_sizes()))
        else:
            self._gated.set(choices.gates(choices.is_kept.float(), choices.draw_sizes(self.num_steps)))
        self._logits_optimizer.zero_grad()
        loss = self._checked(self._loss(self._model, batch), "validation")
        (loss + choices.penalty().to(loss.device)).backward()
        self._logits_optimizer.step()
        return loss.item()

    def _weight_step(self, batches: Sequence[Any]) -> float:
        """Compute the gradients of the weights, with layers drawn anew for each batch."""
        choices, total = self.relaxation, 0.0
        self._optimizer.zero_grad()
        for batch in batches:
            self._gated.set(choices.gates(choices.draw_switches(self.num_steps), choices.best_sizes()).detach())
            loss = self._checked(self._loss(self._model, batch), "training") / len(batches)
            loss.backward()
            total += loss.item()
        return total

    def _select_early(self) -> None:
        """Drop the worst layers and fix the steadiest ranks, if the best set is stable."""
        choices, scores = self.relaxation, self._scores.values.tolist()
        self._history.append(choices.sizes.detach().clone())
        costs = choices.expected_costs(self._costs).tolist()
        kept = choices.is_kept.tolist()
        chosen = best_set(scores, costs, budget=self._settings.budget, allowed=kept)
        if not self._stability.is_stable(chosen):
            return
        if self._stable_from is None:
            self._stable_from = self.num_steps + 1
        expected = sum(cost for cost, keep in zip(costs, kept, strict=True) if keep)
        amount = (expected - self._settings.budget) / self._rounds_left
        dropped = to_drop(scores, costs, amount=amount, allowed=kept)
        choices.is_kept[dropped] = False
        choices.is_fixed[dropped] = True
        choices.is_fixed[to_fix(self._history, is_fixed=choices.is_fixed, rounds_left=self._rounds_left)] = True
        self._history = []
        self._rounds_left -= 1

    def _checked(self, loss: Tensor, kind: str) -> Tensor:
        if not math.isfinite(loss.item()):
            raise UsageError(
                f"the {kind} loss of search step {self.num_steps + 1} is {loss.item()}; lower the learning rate"
            )
        return loss
