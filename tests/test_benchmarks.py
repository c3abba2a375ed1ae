"""The benchmarks run, at a small size, and what they compare is the same thing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import export, loss, step
from benchmarks.gpu import decoding as gpu_decoding
from benchmarks.gpu import loss as gpu_loss


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


def test_the_gpu_loss_benchmark_runs_at_its_small_size(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_loss.main(["--small", "--horizons", "1", "3", "--repeats", "1"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "D=64 V=500 tokens=256" in header
    assert [row.split()[0] for row in rows] == ["1", "3"]


def test_the_gpu_decoding_benchmark_runs_at_its_small_size(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_decoding.main(["--small", "--drafts", "1", "3", "--batches", "1", "2", "--tokens", "12", "--repeats", "1"])
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["trunk", "batch", "plain", "draft", "captured", "ratio"] + [
        column for k in ("k=1", "k=3") for column in (k, "ratio", "speed-up")
    ]
    assert [row.split()[:2] for row in rows] == [["small", "1"], ["small", "2"]]
    for row in rows:
        plain, _, _, _, one, _, faster, *_ = row.split()[2:]
        if not torch.cuda.is_available():
            assert float(faster) == pytest.approx(1.8 * float(plain) / float(one), rel=0.05)


def test_the_gpu_decoding_benchmark_refuses_a_captured_step_that_is_another() -> None:
    states_BD, tokens_B = torch.zeros(1, 2), torch.zeros(1)
    gpu_decoding.check_equal([lambda *inputs: inputs] * 2, (states_BD, tokens_B))
    with pytest.raises(SystemExit, match="captured"):
        gpu_decoding.check_equal([lambda *inputs: inputs, lambda h, t: (h + 1e-7, t)], (states_BD, tokens_B))


def test_the_gpu_loss_benchmarks_plain_formulation_is_the_same_in_parts() -> None:
    case = gpu_loss.Case(16, 100, 60, 2, torch.device("cpu"))
    whole, in_parts, ours = (
        case.run(way, parts)[0] for way, parts in ((gpu_loss.plain, 1), (gpu_loss.plain, 4), (gpu_loss.fused, 1))
    )
    assert in_parts == pytest.approx(whole, rel=1e-3)
    assert ours == pytest.approx(whole, rel=1e-2)


def test_the_step_benchmark_writes_a_page_with_every_objective_and_ratios_to_gpt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step.main(["--size", "tiny", "--repeats", "1", "--out", str(tmp_path / "step.md")])
    text = (tmp_path / "step.md").read_text()
    assert text in capsys.readouterr().out
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line)}
    numbers = {
        label: [float(cell) for cell in cells] for label, cells in rows.items() if re.match("[a-z]+( [0-9])?$", label)
    }
    assert list(numbers) == ["gpt", "bst"] + [f"{name} {d}" for name in ("mtp", "jtp", "nextlat") for d in (1, 2, 8)]
    assert numbers["gpt"][1:] == [1.0] * 4
    assert [numbers[f"nextlat {d}"][4] for d in (1, 2, 8)] == [1.0, 1.11, 1.79]
    flops = {label: cells[2] for label, cells in numbers.items()}
    for name in ("mtp", "jtp", "nextlat"):
        assert 1 < flops[f"{name} 1"] < flops[f"{name} 2"] < flops[f"{name} 8"]


def test_the_export_benchmark_measures_a_fresh_process_against_the_bound_and_cleans_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = tmp_path / "scratch"
    options = ["--size", "small", "--dtypes", "bfloat16", "--scratch", str(scratch)]
    export.main([*options, "--out", str(tmp_path / "export.md")])
    text = (tmp_path / "export.md").read_text()
    assert text in capsys.readouterr().out and list(scratch.iterdir()) == []
    head, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line)
    cells = dict(zip(head, row, strict=True))
    peak, bound, before = (float(cells[name].replace(",", "")) for name in list(head)[1:4])
    assert bound == pytest.approx(export.bound(4 * 1_001 * 36) / 1e6, abs=1)
    assert 100 < before <= peak < bound
    assert cells["precision"] == "bfloat16" and cells["greedy tokens equal"] == "64"
