"""Selective training inside Lightning's Trainer and Fabric, in an environment with Lightning and no transformers."""

from __future__ import annotations

import doctest
import json
import logging
import math
import subprocess
import sys
import warnings
from pathlib import Path

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

import gradselect as gs
from gradselect.integrations import lightning as ours
from gradselect.integrations.lightning import SelectionCallback

BATCHES = 5
EPOCHS = 3
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(nn.Module):
    """Token embedding, four layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(4))
        self.head = nn.Linear(8, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(ids)
        for layer in self.layers[:4]:
            hidden = hidden + layer(hidden)
        return nn.functional.cross_entropy(self.head(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def net(dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


def loader(batches: int = BATCHES) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(32, (4 * batches, 6), generator=generator)
    return DataLoader(rows, batch_size=4)


def blocks(model: nn.Module, window: int = 1, **settings):
    return gs.BlockOptimizer(model, policy=gs.AdaGradSelect(fraction=0.3, preset="paper", **settings), lr=1e-2)


def entries(model: nn.Module, window: int = 1, **settings):
    return gs.SparseOptimizer(
        model, mask=gs.ID3(density=0.05, steps=EPOCHS * math.ceil(BATCHES / window)), lr=1e-2, **settings
    )


def adamw(model: nn.Module, window: int = 1):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


class Module(lightning.LightningModule):
    """Trains a `Net` with the optimizer that `make` builds; keeps the names of the weights that each step moved."""

    def __init__(self, make=blocks, window: int = 1, **settings) -> None:
        super().__init__()
        self.net, self.make, self.window, self.settings = net(), make, window, settings
        self.records, self.moved = [], []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        self.optimizer = self.make(self.net, self.window, **self.settings)
        if isinstance(self.optimizer, gs.BlockOptimizer | gs.SparseOptimizer):
            self.optimizer.add_record_hook(self.records.append)
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step / 10))
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch, batch_idx):
        self.before = weights(self.net)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        after = weights(self.net)
        self.moved.append({name for name in after if not torch.equal(after[name], self.before[name])})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def trainer_for(folder: Path, *, callbacks=None, **settings):
    settings = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False, **settings}
    return lightning.Trainer(
        accelerator="cpu",
        devices=settings.pop("devices", 1),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SelectionCallback(jsonl=folder / "selection.jsonl")] if callbacks is None else callbacks,
        **settings,
    )


def members(optimizer: gs.BlockOptimizer, names) -> set[str]:
    """Return the names of the weights of these blocks."""
    return {name for block in gs.partition(net()) if block.name in names for name in block.parameter_names}


SETTINGS = {
    "fp32": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.1},
    "both": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"},
}


# Exactly what the records say --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_exactly_the_recorded_blocks_move(name, tmp_path):
    settings = SETTINGS[name]
    window = settings.get("accumulate_grad_batches", 1)
    module = Module(blocks, window)
    trainer_for(tmp_path, **settings).fit(module, loader())
    steps_per_epoch = math.ceil(BATCHES / window)
    assert module.optimizer.policy.filled_explore_steps == steps_per_epoch
    assert len(module.records) == EPOCHS * steps_per_epoch
    assert all(not record.explored for record in module.records[steps_per_epoch:])
    moved = [names for names in module.moved if names]
    assert moved == [members(module.optimizer, record.selected) for record in module.records]
    lines = (tmp_path / "selection.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line)["selected"]) for line in lines] == [record.selected for record in module.records]


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "bf16-true"])
def test_entries_are_those_of_a_plain_loop(name, tmp_path):
    """The plain loop accumulates, clips and steps the scheduler by hand."""
    settings = SETTINGS[name]
    window, limit = settings.get("accumulate_grad_batches", 1), settings.get("gradient_clip_val")
    module = Module(entries, window)
    trainer = trainer_for(tmp_path, **settings)
    trainer.fit(module, loader())
    assert trainer.gradient_clip_val == limit

    plain = net()
    optimizer = entries(plain, window, max_grad_norm=limit)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
    plain_loop(plain, optimizer, schedule, window, autocast="precision" in settings)
    assert same(module.net, plain)
    if limit is not None:
        assert max(record.grad_norm for record in module.records) > limit


@pytest.mark.parametrize("name", ["fp32", "accumulation", "clipping", "both"])
def test_blocks_are_those_of_a_plain_loop(name, tmp_path):
    settings = SETTINGS[name]
    window, limit = settings.get("accumulate_grad_batches", 1), settings.get("gradient_clip_val")
    module = Module(blocks, window)
    trainer_for(tmp_path, **settings).fit(module, loader())

    plain = net()
    optimizer = blocks(plain, explore_steps=math.ceil(BATCHES / window))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
    plain_loop(plain, optimizer, schedule, window, limit, autocast="precision" in settings)
    assert same(module.net, plain)


def plain_loop(model, optimizer, schedule, window, limit=None, *, autocast=False):
    for _ in range(EPOCHS):
        for number, batch in enumerate(loader(), start=1):
            is_last = number % window == 0 or number == BATCHES
            optimizer.count_passes_if(lambda is_last=is_last: is_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(batch)
            (loss / window).backward()
            if is_last:
                if limit is not None:
                    clipped = [each for group in optimizer.param_groups for each in group["params"]]
                    torch.nn.utils.clip_grad_norm_(clipped, limit)  # Lightning's order, which decides the rounding
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


def test_the_optimizer_may_hold_the_lightning_module_itself(tmp_path):
    class Whole(Module):
        def configure_optimizers(self):
            self.optimizer = blocks(self)
            self.optimizer.add_record_hook(self.records.append)
            return self.optimizer

    module = Whole()
    trainer_for(tmp_path).fit(module, loader())
    assert [bool(names) for names in module.moved] == [True] * EPOCHS * BATCHES
    assert module.optimizer.unreached == ()
    assert module.optimizer.policy.filled_explore_steps == BATCHES


def test_a_block_that_the_loss_does_not_reach_is_no_candidate(tmp_path):
    class Unused(Module):
        def __init__(self):
            super().__init__()
            self.net.layers.append(nn.Linear(8, 8))

    module = Unused()
    trainer_for(tmp_path).fit(module, loader())
    assert module.optimizer.unreached == ("layer.4",)
    assert len(module.records) == EPOCHS * BATCHES


# Steps of the epoch ------------------------------------------------------------------------------------------------

LENGTHS = {
    "epoch": ({}, BATCHES),
    "run shorter than an epoch": ({"max_steps": 3}, 3),
    "part of the batches": ({"limit_train_batches": 4}, 4),
    "short last window": ({"accumulate_grad_batches": 2}, 3),
    "endless epochs": ({"max_epochs": -1, "max_steps": 7}, BATCHES),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_explore_steps_are_those_of_the_epoch(name, tmp_path):
    settings, expected = LENGTHS[name]
    module = Module()
    trainer_for(tmp_path, **settings).fit(module, loader())
    assert module.optimizer.policy.filled_explore_steps == expected


def test_a_stream_explores_over_the_steps_of_the_run(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from loader().dataset

    module = Module()
    trainer_for(tmp_path, max_steps=8, max_epochs=-1).fit(module, DataLoader(Stream(), batch_size=4))
    assert module.optimizer.policy.filled_explore_steps == 8


def test_what_never_trains_is_said_in_a_stream_too(tmp_path, caplog):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from loader().dataset

    module = Module(blocks, 1, explore_steps=2, among=("layer.1", "layer.2"))
    trainer_for(tmp_path, max_epochs=1).fit(module, DataLoader(Stream(), batch_size=4))
    assert "blocks never train" in caplog.text


def test_candidates_that_trained_in_no_step_are_said(tmp_path, caplog):
    def once(net, window):
        return gs.BlockOptimizer(net, policy=gs.GradNormTopK(count=1, refresh=None, among=("layers",)), lr=1e-3)

    module = Module(once)
    trainer_for(tmp_path, max_epochs=1).fit(module, loader())
    never = [name for name in module.optimizer.policy.names if not module.optimizer.update_counts[name]]
    assert f"4 of 5 candidate blocks trained in none of the {BATCHES} steps, {', '.join(never)}: " in caplog.text


def test_the_last_window_of_a_stream_is_a_step(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from loader().dataset

    module = Module(blocks, 2, explore_steps=2)
    trainer_for(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(module, DataLoader(Stream(), batch_size=4))
    assert [bool(names) for names in module.moved] == [False, True, False, True, True]


# Resume ------------------------------------------------------------------------------------------------------------


class StopAfter(lightning.Callback):
    """Saves a checkpoint and stops, after an epoch or in the middle of one."""

    def __init__(self, path: Path, *, epoch: int | None = None, batches: int | None = None) -> None:
        self.path, self.epoch, self.batches = path, epoch, batches

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == self.epoch:
            self._stop(trainer)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.batches:
            self._stop(trainer)

    def _stop(self, trainer):
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True


def stopped_and_resumed(folder, make, stop, **settings):
    callbacks = [] if make is adamw else None
    window = settings.get("accumulate_grad_batches", 1)
    whole = Module(make, window)
    (folder / "whole").mkdir()
    trainer_for(folder / "whole", callbacks=callbacks, **settings).fit(whole, loader())
    first = Module(make, window)
    trainer = trainer_for(folder, callbacks=callbacks, **settings)
    trainer.callbacks.append(stop)
    trainer.fit(first, loader())
    second = Module(make, window)
    with torch.no_grad():
        for parameter in second.net.parameters():
            parameter.zero_()
    trainer_for(folder, callbacks=callbacks, **settings).fit(second, loader(), ckpt_path=stop.path)
    return whole, first, second


@pytest.mark.parametrize("make", [blocks, entries, adamw])
@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_at_an_epoch_end_and_resumed_it_ends_bitwise_equal(name, make, tmp_path):
    stop = StopAfter(tmp_path / "last.ckpt", epoch=0)
    whole, first, second = stopped_and_resumed(tmp_path, make, stop, **SETTINGS[name])
    assert same(whole.net, second.net)
    assert first.records + second.records == whole.records
    if make is not adamw:
        assert (tmp_path / "selection.jsonl").read_text() == (tmp_path / "whole/selection.jsonl").read_text()


@pytest.mark.parametrize("make", [blocks, entries, adamw])
def test_within_an_epoch_lightning_starts_the_data_again(make, tmp_path):
    """Lightning warns of it. What is selected is right all the same: the steps go on where they were."""
    stop = StopAfter(tmp_path / "last.ckpt", batches=2)
    whole, first, second = stopped_and_resumed(tmp_path, make, stop)
    assert not same(whole.net, second.net)
    if make is not adamw:
        assert [record.step for record in first.records + second.records] == list(range(EPOCHS * BATCHES))


@pytest.mark.parametrize("make", [blocks, entries, adamw])
def test_with_a_loader_that_resumes_it_is_bitwise_equal_within_an_epoch_too(make, tmp_path):
    class Resumable(DataLoader):
        position = 0

        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number >= self.position:
                    self.position = number + 1
                    yield batch
            self.position = 0

        def state_dict(self):
            return {"position": self.position}

        def load_state_dict(self, state):
            self.position = state["position"]

    def resumable():
        return Resumable(loader().dataset, batch_size=4)

    whole, second = Module(make), Module(make)
    callbacks = [] if make is adamw else None
    trainer_for(tmp_path, callbacks=callbacks).fit(whole, resumable())
    trainer = trainer_for(tmp_path, callbacks=callbacks)
    trainer.callbacks.append(StopAfter(tmp_path / "last.ckpt", batches=2))
    trainer.fit(Module(make), resumable())
    trainer_for(tmp_path, callbacks=callbacks).fit(second, resumable(), ckpt_path=tmp_path / "last.ckpt")
    assert same(whole.net, second.net)


def test_another_selection_is_refused_at_resume(tmp_path):
    trainer_for(tmp_path, callbacks=[SelectionCallback(), StopAfter(tmp_path / "a.ckpt", epoch=0)]).fit(
        Module(), loader()
    )
    other = Module(
        lambda model, window: gs.BlockOptimizer(model, policy=gs.AdaGradSelect(fraction=0.6, preset="paper"), lr=1e-2)
    )
    with pytest.raises(gs.UsageError, match=r"fraction"):
        trainer_for(tmp_path).fit(other, loader(), ckpt_path=tmp_path / "a.ckpt")


# Giving back -------------------------------------------------------------------------------------------------------


def left(model: nn.Module) -> list[str]:
    """Names of parameters and modules on which something of ours is left."""
    found = [name for name, each in model.named_parameters() if vars(each) or not each.requires_grad]
    found += [name for name, each in model.named_parameters() if getattr(each, "_post_accumulate_grad_hooks", None)]
    return found + [
        name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks
    ]


@pytest.mark.parametrize("make", [blocks, entries])
@pytest.mark.parametrize("ends", ["normally", "by an exception", "in validation", "before a step"])
def test_the_model_is_given_back(make, ends, tmp_path):
    class Ends(Module):
        def training_step(self, batch, batch_idx):
            if ends == "by an exception" and self.records:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self):
            if ends == "in validation":
                raise RuntimeError("stop")

        def on_fit_start(self):
            if ends == "before a step":
                raise RuntimeError("stop")

    module = Ends(make)
    trainer = trainer_for(tmp_path, gradient_clip_val=0.5)
    if ends == "normally":
        trainer.fit(module, loader())
    else:
        with pytest.raises(RuntimeError, match="stop"):
            trainer.fit(module, loader())
    assert left(module.net) == []
    assert trainer.gradient_clip_val == 0.5


def test_an_optimizer_of_the_users_own_goes_on_in_a_second_fit(tmp_path):
    class Keeps(Module):
        def configure_optimizers(self):
            self.optimizer = getattr(self, "optimizer", None) or blocks(self.net, explore_steps=BATCHES)
            return self.optimizer

    module = Keeps()
    callback = SelectionCallback(jsonl=tmp_path / "selection.jsonl")
    for _ in range(2):
        trainer_for(tmp_path, max_epochs=1, callbacks=[callback]).fit(module, loader())
        assert left(module.net) == []
    assert module.optimizer.num_steps == 2 * BATCHES
    lines = (tmp_path / "selection.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(2 * BATCHES))


# Logs --------------------------------------------------------------------------------------------------------------


def test_the_logger_gets_the_selection(tmp_path):
    logger = CSVLogger(tmp_path)
    module = Module()
    trainer_for(tmp_path, logger=logger, log_every_n_steps=4).fit(module, loader())
    rows = [line.split(",") for line in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()]
    steps, shares = rows[0].index("step"), rows[0].index("selection/explored")
    logged = {int(row[steps]): float(row[shares]) for row in rows[1:] if row[shares]}
    explored = [record.explored for record in module.records]
    assert logged == {at: sum(explored[at - 3 : at + 1]) / 4 for at in (3, 7, 11)}
    counts = {name.removeprefix("selection/updates/"): rows[-1][number] for number, name in enumerate(rows[0])}
    assert {name: int(float(counts[name])) for name in module.optimizer.blocks} == module.optimizer.update_counts


def test_the_logger_gets_the_entries(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer_for(tmp_path, logger=logger, log_every_n_steps=5).fit(Module(entries), loader())
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"selection/entries", "selection/new", "selection/overlap", "grad_norm"} <= set(header)


# What is refused ---------------------------------------------------------------------------------------------------


def test_another_optimizer_is_refused(tmp_path):
    with pytest.raises(gs.UsageError, match=r"configure_optimizers gave AdamW; return gs\.BlockOptimizer"):
        trainer_for(tmp_path).fit(Module(adamw), loader())


def test_clipping_by_value_is_refused_with_a_mask(tmp_path):
    module = Module(entries)
    with pytest.raises(gs.UsageError, match=r'write gradient_clip_algorithm="norm"'):
        trainer_for(tmp_path, gradient_clip_val=0.5, gradient_clip_algorithm="value").fit(module, loader())
    assert left(module.net) == []


def test_clipping_of_the_users_own_is_refused_with_a_mask(tmp_path):
    class Clips(Module):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")

    with pytest.raises(gs.UsageError, match=r"Clips\.configure_gradient_clipping would find no gradients"):
        trainer_for(tmp_path).fit(Clips(entries), loader())


def test_clipping_is_refused_with_updates_in_the_backward_pass(tmp_path):
    def make(model, window):
        return gs.BlockOptimizer(model, policy=gs.Uniform(count=1), lr=1e-2, update_in_backward=True)

    with pytest.raises(gs.UsageError, match=r"update_in_backward=True with Trainer\(gradient_clip_val=0.5\)"):
        trainer_for(tmp_path, gradient_clip_val=0.5).fit(Module(make), loader())
    trainer_for(tmp_path).fit(Module(make), loader())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_hide_gradients_are_refused(name, tmp_path):
    """Both ask for a GPU, so only the name of the class is the framework's own here."""
    trainer = trainer_for(tmp_path)
    trainer.strategy.__class__ = type(name, (type(trainer.strategy),), {})
    with pytest.raises(gs.UsageError, match=rf"strategy={name}: .* write Trainer\(strategy=\"ddp_find_unused"):
        trainer.fit(Module(), loader())


def test_the_names_of_these_strategies_are_lightnings():
    from lightning.pytorch import strategies

    assert strategies.FSDPStrategy.__name__ == "FSDPStrategy"
    assert strategies.DeepSpeedStrategy.__name__ == "DeepSpeedStrategy"


# Several processes -------------------------------------------------------------------------------------------------


class Ranks(Module):
    """Checks in `fit` itself that ranks agree, because each is a process of its own."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[self.global_rank :: 2], batch_idx)

    def on_fit_end(self):
        gathered = [None, None]
        values = (self.records, [value.tolist() for value in self.net.state_dict().values()])
        torch.distributed.all_gather_object(gathered, [repr(value) for value in values])
        assert gathered[0] == gathered[1]
        if self.global_rank == 0:
            torch.save(self.net.state_dict(), f"{self.trainer.default_root_dir}/weights.pt")
            Path(self.trainer.default_root_dir, "steps").write_text(str(len(self.records)))


@pytest.mark.parametrize("make", [blocks, entries])
def test_two_processes_train_as_one_does(make, tmp_path):
    settings = {
        "use_distributed_sampler": False,
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
    }
    strategy = DDPStrategy(find_unused_parameters=True, process_group_backend="gloo", start_method="fork")
    trainer_for(tmp_path, devices=2, strategy=strategy, **settings).fit(Ranks(make, 2), loader())
    alone = Module(make, 2)
    trainer_for(tmp_path, **settings).fit(alone, loader())
    together = torch.load(tmp_path / "weights.pt")
    assert int((tmp_path / "steps").read_text()) == len(alone.records) == 6
    assert all(torch.allclose(value, together[name], atol=1e-6) for name, value in alone.net.state_dict().items())


def test_ddp_without_unused_parameters_is_refused(tmp_path):
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork")
    with pytest.raises(Exception, match=r'write Trainer\(strategy="ddp_find_unused_parameters_true"\)'):
        trainer_for(tmp_path, devices=2, strategy=strategy).fit(Ranks(), loader())


def test_fsdp2_trains_as_one_process_does(tmp_path):
    """As the message about FSDP of version 1 says. Lightning starts the second process from the command line."""
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("sharded.py"), tmp_path], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    together = torch.load(tmp_path / "weights.pt")
    alone = Module()
    trainer_for(tmp_path, max_epochs=2).fit(alone, loader())
    assert all(torch.allclose(value, together[name], atol=1e-6) for name, value in alone.net.state_dict().items())


# Manual optimization, Fabric, docstrings ---------------------------------------------------------------------------


def test_manual_optimization_keeps_what_the_module_says(tmp_path):
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            self.optimizer = gs.BlockOptimizer(
                self.net, policy=gs.AdaGradSelect(fraction=0.3, explore_steps=2), lr=1e-2, accumulation_steps=2
            )
            self.optimizer.add_record_hook(self.records.append)
            return self.optimizer

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.net(batch) / 2)
            if batch_idx % 2 == 1:
                optimizer.step()
                optimizer.zero_grad()

    module = Manual()
    trainer_for(tmp_path).fit(module, loader(batches=4))
    assert [record.explored for record in module.records[2:]] == [False] * 4
    assert len((tmp_path / "selection.jsonl").read_text().splitlines()) == len(module.records) == 6


@pytest.mark.parametrize("make", [blocks, entries])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fabric_loop_accumulates_clips_and_resumes_bitwise(make, precision, tmp_path):
    def run(*, stop=None, resume=None):
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        window = 2
        settings = {"explore_steps": 3} if make is blocks else {"max_grad_norm": 0.1}
        raw = net()
        model, optimizer = fabric.setup(raw, make(raw, window, **settings))
        data = fabric.setup_dataloaders(loader())
        state = {"model": model, "optimizer": optimizer, "step": 0}
        if resume is not None:
            fabric.load(resume, state)
        selective = optimizer.optimizer
        is_last = False
        selective.count_passes_if(lambda: is_last)
        step = 0
        for _ in range(EPOCHS):
            for number, batch in enumerate(data, start=1):
                is_last = number % window == 0 or number == len(data)
                if step < state["step"]:
                    step += is_last
                    continue
                with fabric.no_backward_sync(model, enabled=not is_last):
                    fabric.backward(model(batch) / window)
                if not is_last:
                    continue
                if make is blocks:
                    fabric.clip_gradients(model, optimizer, max_norm=0.1)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step == stop:
                    fabric.save(tmp_path / "stopped.ckpt", {**state, "step": step})
                    return raw
        return raw

    whole = run()
    run(stop=4)
    assert same(whole, run(resume=tmp_path / "stopped.ckpt"))


def test_the_examples_of_the_docstrings_run():
    assert doctest.testmod(ours).failed == 0


def test_pytorch_lightning_takes_the_same_callback(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    class Other(pl.LightningModule):
        configure_optimizers, training_step = Module.configure_optimizers, Module.training_step

        def __init__(self):
            super().__init__()
            self.net, self.make, self.window, self.settings, self.records = net(), blocks, 2, {}, []

    module = Other()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        accumulate_grad_batches=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SelectionCallback()],
    )
    trainer.fit(module, loader())
    assert module.optimizer.policy.filled_explore_steps == 3
    assert left(module.net) == []
