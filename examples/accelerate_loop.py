"""A loop of Accelerate with accumulation, clipping and checkpoints, which stops within an epoch and goes on exactly.

A tiny model learns to count upwards from any number: python examples/accelerate_loop.py
"""

import math

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import gradselect as gs

WINDOW, EPOCHS = 2, 12  # micro-batches in a step; 5 micro-batches in an epoch, so its last step has one
SEQUENCES = [(start + torch.arange(12)) % 50 for start in range(50)]
DATA = [{"input_ids": tokens, "labels": tokens} for tokens in SEQUENCES]


def build():
    # Yours: AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4)
    )


def train(*, stop_at=None, resume=None):
    """Train from the start or from a checkpoint; return the model, its last loss and the records of the steps."""
    set_seed(0)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=WINDOW,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # its order is part of a checkpoint
    )
    model, loader = build(), DataLoader(DATA, batch_size=10, shuffle=True)
    steps_per_epoch = math.ceil(len(loader) / WINDOW)
    # This model begins untrained, so all of its blocks are candidates. For a pretrained one leave among=None out.
    policy = gs.AdaGradSelect(fraction=0.3, among=None, explore_steps=steps_per_epoch)
    optimizer = gs.BlockOptimizer(model, policy=policy, lr=1e-2)
    optimizer.count_passes_if(lambda: accelerator.sync_gradients)  # Accelerate knows which micro-batch ends a window
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=EPOCHS * steps_per_epoch)
    records = []
    optimizer.add_record_hook(records.append)

    model, prepared, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if resume is not None:
        accelerator.load_state(resume)
    first_epoch, num_done = divmod(optimizer.num_steps, steps_per_epoch)

    for epoch in range(first_epoch, EPOCHS):
        loader.set_epoch(epoch)
        rest = skip_first_batches(loader, num_done * WINDOW if epoch == first_epoch else 0)
        for batch in rest:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                prepared.step()
                schedule.step()
                prepared.zero_grad()
            if accelerator.sync_gradients and optimizer.num_steps == stop_at:
                accelerator.save_state("runs/accelerate_loop")
                return accelerator.unwrap_model(model), float(loss.detach()), records
    return accelerator.unwrap_model(model), float(loss.detach()), records


whole, last_loss, records = train()
print("last loss", last_loss)

_, first_loss, begun = train(stop_at=7)  # the first step of the third epoch
resumed, _, continued = train(resume="runs/accelerate_loop")
assert begun + continued == records
assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))
print("stopped after step 7 and resumed: bitwise the same weights")
