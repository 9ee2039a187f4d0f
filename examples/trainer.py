"""transformers.Trainer as it is; one callback brings in selective training.

A tiny model learns to count upwards from any number: python examples/trainer.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gradselect as gs
from gradselect.integrations.transformers import SelectiveTraining

torch.manual_seed(0)
sequences = [(start + torch.arange(12)) % 50 for start in range(50)]
data = [{"input_ids": tokens, "labels": tokens} for tokens in sequences]

# Yours: AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")
config = LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4)
model = LlamaForCausalLM(config)

args = TrainingArguments(
    output_dir="runs/trainer",
    learning_rate=1e-2,
    per_device_train_batch_size=10,
    num_train_epochs=12,
    logging_steps=10,
    use_cpu=not torch.cuda.is_available(),
    save_steps=30,
)
# This model begins untrained, so all of its blocks are candidates. For a pretrained one leave among=None out.
policy = gs.AdaGradSelect(fraction=0.3, among=None)
# Learning rate, weight decay, betas, eps and accumulation come from args.
selective = SelectiveTraining(policy=policy, residency=gs.Offload(), jsonl="runs/trainer/selection.jsonl")
trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[selective])
trainer.train()
trainer.save_model("runs/trainer/final")  # a plain checkpoint: LlamaForCausalLM.from_pretrained reads it
