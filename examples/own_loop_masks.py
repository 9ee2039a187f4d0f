"""Single entries in your own loop: ID3 trains 5 % of a model's entries, and the changes become a small file.

A tiny model learns to count upwards from any number: python examples/own_loop_masks.py
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
model.save_pretrained("base")

# optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
optimizer = gs.SparseOptimizer(model, gs.ID3(density=0.05, steps=STEPS), lr=3e-2, max_grad_norm=1.0)

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
        print(f"step {step + 1:3}  loss {losses[-1]:.3f}  entries {sum(record.num_entries.values())}")

print("bytes held:", optimizer.memory())

model.save_pretrained("tuned")
print(gs.delta.diff("base", "tuned", "counting.safetensors"))
