"""A PyTorch loop of your own; the optimizer's line is the only one that changes.

A tiny model learns to count upwards from any number: python examples/own_loop.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gradselect as gs

STEPS = 60
torch.manual_seed(0)


def counting(batch: int = 16, length: int = 12) -> torch.Tensor:
    starts = torch.randint(0, 50, (batch, 1))
    return (starts + torch.arange(length)) % 50  # (16, 12)


# Yours: AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")
config = LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4)
model = LlamaForCausalLM(config)

# optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
# This model begins untrained, so all of its blocks are candidates. For a pretrained one leave among=None out.
policy = gs.AdaGradSelect(fraction=0.3, among=None, explore_steps=STEPS // 4)
optimizer = gs.BlockOptimizer(model, policy, lr=1e-2)

losses = []
for step in range(STEPS):
    tokens = counting()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

    losses.append(loss.item())
    if step % 10 == 9:
        record = optimizer.last_record
        kind = "explored" if record.explored else "exploited"
        print(f"step {step + 1:3}  loss {losses[-1]:.3f}  {kind}: {', '.join(record.selected)}")

print("updates of each block:", optimizer.update_counts)
print("bytes held:", optimizer.memory())
