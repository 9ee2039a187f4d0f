"""What the trackers of a Trainer are told of the selection: its settings, and a picture."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from test_integration_transformers import build
from tiny_models import tiny_llama
from transformers.integrations.integration_utils import TensorBoardCallback

import gradselect as gs
from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory
from gradselect.integrations.transformers.trackers import PICTURE, TensorBoard
from gradselect.integrations.transformers.tracking import SelectionTracking


@pytest.fixture
def curves(tmp_path, monkeypatch):
    """Folder of the event files."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    return tmp_path / "curves"


def train(folder, policy=None, **settings):
    policy = gs.Cyclic(every=2) if policy is None else policy
    trainer = build(folder, policy, **{"report_to": "tensorboard", "max_steps": 4, **settings})
    trainer.train()
    return trainer


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def hyper_parameters(folder):
    """The settings in TensorBoard's table."""
    content = events(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in start.items()}


def text_of(folder):
    (event,) = events(folder).Tensors("selection/settings/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_two_fractions_can_be_told_apart_in_tensorboard(tmp_path, monkeypatch):
    found = []
    for fraction in (0.3, 0.6):
        folder = tmp_path / str(fraction)
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
        train(tmp_path, gs.Uniform(fraction=fraction, seed=7), options={"always": ["norm"], "residency": gs.Offload()})
        found.append(hyper_parameters(folder))
        assert f'"selection/policy/fraction": {fraction}' in text_of(folder)
        assert len(list(folder.iterdir())) == 1, "a second run for the settings"
    assert [values["selection/policy/fraction"] for values in found] == [0.3, 0.6]
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"selection/policy/fraction"}
    expected = {
        "selection/gradselect": gs.__version__,
        "selection/policy": "Uniform",
        "selection/policy/seed": 7,
        "selection/rule": "AdamWRule",
        "selection/residency": "Offload",
        "selection/always": "model.norm.weight",
        "selection/lr": 1e-2,
    }
    assert {name: found[0][name] for name in expected} == expected
    assert found[0]["selection/blocks"].startswith("embedding, layer.0, ")


def test_a_mask_says_its_budget(tmp_path, curves):
    trainer = build(tmp_path, gs.All(), report_to="tensorboard", max_steps=2)
    factory = {"mask": gs.ID3(budget=40, steps=2), "args": trainer.args}
    trainer.optimizer_cls_and_kwargs = (SelectiveOptimizerFactory, factory)
    trainer.train()
    found = hyper_parameters(curves)
    assert (found["selection/mask"], found["selection/mask/budget"]) == ("ID3", 40)
    assert [image.step for image in events(curves).Images(PICTURE)] == [2]


def test_the_picture_of_the_whole_run_is_logged_at_the_end(tmp_path, curves):
    train(tmp_path)
    (image,) = events(curves).Images(PICTURE)
    assert image.step == 4
    with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
        assert picture.size[0] > 900
        assert len(set(picture.convert("L").tobytes())) > 10  # it is not blank


def test_a_picture_at_a_checkpoint_waits_until_it_costs_next_to_nothing(tmp_path, curves, monkeypatch):
    times = iter([0, *(0 for _ in range(2)), *range(1, 1000)])
    monkeypatch.setattr("gradselect.integrations.transformers.tracking.time.monotonic", lambda: float(next(times)))
    # The first picture, at step 1, takes a second: the next ones wait a hundred.
    monkeypatch.setattr("gradselect.integrations.transformers.tracking.SHARE", 0.5)
    train(tmp_path, max_steps=6, save_strategy="steps", save_steps=1)
    steps = [image.step for image in events(curves).Images(PICTURE)]
    assert steps[0] == 1
    assert steps[-1] == 6
    assert 2 < len(steps) < 6


def test_after_a_resume_the_picture_shows_the_steps_before_it(tmp_path, curves, monkeypatch):
    drawn = []
    monkeypatch.setattr(SelectionTracking, "_draw", lambda self: drawn.append(list(self._history.steps)))
    jsonl = tmp_path / "selection.jsonl"
    policy = gs.Cyclic(every=1)
    for resume in (None, str(tmp_path / "checkpoint-2")):
        callbacks = [SelectionCallback(jsonl=jsonl)]
        settings = {"save_strategy": "steps", "save_steps": 2, "report_to": "tensorboard"}
        trainer = build(tmp_path, policy, callbacks=callbacks, max_steps=4, **settings)
        trainer.train(resume_from_checkpoint=resume)
    assert drawn[-1] == [0, 1, 2, 3]
    jsonl.write_text("no record\n")
    tracking = SelectionTracking(jsonl=jsonl)
    assert tracking._earlier(trainer.optimizer.optimizer).steps == []


def test_training_goes_on_without_a_tracker_that_fails(tmp_path, curves, monkeypatch, caplog):
    def fail(self, settings):
        raise OSError("no space left")

    monkeypatch.setattr(TensorBoard, "write_settings", fail)
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path)
    assert trainer.state.global_step == 4
    assert caplog.text.count("tensorboard did not take the settings of the selection") == 1
    assert "no space left" in caplog.text


def test_without_matplotlib_it_says_once_what_to_install(tmp_path, curves, monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "gradselect.integrations.pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("gradselect.integrations.pictures.")]:
        monkeypatch.delitem(sys.modules, name)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, save_strategy="steps", save_steps=1)
    assert caplog.text.count("pip install matplotlib") == 1
    assert "selection/settings/text_summary" in events(curves).Tags()["tensors"]


def test_without_trackers_nothing_is_collected(tmp_path):
    trainer = train(tmp_path, report_to="none")
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, SelectionCallback)]
    assert callback._tracking._history is None


def test_a_tracker_that_the_user_adds_as_a_callback_counts(tmp_path, curves):
    trainer = build(tmp_path, gs.Cyclic(every=2), callbacks=[TensorBoardCallback(), SelectionCallback()], max_steps=2)
    trainer.train()
    assert json.loads(text_of(curves).strip("`\n"))["selection/policy"] == "Cyclic"


def test_lists_of_names_are_one_value(tmp_path, curves):
    train(tmp_path, gs.Fixed(("layer.1",)), model=tiny_llama(layers=3))
    assert hyper_parameters(curves)["selection/policy/blocks"] == "layer.1"
