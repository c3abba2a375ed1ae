"""Pretraining, from the first line of the config to the last checkpoint.

    deepspeed [launcher options] --module pretrain.train --config FILE [section.key=value …]

The same command again goes on where the run stopped. Exit codes: docs/faults.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.faults.signals import StopRequests, hold_back

if __name__ == "__main__":
    hold_back()  # before the imports below, which take seconds

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline import Batch, Stream, UserError
from pretrain import checkpoints, distributed
from pretrain.checkpoints import Saver, TrainState
from pretrain.config import Config, dump_config, load_config
from pretrain.diagnostics import diagnose, warn_if_nothing_is_predicted
from pretrain.distributed import Ranks, all_reduce_sum, any_rank
from pretrain.engine import build_engine, check_precision, gradient_norm, set_learning_rates
from pretrain.faults import EXIT_STOPPED, write_outcome
from pretrain.faults.hangs import HangMonitor, arm_flight_recorder
from pretrain.faults.numbers import Fault, UpdateGate, documents_in_words, judge_gradient, judge_loss, policy
from pretrain.metrics import Metrics
from pretrain.objectives import TokenBatch, row_seeds
from pretrain.run_data import RunData, first_validation_batches, host_memory, open_data, skipped_sequences
from pretrain.step_clock import StepClock
from pretrain.validation import reduce_losses, validate


@dataclass
class Run:
    """What the parts of one start share."""

    config: Config
    data: RunData
    stream: Stream
    ranks: Ranks
    device: torch.device
    stop: StopRequests
    monitor: HangMonitor
    engine: deepspeed.DeepSpeedEngine
    gate: UpdateGate
    clock: StepClock
    metrics: Metrics
    saver: Saver
    state: TrainState
    validation_loss: float | None = None
    """Of the last step, if it was validated."""

    def told_to_stop(self) -> bool:
        """Whether any rank was told to stop; the same answer on every rank."""
        return any_rank(self.stop.pending, self.device)


def train(config: Config) -> bool:
    """Run, or go on with, what the config describes. False if it was told to stop before its end.

    Raises UserError for what the user can mend, before any training where that is possible.
    """
    data, stream, vocab_size = open_data(config)
    config.batch.accumulation_steps(distributed.discover(os.environ).world)
    stop = StopRequests()
    arm_flight_recorder(config.run.folder / "logs")
    ranks, device = distributed.start(config.faults.collective_timeout_minutes)
    check_precision(config, device)
    if device.type == "cpu":
        stop.listen(signal.SIGUSR1)  # NCCL may have its own use for it
    stop.limit_time(config.run.wall_clock_minutes if ranks.is_first else None)  # one clock decides
    checkpoint = checkpoints.find_start(config, ranks)
    if checkpoint is not None:
        done = checkpoints.check_same_run(checkpoint, config, data, ranks)
        if done >= config.total_steps:
            if ranks.is_first:
                print(f"{config.run.folder}: finished at step {done}; nothing to do")
                write_outcome(config.run.folder, f"finished at step {done}")
            return True
    prepare_folder(config, ranks)

    with HangMonitor(config, ranks) as monitor:
        engine = build_engine(config, vocab_size, ranks.world, device)
        gate = UpdateGate(engine)
        monitor.enter(0, "load")
        state = resume(engine, checkpoint, config, ranks)
        clock = StepClock(config, vocab_size, ranks, device, monitor)
        with (
            Metrics(config, ranks.is_first, state.metrics_bytes, state.step) as metrics,
            Saver(engine, config, data, vocab_size, ranks, metrics.say) as saver,
        ):
            parts = (config, data, stream, ranks, device, stop, monitor, engine, gate, clock, metrics, saver, state)
            outcome = run_steps(Run(*parts))
    if ranks.is_first:
        write_outcome(config.run.folder, f"{outcome} at step {state.step}")
    return outcome != "stopped"


def prepare_folder(config: Config, ranks: Ranks) -> None:
    """Create the run's folder and write the resolved config into it."""
    folder = config.run.folder
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    distributed.barrier()


def resume(engine: deepspeed.DeepSpeedEngine, checkpoint: Path | None, config: Config, ranks: Ranks) -> TrainState:
    """Go on from a checkpoint, or start from the initial weights."""
    if checkpoint is None:
        return TrainState()
    state = checkpoints.load_checkpoint(engine, checkpoint, config, ranks)
    if ranks.is_first:
        print(f"going on from {checkpoint}, step {state.step}", flush=True)
    return state


def run_steps(run: Run) -> str:
    """All steps of this start. Returns `finished`, `stopped` (told to) or `paused` (by run.stop_after)."""
    config, state = run.config, run.state
    last_step = min(config.total_steps, state.step + (config.run.stop_after or config.total_steps))
    stopped = run.told_to_stop() or not write_line(run)
    batches = run.stream.batches(state.step, last_step, run.ranks.rank, run.ranks.world, host_memory(run.device))
    while state.step < last_step and not stopped:
        run.clock.begin_step(state.step + 1)
        batch = next(batches)
        run.clock.data_is_here()
        state.line, told = one_step(run, batch)
        stopped = told and state.step < config.total_steps  # else there is nothing left to stop
        stopped = not write_line(run) or stopped
        if due(config.checkpoint.every, state.step) or state.step == last_step or stopped:
            save(run)
            stopped = stopped or (state.step < last_step and run.told_to_stop())
    run.saver.settle()  # what is said now is true only once the checkpoint is whole
    if state.step == config.total_steps:
        return "finished"
    why = run.stop.reason if stopped else "stopped"
    run.metrics.say(f"{why} at step {state.step} of {config.total_steps}; the same command goes on from there")
    return "stopped" if stopped else "paused"


def one_step(run: Run, batch: Batch) -> tuple[dict[str, Any], bool]:
    """Train on a global batch, or step over it. Returns its line of metrics, and whether any rank was told to stop."""
    state, config = run.state, run.config
    values, told, fault = optimizer_step(run, batch)
    line: dict[str, Any] = {"step": state.step + 1, "tokens": state.tokens + config.tokens_per_step}
    line |= values | skipped_sequences(config, batch, run.device) | run.clock.step_is_done()
    if fault is not None:
        line |= recover(run, fault)
    else:
        state.skipped_in_a_row = 0
        if config.faults.spike != "ignore":
            state.recent_losses = [*state.recent_losses, values["loss"]][-config.faults.spike_window :]
    state.step += 1
    state.tokens += config.tokens_per_step
    return line | {"skipped_steps": state.skipped_steps}, told


def optimizer_step(run: Run, batch: Batch) -> tuple[dict[str, float], bool, Fault | None]:
    """One optimizer step on this rank's rows of the global batch.

    Returns the losses (means over the global batch), learning rate and gradient norm; whether any rank was told to
    stop; and why the step was not applied, if it was not. That is decided before, by numbers that all ranks share.
    """
    config, engine, clock = run.config, run.engine, run.clock
    rate = set_learning_rates(engine, config, run.state.step)
    first_sample = run.state.step * config.batch.global_sequences + run.ranks.rank * len(batch.tokens)
    seeds = row_seeds(config.run.seed, range(first_sample, first_sample + len(batch.tokens)))
    micro_batches = split_rows(batch, config.batch.micro_sequences, run.device, seeds)
    counts = all_reduce_sum(torch.stack([engine.module.objective.valid_counts(b) for b in micro_batches]).sum(0))
    warn_if_nothing_is_predicted(counts, run.state.step, run.ranks.is_first)

    sums: dict[str, Tensor] = {}
    for number, micro_batch in enumerate(micro_batches):
        clock.enter("forward")
        losses = engine(micro_batch, counts)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        clock.enter("backward")
        # Each micro-batch holds its share of the global mean; DeepSpeed averages over ranks, so undo that. The product
        # also makes a new tensor: given the forward's own output, DeepSpeed 0.19.8 divides by the accumulation steps
        # although scale_wrt_gas is off.
        engine.backward(losses["loss"] * run.ranks.world, scale_wrt_gas=False)
        if number < len(micro_batches) - 1:
            engine.step()  # counts the micro-batch, and applies nothing
    clock.enter("agreement")
    # The one place where a step waits for the accelerator: whether to apply the step, and whether to go on, is decided
    # on the host. Its loss and norm are logged from here, so that logging waits for nothing more.
    means, told = reduce_losses(sums, run.stop.pending)
    fault = judge_loss(means["loss"], run.state.recent_losses, config.faults)
    norm = gradient_norm(engine, config)
    if norm is not None:
        fault = fault or judge_gradient(norm, applied=True)
    clock.enter("update")
    with run.gate.closed_if(fault is not None):
        engine.step()
    if norm is None:
        norm = float(engine.get_global_grad_norm())
        fault = fault or judge_gradient(norm, engine.was_step_applied())  # from stage 1 on, DeepSpeed refuses it
    return means | {"learning_rate": rate, "grad_norm": norm}, told, fault


def recover(run: Run, fault: Fault) -> dict[str, Any]:
    """Go on after a step that was not applied, as the config says. Returns what the step's line tells of it.

    The number of the step, and with it the data and the learning rate, moves on in any case: what has been decided
    once is decided again, to the last digit, when the steps since a checkpoint are done again. So rolling back goes
    to the last checkpoint of the schedule, not to one that a signal made.
    """
    step, state, every = run.state.step, run.state, run.config.checkpoint.every
    state.skipped_in_a_row += 1
    action = policy(fault, step, state.skipped_in_a_row, run.config, run.stream)
    told: dict[str, Any] = {"fault": fault.kind, "samples": run.stream.sample_numbers(step)["sample"].tolist()}
    told["documents"] = run.stream.documents(step).tolist()
    state.skipped_steps += 1
    what = "skipped"
    if action == "rollback":
        run.monitor.enter(step + 1, "load")
        run.saver.settle()
        checkpoint = checkpoints.find_whole(run.config.run.folder / "checkpoints", run.ranks, every or 1)
        if checkpoint is None:
            raise UserError(f"step {step + 1}: {fault.words}, and there is no checkpoint yet to roll back to")
        before = checkpoints.load_checkpoint(run.engine, checkpoint, run.config, run.ranks)
        state.skipped_steps = before.skipped_steps + step + 1 - before.step
        told["rolled_back_to"] = before.step
        what = f"back to the weights of step {before.step}"
    if run.ranks.is_first:
        words = f"{fault.words}; {what}. {documents_in_words(run.stream, step)}"
        print(f"warning: step {step + 1}: {words}", file=sys.stderr, flush=True)
    return told


def write_line(run: Run) -> bool:
    """Write the last step's line of metrics, if it is not written yet, with its validation where that is due.

    False if the run was told to stop during validation: the next start then does it again, and writes the line.
    """
    config, state = run.config, run.state
    if state.line is None:
        return True
    is_last = state.step == config.total_steps
    if is_last or due(config.validation.every, state.step):
        run.monitor.enter(state.step, "validation")
        interrupted = run.told_to_stop if not is_last else lambda: False
        losses = validate(run.engine, run.data, run.ranks, run.device, interrupted)
        if losses is None:
            return False
        state.line |= losses
    if due(config.metrics.diagnostics_every, state.step):
        run.monitor.enter(state.step, "diagnostics")
        state.line |= diagnose(run.engine, first_validation_batches(run.data), run.device)
    run.monitor.enter(state.step, "log")
    run.validation_loss = state.line.get("val_loss_next_token")
    run.metrics.record(state.line | run.saver.report())
    state.line = None
    return True


def save(run: Run) -> None:
    """Save the state as it is; most of the work goes on beside the next steps."""
    run.monitor.enter(run.state.step, "save")
    run.state.metrics_bytes = run.metrics.durable_bytes()
    run.saver.save(run.state, run.validation_loss)


def split_rows(batch: Batch, rows: int, device: torch.device, seeds: tuple[int, ...]) -> list[TokenBatch]:
    """A rank's rows as micro-batches on its device."""
    starts = range(0, len(batch.tokens), rows)
    return [TokenBatch.from_numpy(batch.rows(i, i + rows), device, seeds[i : i + rows]) for i in starts]


def due(every: int | None, step: int) -> bool:
    """Whether something that happens every so many steps happens at this one."""
    return every is not None and step % every == 0


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="pretrain.train", description="Pretrain what a config file describes.")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="the run's YAML file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys to set differently")
    arguments = parser.parse_intermixed_args(argv)
    try:
        finished = train(load_config(arguments.config, arguments.overrides))
        distributed.barrier()  # no rank takes its connections down while another still uses them
    except UserError as error:
        if dist.is_initialized():
            says_it = distributed.first_to_say(str(error))
        else:
            says_it = distributed.discover(os.environ).local_rank == 0  # every rank of a machine meets the same
        if says_it:
            raise
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not finished:
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    distributed.run_and_leave(main)
