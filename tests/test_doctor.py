"""`gradselect doctor` finds what is missing and what is broken, and calls nothing else so."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata

import pytest
import torch

import gradselect
from gradselect import BlockOptimizer
from gradselect.app.cli import main
from gradselect.app.doctor import Finding, Status, devices, examine, packages, training_steps
from gradselect.core import AdamWRule


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as raised:
        main(["doctor", *words])
    assert isinstance(raised.value.code, int)
    return raised.value.code, capsys.readouterr().out


def found(name: str, findings: Sequence[Finding] | None = None) -> Finding:
    return next(finding for finding in findings or list(examine()) if finding.name == name)


def test_a_working_installation_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = doctor(capsys)
    assert code == 0
    assert said.splitlines()[-1].startswith("all that is installed works")
    assert "broken" not in said
    for name in ("torch ", "device cpu", "cpu, fused AdamW", "cpu, training blocks", "cpu, training entries"):
        assert f"ok       {name}" in said


def test_the_findings_are_json_for_a_report_of_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = doctor(capsys, "--json")
    findings = {finding["name"]: finding for finding in json.loads(said)}
    assert code == 0
    assert findings["gradselect"] == {
        "name": "gradselect",
        "status": "ok",
        "text": gradselect.__version__,
        "advice": "",
    }
    assert findings["torch"]["text"] == metadata.version("torch")


def test_a_missing_or_old_package_of_a_feature_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest works, so the exit code is 0."""
    requirements = ["torch>=2.0", "no-such-package>=3; extra == 'tune'", "rich>=99.0; extra == 'tune'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: requirements)
    code, said = doctor(capsys)
    assert code == 0
    assert "missing  gradselect tune" in said
    assert f"no no-such-package, rich {metadata.version('rich')} is older than 99.0" in said
    assert "pip install 'no-such-package>=3' 'rich>=99.0'" in said
    assert "these lack something: gradselect tune" in said


@pytest.mark.parametrize(("requirement", "text"), [("torch>=99.1", "is older than 99.1"), ("no-such>=1", "no no-such")])
def test_a_package_that_the_library_needs_is_no_feature(
    requirement: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda _: [requirement])
    monkeypatch.setattr(devices, "SETUPS", {})
    code, said = doctor(capsys)
    assert code == 1
    assert text in said
    assert said.splitlines()[-1] == f"broken: {requirement.partition('>=')[0]}"


def test_a_torch_that_does_not_load_is_said_and_ends_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def torn(name: str, *rest: object) -> object:
        if name == "torch":
            raise OSError("libcudart.so.13:\n cannot open shared object file")
        return whole(name, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(builtins, "__import__", torn)
    *_, last = examine()
    assert last.name == "torch"
    assert last.status is Status.BROKEN
    assert last.text == "OSError: libcudart.so.13: cannot open shared object file"


def test_a_kernel_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    update = AdamWRule.update

    def wrong(self: AdamWRule, weights: list[torch.Tensor], *rest: object) -> None:
        update(self, weights, *rest)  # pyright: ignore[reportArgumentType]
        if self.fused:
            weights[0].add_(1e-3)

    monkeypatch.setattr(AdamWRule, "update", wrong)
    broken = found("cpu, fused AdamW", list(devices.examine_devices()))
    assert broken.status is Status.BROKEN
    assert "differs from the loop by 1.0e-03" in broken.text


def test_a_step_that_moves_what_is_not_selected_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = BlockOptimizer.step

    def leaking(self: BlockOptimizer) -> None:
        step(self)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1e-3)

    monkeypatch.setattr(BlockOptimizer, "step", leaking)
    code, said = doctor(capsys)
    assert code == 1
    assert "changed, and (" in said
    assert said.splitlines()[-1] == "broken: cpu, training blocks; cpu, training blocks, bfloat16, offload"


def test_a_loss_that_does_not_fall_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_steps, "NUM_STEPS", 1)
    with pytest.raises(RuntimeError, match="the loss does not fall"):
        training_steps.train_a_few_steps(torch.device("cpu"), training_steps.SETUPS["blocks"])


def test_a_driver_without_a_device_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "SETUPS", {})
    noted = found("NVIDIA driver without a device", list(devices.examine_devices()))
    assert noted.status is Status.NOTE
    assert noted.advice


def test_a_machine_without_a_compiler_lacks_torch_compile_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    missing = found("torch.compile on a CPU", list(packages.features()))
    assert missing.status is Status.MISSING


def test_help_and_words_that_are_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(capsys, "--help") == (0, doctor(capsys, "-h")[1])
    with pytest.raises(SystemExit) as raised:
        main(["doctor", "--jsn"])
    assert raised.value.code == 2
    assert "takes no '--jsn'" in capsys.readouterr().err


def test_a_bare_installation_can_ask_what_it_lacks() -> None:
    """Without the packages of the command line, which a user of the library alone does not have."""
    code = """
import sys
sys.modules.update(dict.fromkeys(("typer", "rich", "psutil", "transformers", "numpy"), None))
from gradselect.app.cli import main
import gradselect.app.doctor.devices
for words in (["--version"], ["doctor", "--help"]):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0, words
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"gradselect {gradselect.__version__}\nUsage: gradselect doctor" in done.stdout


def test_a_device_that_cannot_be_described_is_a_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(device: torch.device) -> str:
        raise RuntimeError("devices are busy or unavailable")

    monkeypatch.setattr(devices, "_describe", busy)
    code, said = doctor(capsys)
    assert code == 1
    assert "broken   device cpu" in said
    assert "devices are busy" in said
