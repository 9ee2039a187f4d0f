"""ID3 beside the public package of the paper's authors, where its known defects do not bite."""

import copy

import pytest
import torch
from torch import nn

import gradselect as gs

peer = pytest.importorskip(
    "selective_optimizers.wrap", reason="the authors' package is not installed: pip install 'gradselect[peers]'"
)

NUM_STEPS = 8
MODELS = {
    "one tensor": lambda: nn.Linear(12, 10, bias=False),
    "several tensors": lambda: nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 10)),
}


@pytest.mark.parametrize(("eps", "exponent"), [(0.1, 1.0), (1e-3, 2.0), (1.0, 0.0), (0.5, -1.0)])
@pytest.mark.parametrize("budget", [NUM_STEPS, 5 * NUM_STEPS, 12 * NUM_STEPS])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_same_entries_are_unmasked_step_by_step(build, budget, eps, exponent):
    """No ties (real gradients), no weight decay, steps divide the budget, and the package masks all tensors.

    Its weights take another path, since its bias correction counts steps from the first one for late entries too: so
    after each step both go on from the weights of ours.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = build()
    theirs = copy.deepcopy(ours)
    mask = gs.ID3(budget=budget, steps=NUM_STEPS, eps=eps, exponent=exponent)
    optimizer = gs.SparseOptimizer(ours, mask, lr=1e-2, weight_decay=0.0)
    selective = peer.get_id3(peer.get_base_optimizer(torch.optim.AdamW))
    twin = selective(
        theirs.parameters(), lr=1e-2, budget=budget, max_steps=NUM_STEPS, eps=eps, exp=exponent, verify=False
    )
    for step in range(NUM_STEPS):
        inputs, targets = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(step)), None
        for model, each in ((ours, optimizer), (theirs, twin)):
            targets = inputs[1, :, :10]
            (model(inputs[0]) - targets).square().mean().backward()
            each.step()
            each.zero_grad()
        masks = twin.param_groups[0]["chosen_masks"]
        expected = {name: mask for (name, _), mask in zip(theirs.named_parameters(), masks, strict=True)}
        found = optimizer.entries
        assert sum(indices.numel() for indices in found.values()) == budget // NUM_STEPS * (step + 1)
        for name, chosen in expected.items():
            indices = chosen.view(-1).nonzero().view(-1)
            assert torch.equal(found.get(name, indices[:0]), indices), (name, step)
        theirs.load_state_dict(ours.state_dict())
