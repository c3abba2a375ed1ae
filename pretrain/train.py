"""Pretraining, from the first line of the config to the last checkpoint.

    deepspeed [launcher options] --module pretrain.train --config FILE [section.key=value …]

The same command again goes on where the run stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline import Batch, Stream, UserError, run_command
from pretrain import checkpoints, distributed, faults
from pretrain.checkpoints import TrainState
from pretrain.config import Config, dump_config, load_config
from pretrain.diagnostics import diagnose, warn_if_nothing_is_predicted
from pretrain.distributed import Ranks, all_reduce_sum
from pretrain.engine import build_engine, gradient_norm, set_learning_rates
from pretrain.metrics import Metrics
from pretrain.objectives import TokenBatch, row_seeds
from pretrain.run_data import first_validation_batches, host_memory, open_data, skipped_sequences
from pretrain.step_clock import StepClock
from pretrain.validation import reduce_losses, validate


def train(config: Config) -> bool:
    """Run, or go on with, what the config describes. False if a signal stopped it before its end.

    Raises UserError for what the user can mend, before any training where that is possible.
    """
    dataset, stream, vocab_size = open_data(config)
    config.batch.accumulation_steps(distributed.discover(os.environ).world)
    stop = faults.StopSignals()
    ranks, device = distributed.start(config.faults.collective_timeout_minutes)
    checkpoint = checkpoints.find_start(config, ranks)
    if checkpoint is not None:
        done = checkpoints.check_same_run(checkpoint, config, dataset, ranks)
        if done >= config.total_steps:
            if ranks.is_first:
                print(f"{config.run.folder}: finished at step {done}; nothing to do")
                write_outcome(config, "finished", done)
            return True
    prepare_folder(config, ranks)

    engine = build_engine(config, vocab_size, ranks.world, device)
    state = resume(engine, checkpoint, config, ranks)
    first_step = state.step
    last_step = min(config.total_steps, first_step + (config.run.stop_after or config.total_steps))

    with (
        Metrics(config, ranks.is_first, state.metrics_bytes, first_step) as metrics,
        checkpoints.Saver(engine, config, dataset, vocab_size, ranks, metrics.say) as saver,
    ):
        clock = StepClock(config, vocab_size, ranks, device)
        for batch in stream.batches(first_step, last_step, ranks.rank, ranks.world, host_memory(device)):
            clock.data_is_here()
            losses, stopped = optimizer_step(engine, config, batch, state.step, stream, stop, ranks, device)
            state.step += 1
            state.tokens += config.tokens_per_step
            losses |= skipped_sequences(config, batch, device)
            record: dict[str, Any] = {"step": state.step, "tokens": state.tokens, **losses, **clock.step_is_done()}
            stopped = stopped and state.step < config.total_steps  # told to stop with nothing left to do
            is_last = stopped or state.step == last_step
            if due(config.validation.every, state.step) or state.step == config.total_steps:
                record |= validate(engine, config, dataset, ranks, device)
            if due(config.metrics.diagnostics_every, state.step):
                record |= diagnose(engine, first_validation_batches(dataset), device)
            metrics.record(record | saver.report())
            if due(config.checkpoint.every, state.step) or is_last:
                state.metrics_bytes = metrics.durable_bytes()
                saver.save(state, record.get("val_loss_next_token"))
            clock.restart()
            if is_last:
                break
        saver.settle()  # what is said now is true only once the checkpoint is whole
        if state.step < config.total_steps:
            why = f"received {stop.received.name}" if stop.received else "stopped"
            metrics.say(f"{why} at step {state.step} of {config.total_steps}; the same command goes on from there")
    if ranks.is_first:
        outcome = "finished" if state.step == config.total_steps else "stopped" if stopped else "paused"
        write_outcome(config, outcome, state.step)
    return not stopped


def prepare_folder(config: Config, ranks: Ranks) -> None:
    """Create the run's folder and write the resolved config into it."""
    folder = config.run.folder
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    distributed.barrier()


def write_outcome(config: Config, outcome: str, step: int) -> None:
    """Leave word of how this start ended: a scheduler sees the exit code of whichever rank died last."""
    (config.run.folder / "outcome").write_text(f"{outcome} at step {step}\n", encoding="utf-8")


def resume(engine: deepspeed.DeepSpeedEngine, checkpoint: Path | None, config: Config, ranks: Ranks) -> TrainState:
    """Go on from a checkpoint, or start from the initial weights."""
    if checkpoint is None:
        return TrainState()
    state = checkpoints.load_checkpoint(engine, checkpoint, config, ranks)
    if ranks.is_first:
        print(f"going on from {checkpoint}, step {state.step}", flush=True)
    return state


def optimizer_step(
    engine: deepspeed.DeepSpeedEngine,
    config: Config,
    batch: Batch,
    step: int,
    stream: Stream,
    stop: faults.StopSignals,
    ranks: Ranks,
    device: torch.device,
) -> tuple[dict[str, float], bool]:
    """One optimizer step on this rank's rows of the global batch.

    Returns the losses (means over the global batch), learning rate and gradient norm; and whether any rank was
    told to stop. Raises UserError, before anything is applied, if the loss is not finite.
    """
    rate = set_learning_rates(engine, config, step)
    first_sample = step * config.batch.global_sequences + ranks.rank * len(batch.tokens)
    seeds = row_seeds(config.run.seed, range(first_sample, first_sample + len(batch.tokens)))
    micro_batches = split_rows(batch, config.batch.micro_sequences, device, seeds)
    counts = all_reduce_sum(torch.stack([engine.module.objective.valid_counts(b) for b in micro_batches]).sum(0))
    warn_if_nothing_is_predicted(counts, step, ranks.is_first)

    sums: dict[str, Tensor] = {}
    for number, micro_batch in enumerate(micro_batches):
        losses = engine(micro_batch, counts)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        # Each micro-batch holds its share of the global mean; DeepSpeed averages over ranks, so undo that. The product
        # also makes a new tensor: given the forward's own output, DeepSpeed 0.19.8 divides by the accumulation steps
        # although scale_wrt_gas is off.
        engine.backward(losses["loss"] * ranks.world, scale_wrt_gas=False)
        if number == len(micro_batches) - 1:
            means, stopped = reduce_losses(sums, stop.received is not None)
            faults.check_finite(means["loss"], step, stream)
            norm_before_step = gradient_norm(engine, config)
        engine.step()
    grad_norm = norm_before_step if norm_before_step is not None else float(engine.get_global_grad_norm())
    faults.check_applied(engine, grad_norm, step, stream)
    return means | {"learning_rate": rate, "grad_norm": grad_norm}, stopped


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
    except UserError:
        if dist.is_initialized() or distributed.discover(os.environ).local_rank == 0:
            raise
        sys.exit(2)  # every rank of a machine meets the same error: one of them says so
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not finished:
        sys.exit(faults.EXIT_STOPPED)


if __name__ == "__main__":
    run_command(main)
