"""Main memory that a training on the CPU keeps between its steps."""

import os
import platform
import resource
from collections.abc import Callable

import pytest
import torch

from gradselect.app.runtime import keep_freed_memory

BLOCK = 128 * 2**20
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large blocks back at once")


@pytest.fixture(autouse=True)
def glibc_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)


def in_a_child(measure: Callable[[], int]) -> int:
    """Return what a forked process measures: settings of the C library stay with a process."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.write(writer, str(measure()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        return int(answer.read())


def faults_of_a_second_block() -> int:
    """Return the page faults of memory that was freed just before."""
    bytearray(BLOCK)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes_again = bytearray(BLOCK)
    assert len(bytes_again) == BLOCK
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@needs_glibc
def test_freed_memory_is_used_again_without_page_faults() -> None:
    def kept() -> int:
        assert keep_freed_memory("cpu")
        return faults_of_a_second_block()

    assert in_a_child(faults_of_a_second_block) >= 64  # 2 MB pages at the largest
    assert in_a_child(kept) < 8


@pytest.mark.parametrize("variable", ["MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"])
def test_settings_of_the_user_stay(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert not keep_freed_memory("cpu")


def test_an_accelerator_keeps_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not keep_freed_memory("auto")


@needs_glibc
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory("cpu")
