"""`make quickstart` itself, shortened, through the real launcher with two ranks; and its second start."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SHORT = (
    "model.layers=1 model.width=128 model.heads=2 objective.dynamics_width=128 schedule.steps=12 "
    "schedule.warmup_steps=2 schedule.decay_steps=4 checkpoint.every=6 validation.every=6 validation.sequences=8"
)


def quickstart(out: Path) -> str:
    """Run it into `out`; its output."""
    command = ["make", "quickstart", f"OUT={out}", f"OVERRIDES={SHORT}"]
    # Without the outer make's variables, so that this is what a user types.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("quickstart")
    return out, quickstart(out)


def test_it_trains_under_the_launcher_on_two_ranks(done: tuple[Path, str]) -> None:
    out, output = done
    run = out / "runs" / "quickstart"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 12 and records[-1]["loss_next_token"] < records[0]["loss_next_token"]
    state = json.loads((run / "checkpoints" / "step_00000012" / "state.json").read_text())
    assert state["ranks"] == 2 and state["zero_stage"] == 3
    assert "Traceback" not in output


def test_it_exports_a_plain_llama_that_loads_without_custom_code(done: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = done
    folder = out / "exports" / "quickstart"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    text = "def f(x):\n    return x + 1\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert (folder / "nextlat" / "model.safetensors").exists()


def test_it_evaluates_decodes_and_reports(done: tuple[Path, str]) -> None:
    out, output = done
    evaluation = out / "runs" / "quickstart" / "evaluation"
    perplexity = json.loads((evaluation / "perplexity.json").read_text())
    assert 0 < perplexity["xz_bits_per_byte"] < 8 and 0 < perplexity["bits_per_byte"] < 8
    speculative = json.loads((evaluation / "speculative.json").read_text())
    assert speculative["texts_equal"] and speculative["accepted"] <= speculative["drafted"]
    page = (out / "runs" / "quickstart" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "Next latent" in page and "KL of rollout" in page and "xz -9" in page
    assert "accepted" in output


def test_a_second_start_repeats_nothing_that_is_done(done: tuple[Path, str]) -> None:
    out, _ = done
    checkpoint = out / "runs" / "quickstart" / "checkpoints" / "step_00000012" / "manifest.json"
    before = checkpoint.stat().st_mtime_ns
    output = quickstart(out)
    assert "nothing to do" in output
    assert checkpoint.stat().st_mtime_ns == before
