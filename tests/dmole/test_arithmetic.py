# SPDX-License-Identifier: Apache-2.0
"""What decides last bits: one thread on demand, and a name for the arithmetic of this process."""

import threading

import pytest
import torch

from dmole.arithmetic import arithmetic, one_thread


def test_one_thread_is_put_back_after_an_error() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 3
        inherited: list[int] = []
        thread = threading.Thread(target=lambda: inherited.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert inherited == [3]
    finally:
        torch.set_num_threads(before)


def test_the_arithmetic_is_named_by_settings_and_not_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    name = arithmetic()
    with one_thread():
        assert arithmetic() == name
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    assert arithmetic() == name
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert arithmetic() != name
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert arithmetic() == name
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert arithmetic() != name
    finally:
        torch.set_float32_matmul_precision(precision)
    assert arithmetic() == name
