"""A rank that is stopped is set going; a rank that hangs is named, and the run ends by itself with its code."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from launch import environment, launcher_command, read_metrics

from pretrain.faults import EXIT_HUNG


def test_a_stopped_rank_gets_on_and_a_hung_one_ends_the_run_by_name(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config("hung", {"model.layers": 1, "faults.hang_minutes": 0.12, "validation.sequences": 4})
    command = launcher_command(2, str(Path(__file__).with_name("hung_run.py")), "--config", str(config))
    # Without the monitor the collective would wait for 30 minutes.
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    run, logs = tmp_path / "runs" / "hung", tmp_path / "runs" / "hung" / "logs"
    assert result.returncode == EXIT_HUNG, result.stderr
    assert len(read_metrics(run)) == 4, "the third step was done after all, the fifth never"

    warnings = [line for line in result.stderr.splitlines() if "it gets on again" in line]
    assert any("in forward of step 3" in line for line in warnings), result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert f"The others wait for rank 1 ({socket.gethostname()}, pid" in line
    assert "in forward of step 5 for" in line and "in planted_forward" in line and "rank 0 (" not in line
    assert (run / "outcome").read_text().startswith("hung at step 5: rank 1")

    assert "rank 0 (" in (logs / "hangs.txt").read_text(), "the whole list is in the log"
    stacks = [(logs / f"stacks_rank_{rank}.txt").read_text() for rank in range(2)]
    assert stacks[0].count("in optimizer_step") >= 2, "at both times"
    assert stacks[1].count("in planted_forward") >= 2, "stopped, it was made to write them too"
    assert json.loads((logs / "heartbeat_rank_1.json").read_text())["phase"] == "forward"
    assert (logs / "flight_recorder_rank_0").stat().st_size > 1000
