"""What the benchmarks of the sparse methods read, count and print; no training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

glue = pytest.importorskip("glue", reason="needs peft and scipy", exc_type=ImportError)
gsm8k_masks = pytest.importorskip("gsm8k_masks")
pretrain_encoder = pytest.importorskip("pretrain_encoder")
sparse_step = pytest.importorskip("sparse_step")


# GLUE ----------------------------------------------------------------------------------------------------------------


LINES = {
    "CoLA": (None, 'gj04\t0\t*\tHe said "no', (('He said "no',), 0.0)),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\tA man.\tA cat.\tnot_entailment", (("A man.", "A cat."), 1.0)),
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "1\t7\t8\tHe ran.\tRan he.",
        (("He ran.", "Ran he."), 1.0),
    ),
    "STS-B": (None, "0\tg\tf\ty\t0001\tnone\tnone\tA plane.\tA jet.\t3.750", (("A plane.", "A jet."), 0.5)),
}


@pytest.mark.parametrize("name", glue.TASKS)
def test_a_line_of_each_task_is_its_texts_and_its_label(name: str, tmp_path: Path):
    header, line, (texts, label) = LINES[name]
    lines = ([header] if header else []) + [line, line]
    (tmp_path / "dev.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert glue.TASKS[name].read(tmp_path / "dev.tsv") == [glue.Example(texts, label)] * 2


def test_matthews_is_the_correlation_of_two_binary_variables():
    generator = torch.Generator().manual_seed(0)
    predicted, labels = torch.randint(0, 2, (2, 50), generator=generator).float()
    expected = torch.corrcoef(torch.stack([predicted, labels]))[0, 1].item()
    assert glue.matthews(predicted, labels) == pytest.approx(expected, abs=1e-6)


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    predicted, labels = torch.tensor([1.0, 1, 1, 0, 0]), torch.tensor([1.0, 0, 1, 1, 0])
    assert glue.f1(predicted, labels) == pytest.approx(2 / 3)
    assert glue.f1(torch.zeros(5), labels) == 0.0


def test_a_constant_answer_has_no_correlation_and_the_share_of_the_majority():
    labels = torch.tensor([1.0, 1, 0, 1])
    assert glue.constant(glue.TASKS["CoLA"], labels) == {"matthews": 0.0}
    assert glue.constant(glue.TASKS["RTE"], labels) == {"accuracy": 0.75}
    assert glue.constant(glue.TASKS["STS-B"], torch.linspace(-1, 1, 4)) == {"spearman": 0.0}


def part(size: int) -> Any:
    lengths = torch.arange(size) % 5 + 1
    mask = (torch.arange(8) < lengths[:, None]).long()
    return glue.Part({"input_ids": torch.arange(size)[:, None] * mask, "attention_mask": mask}, torch.arange(size))


def test_an_epoch_visits_every_example_once_and_epochs_differ():
    seen = torch.cat([labels for _, labels in glue.batches(part(12), size=4, steps=6, seed=0)])
    assert seen[:12].sort().values.tolist() == seen[12:].sort().values.tolist() == list(range(12))
    assert seen[:12].tolist() != seen[12:].tolist()


def test_a_batch_has_no_column_of_padding_alone():
    inputs, _ = part(5).take(torch.tensor([0, 2]))
    assert inputs["input_ids"].shape == (2, 3)


def test_held_out_examples_are_no_training_examples():
    rest, unseen = glue.held_out(part(glue.NUM_HELD_OUT + 20))
    assert len(rest.labels) == 20
    assert sorted(rest.labels.tolist() + unseen.labels.tolist()) == list(range(glue.NUM_HELD_OUT + 20))


def test_the_rate_rises_and_falls_to_nothing():
    shares = [glue.rate_share(step, 100) for step in range(101)]
    assert max(shares) == pytest.approx(1.0, abs=0.02)
    assert 0 < shares[0] < shares[4] > shares[50] > shares[99] > shares[100] == 0


def test_the_table_of_glue_has_means_over_seeds_and_over_tasks():
    rows = [
        {"task": task, "part": "dev", "method": "ID3", "lr": 0.01, "seed": seed, "scores": scores, "num_entries": 18432}
        for task, metrics in (("RTE", ["accuracy"]), ("MRPC", ["f1", "accuracy"]))
        for seed, value in enumerate((0.5, 0.7))
        for scores in [dict.fromkeys(metrics, value)]
    ]
    unseen = rows[0] | {"part": "held-out", "lr": 0.03}
    assert glue.table([unseen, *rows]).splitlines()[-1] == (
        "| ID3 | 0.01 | 18,432 | 60.0 (50.0, 70.0) | 60.0 / 60.0 (50.0, 70.0) | 60.0 |"
    )


# The encoder ---------------------------------------------------------------------------------------------------------


def test_masked_places_are_fifteen_per_cent_of_the_words_and_targets_are_what_stood_there():
    recipe = pretrain_encoder.Recipe()
    stream = torch.randint(5, 4096, (1000,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    batch = pretrain_encoder.make_batch(stream, recipe, torch.Generator().manual_seed(1), repeat_share=1.0)
    assert batch.input_ids.shape == (32, 63)
    assert len(batch.positions) == 32 * 9
    shown = batch.input_ids.flatten()[batch.positions]
    assert 0.6 < (shown == pretrain_encoder.MASK).float().mean() < 0.95
    # B repeats A: a word that is shown in both halves is the same in both
    first, second = batch.input_ids[:, 1:31], batch.input_ids[:, 32:62]
    assert (first == second).float().mean() > 0.6
    assert (batch.input_ids[:, [31, 62]] == pretrain_encoder.SEP).all()


def test_a_mixed_text_is_the_first_moved_or_the_second_by_the_share_that_is_kept():
    recipe, generator = pretrain_encoder.Recipe(), torch.Generator().manual_seed(0)
    first, second = torch.arange(30).repeat(3, 1), torch.arange(100, 130).repeat(3, 1)
    whole, none, half = pretrain_encoder.mixed(first, second, torch.tensor([1.0, 0.0, 0.5]), recipe, generator)
    assert whole.tolist() == first[0].roll(-int(whole[0])).tolist()
    assert none.tolist() == second[0].tolist()
    assert 5 < (half < 100).sum() < 25


def test_word_vectors_of_words_in_the_same_company_are_alike():
    """Words 5 and 6 stand between the same neighbours, 7 and 8 between others."""
    recipe = pretrain_encoder.Recipe(vocab_size=12, hidden_size=4, neighbours=1)
    words = torch.tensor([9, 5, 9, 6, 9] * 20 + [10, 7, 11, 8, 10] * 20)
    vectors = torch.nn.functional.normalize(pretrain_encoder.word_vectors(words, recipe), dim=1)
    assert vectors[5] @ vectors[6] > 0.9 > abs(vectors[5] @ vectors[7])


# Steps and bytes -----------------------------------------------------------------------------------------------------


def test_live_bytes_counts_what_exists_and_remembers_the_most():
    with sparse_step.LiveBytes() as live:
        kept = torch.zeros(100)
        gone = torch.zeros(1000) + 1  # two tensors for a moment
        del gone
        kept.view(10, 10).add_(1)
    assert (live.now, live.peak) == (400, 8400)


def test_id3_at_its_last_steps_has_the_entries_of_its_schedule():
    model = tiny_llama()
    optimizer = sparse_step.last_id3(model, num_steps=3)
    assert sum(map(len, optimizer.entries.values())) == optimizer.mask.num_unmasked(sparse_step.STEPS - 4)


def test_what_is_dealt_out_adds_up():
    assert sparse_step.dealt_out([1, 10, 100], 37) == [0, 3, 34]


def test_the_table_of_steps_has_ratios_of_medians():
    rows = [
        {"size": "9M", "method": name, "direct_seconds": seconds, "difference_seconds": seconds, "step_seconds": 1.0}
        for name, seconds in ((sparse_step.BASELINE, 0.01), ("ID3", 0.02), (sparse_step.PACKAGE, 0.3))
    ]
    line = sparse_step.markdown({"rows": rows}).splitlines()[5]
    assert line.startswith("| ID3 | 20.0 | 20.0 | 2.00 | 15.00 |")


def test_entries_of_layers_are_counted_apart(tmp_path: Path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    total, linears = gsm8k_masks.num_entries(tmp_path)
    assert total == sum(p.numel() for p in model.parameters())
    assert linears == sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
