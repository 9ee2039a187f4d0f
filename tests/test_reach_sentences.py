"""A model of sentences in SentenceTransformerTrainer: the pooler that its loss does not use is no candidate."""

from __future__ import annotations

import importlib

import pytest
import tiny_models
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

import gradselect as gs
from gradselect.integrations.transformers import SelectiveTraining

sentences = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT with its tokenizer."""
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(40))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path)
    config = transformers.BertConfig(**tiny_models.encoder(layers=3))
    tiny_models.seeded(lambda: transformers.BertModel(config)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("policy", [gs.Uniform(count=1, seed=1), gs.AdaGradSelect(fraction=0.5, explore_steps=3)])
def test_the_pooler_of_a_model_of_sentences_takes_no_place(folder, tmp_path, policy):
    # A folder of a plain encoder gets mean pooling.
    model = sentences.SentenceTransformer(str(folder), device="cpu")
    losses = importlib.import_module("sentence_transformers.losses")
    rows = {"anchor": [f"w{i} w{i + 1}" for i in range(12)], "positive": [f"w{i + 1} w{i}" for i in range(12)]}
    trainer = sentences.SentenceTransformerTrainer(
        model=model,
        args=sentences.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            max_steps=6,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict(rows),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[SelectiveTraining(policy=policy)],
    )
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert optimizer.unreached == ("head",)
    assert optimizer.update_counts["head"] == 0
    assert optimizer.num_steps >= 5
