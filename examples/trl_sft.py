"""TRL's SFTTrainer as it is, on prompts and completions: python examples/trl_sft.py

A tiny model learns to add two digits; only completions count in the loss.
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import gradselect as gs
from gradselect.integrations.transformers import SelectiveTraining

torch.manual_seed(0)
data = Dataset.from_list([{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(10) for b in range(10)])

# Yours: SFTTrainer(model="Qwen/Qwen2.5-0.5B", ...), which brings its tokenizer
words = {word: index for index, word in enumerate(["<pad>", "<eos>", "+", "=", *map(str, range(19))])}
splitter = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4
)
model = LlamaForCausalLM(config)

args = SFTConfig(
    output_dir="runs/trl_sft",
    learning_rate=1e-2,
    per_device_train_batch_size=20,
    num_train_epochs=12,
    logging_steps=10,
    use_cpu=not torch.cuda.is_available(),
    save_strategy="no",
)
# This model begins untrained, so all of its blocks are candidates. For a pretrained one leave among=None out.
policy = gs.AdaGradSelect(fraction=0.3, among=None)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[SelectiveTraining(policy=policy, jsonl="runs/trl_sft/selection.jsonl")],
)
trainer.train()
