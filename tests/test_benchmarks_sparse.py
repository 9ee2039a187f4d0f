"""The benchmarks: their tables, counted bytes, and text; no training."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, tiny_llama

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

adapter_search = importlib.import_module("adapter_search")
common = importlib.import_module("common")
glue = importlib.import_module("glue")
gsm8k_masks = importlib.import_module("gsm8k_masks")
encoder_text = importlib.import_module("encoder_text")
pretrain_encoder = importlib.import_module("pretrain_encoder")
sparse_step = importlib.import_module("sparse_step")
step_time = importlib.import_module("step_time")


# Tables and bytes ---------------------------------------------------------------------------------------------------


def test_the_table_of_step_times_has_the_share_of_the_limit_where_the_result_has_it():
    rows = common.read_result(step_time.RESULT)["methods"][:2]
    before = [{key: value for key, value in row.items() if key != "limit_reached"} for row in rows]
    after = [{**before[0], "limit_reached": None}, {**before[1], "limit_reached": 0.914}]
    assert "of limit" not in step_time.markdown({"methods": before})
    heading, _, *lines = step_time.markdown({"methods": after}).splitlines()
    column = heading.split("|").index(" of limit ")
    assert [line.split("|")[column].strip() for line in lines] == ["", "91 %"]


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


# The search for adapters ---------------------------------------------------------------------------------------------


def test_rates_are_chosen_by_held_out_problems_and_reported_on_others():
    seeds = [
        {
            "held_out": {name: {"0.1": 2.0 + gap, "0.3": 1.0} for name in ("uniform", "found")},
            "losses": {"uniform": {"0.1": 1.0, "0.3": 1.5}, "found": {"0.1": 1.0, "0.3": 1.25}},
        }
        for gap in (0.0, 0.5)
    ]
    assert adapter_search.best_losses(seeds, "uniform") == ("0.3", [1.5, 1.5])
    assert adapter_search.table({"seeds": seeds}).splitlines()[-1].startswith("| found | 0.3 | 1.2500 | -0.2500 |")
    without = [{"losses": seed["losses"]} for seed in seeds]
    assert adapter_search.best_losses(without, "uniform") == ("0.1", [1.0, 1.0])


def test_runs_of_other_arguments_are_not_taken_over(tmp_path):
    folder = tmp_path / "runs"
    adapter_search.check_folder(folder, {"steps": 40, "rates": [0.01]})
    adapter_search.check_folder(folder, {"steps": 40, "rates": [0.01]})
    with pytest.raises(SystemExit, match=r"was made with steps=40; name a new --folder"):
        adapter_search.check_folder(folder, {"steps": 50, "rates": [0.01]})
    (folder / "setup.json").rename(folder / "0")
    with pytest.raises(SystemExit, match="does not say with which arguments"):
        adapter_search.check_folder(folder, {"steps": 40, "rates": [0.01]})


# The encoder ---------------------------------------------------------------------------------------------------------


def test_masked_places_are_fifteen_per_cent_of_the_words_and_targets_are_what_stood_there():
    recipe = encoder_text.Recipe()
    stream = torch.randint(5, 4096, (1000,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    batch = encoder_text.make_batch(stream, recipe, torch.Generator().manual_seed(1), repeat_share=1.0)
    assert batch.input_ids.shape == (32, 63)
    assert len(batch.positions) == 32 * 9
    shown = batch.input_ids.flatten()[batch.positions]
    assert 0.6 < (shown == encoder_text.MASK).float().mean() < 0.95
    # B repeats A: a word that is shown in both halves is the same in both
    first, second = batch.input_ids[:, 1:31], batch.input_ids[:, 32:62]
    assert (first == second).float().mean() > 0.6
    assert (batch.input_ids[:, [31, 62]] == encoder_text.SEP).all()


def test_a_mixed_text_is_the_first_moved_or_the_second_by_the_share_that_is_kept():
    recipe, generator = encoder_text.Recipe(), torch.Generator().manual_seed(0)
    first, second = torch.arange(30).repeat(3, 1), torch.arange(100, 130).repeat(3, 1)
    whole, none, half = encoder_text.mixed(first, second, torch.tensor([1.0, 0.0, 0.5]), recipe, generator)
    assert whole.tolist() == first[0].roll(-int(whole[0])).tolist()
    assert none.tolist() == second[0].tolist()
    assert 5 < (half < 100).sum() < 25


def test_word_vectors_of_words_in_the_same_company_are_alike():
    """Words 5 and 6 stand between the same neighbours, 7 and 8 between others."""
    recipe = encoder_text.Recipe(vocab_size=12, hidden_size=4, neighbours=1)
    words = torch.tensor([9, 5, 9, 6, 9] * 20 + [10, 7, 11, 8, 10] * 20)
    vectors = torch.nn.functional.normalize(pretrain_encoder.word_vectors(words, recipe), dim=1)
    assert vectors[5] @ vectors[6] > 0.9 > abs(vectors[5] @ vectors[7])


# Steps -----------------------------------------------------------------------------------------------------


def test_live_bytes_counts_what_exists_and_remembers_the_most():
    with common.LiveBytes() as live:
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


def test_methods_take_turns_and_warmup_is_not_counted():
    visited: list[str] = []
    model = tiny_llama()
    optimizer = common.fused_adamw(model, lr=1e-3)
    methods = [
        common.Method(name, model, optimizer, after_backward=lambda name=name: visited.append(name)) for name in "ab"
    ]
    batches = common.random_batches(VOCABULARY, batch=1, length=4)
    common.take_turns(methods, batches, warmup=1, rounds=2)
    assert visited == ["a", "b"] * 3
    assert [len(method.seconds) for method in methods] == [2, 2]


def test_a_section_without_markers_is_refused():
    assert common.fill_section("<!-- x: begin -->old<!-- x: end -->", "x", "new \\1").count("new \\1") == 1
    with pytest.raises(SystemExit, match="no markers <!-- y: begin -->"):
        common.fill_section("text", "y", "new")
