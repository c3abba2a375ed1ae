"""The benchmarks run, at a small size, and what they compare is the same thing."""

from __future__ import annotations

import pytest

from benchmarks import loss


def test_the_two_formulations_of_the_loss_benchmark_agree() -> None:
    plain, fused = (
        loss.measure(name, vocabulary=300, width=16, positions=64, horizon=2) for name in ("plain", "fused")
    )
    assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_the_loss_benchmark_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--vocabulary", "300", "--width", "16", "--positions", "64", "--horizons", "1", "--repeats", "1"]
    loss.main(sizes)
    output = capsys.readouterr().out
    assert "time" in output and "memory" in output and "1/" in output
