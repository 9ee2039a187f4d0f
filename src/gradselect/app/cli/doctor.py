"""The command `gradselect doctor`. It needs no typer, so that it tells what a bare installation lacks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from gradselect.app.doctor import Finding, Status, examine
from gradselect.usage import UsageError

HELP = """Usage: gradselect doctor [--json]

  Look at this installation: versions, what each feature lacks, devices, fused kernels, page-locked memory, and a few
  training steps on each device.

Options:
  --json       Print JSON instead of text, for a report of a fault.

Exit codes: 0 if all that is installed works, also if packages of a feature are missing; 1 if something is broken; 2 for
a usage error.
"""
BROKEN_EXIT_CODE = 1
_WIDTH = 44


def doctor(words: Sequence[str]) -> int:
    """Show the findings about this installation. Return the exit code.

    Raises:
        UsageError: a word is no option.
    """
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(HELP)
        return 0
    unknown = [word for word in words if word != "--json"]
    if unknown:
        raise UsageError(f"gradselect doctor takes no {unknown[0]!r}; its one option is --json")
    findings: list[Finding] = []
    for finding in examine():
        findings.append(finding)
        if not words:
            sys.stdout.write(_line(finding))
            sys.stdout.flush()  # the next check may take seconds, or end the process
    if words:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        sys.stdout.write(_verdict(findings))
    return BROKEN_EXIT_CODE if _named(findings, Status.BROKEN) else 0


def _line(finding: Finding) -> str:
    advice = f"\n{'':8} {finding.advice}" if finding.advice else ""
    return f"{finding.status:<8} {finding.name:<{_WIDTH}} {finding.text}{advice}\n"


def _verdict(findings: Sequence[Finding]) -> str:
    broken, missing = _named(findings, Status.BROKEN), _named(findings, Status.MISSING)
    if broken:
        return f"broken: {'; '.join(broken)}\n"
    lacking = f"; these lack something: {'; '.join(missing)}" if missing else ""
    return f"all that is installed works{lacking}\n"


def _named(findings: Sequence[Finding], status: Status) -> list[str]:
    return [finding.name for finding in findings if finding.status is status]
