"""The typed schema of a run: every section, every key, every default, and what they must be to each other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from data_pipeline import UserError
from pretrain.config.data import DataConfig
from pretrain.config.objectives import JtpConfig, ObjectiveConfig
from pretrain.config.section import Fraction, NonNegativeFloat, NonNegativeInt, Section


class RunConfig(Section):
    """Who the run is, where it lives, how it starts and stops."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run's folder."""
    dir: str = "runs"
    """Folder that holds the runs."""
    seed: NonNegativeInt = 0
    """Seeds the initial weights and the order of the data."""
    resume: Literal["never", "auto", "must"] = "auto"
    """auto: go on from the newest whole checkpoint, if there is one; must: one must be there; never: none may be."""
    stop_after: PositiveInt | None = None
    """Save and stop cleanly after this many steps of this start."""
    wall_clock_minutes: PositiveFloat | None = None
    """Save and stop cleanly, with exit code 75, so long after the start. Leave room for one step and a save."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward and backward pass; auto is bfloat16 on a GPU and float32 on a CPU."""

    @field_validator("resume", mode="before")
    @classmethod
    def _check_resume(cls, value: Any) -> Any:
        if isinstance(value, bool):
            word = "auto or must" if value else "never"
            raise ValueError(f"run.resume={str(value).lower()} is no truth value any more; write {word}")
        return value

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.dir) / self.name


class ModelConfig(Section):
    """The Llama-shaped trunk."""

    layers: PositiveInt
    """Number of transformer blocks."""
    width: PositiveInt
    """Width of the residual stream, D."""
    heads: PositiveInt
    """Number of query heads; must divide the width."""
    kv_heads: PositiveInt | None = None
    """Number of key and value heads; must divide `heads`. None: as many as `heads`."""
    mlp_width: PositiveInt | None = None
    """Inner width of SwiGLU. None: 128·round((8·D/3)/128), as in the paper."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding. None: exactly the data set's vocabulary; may be larger, never smaller."""
    tie_embeddings: bool = False
    """Use the token embedding as the output head."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary position frequencies."""
    norm_epsilon: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    fix_final_gain: bool = False
    """Leave the final RMSNorm's gain as it starts, 1: a hidden state has the length √D, and no latent loss can be
    lowered by making states small."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the normal initialisation of every matrix."""
    init_from: str | None = None
    """An exported folder whose weights start this run (the optimizer starts fresh)."""

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(
                f"model.heads={self.heads} does not divide model.width={self.width}; "
                f"choose one of {_divisors(self.width, up_to=64)}"
            )
        if (self.width // self.heads) % 2:
            raise ValueError(
                f"model.width={self.width} / model.heads={self.heads} is odd, and rotary positions need an "
                "even width per head; choose another number of heads"
            )
        if self.heads % self.key_value_heads:
            raise ValueError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}; "
                f"choose one of {_divisors(self.heads, up_to=self.heads)}"
            )
        return self

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def fetch_heads(self) -> int:
        """Attention heads of JTP's Fetch: as many as the trunk's, at most 4."""
        return min(4, self.heads)

    @property
    def inner_width(self) -> int:
        """Inner width of SwiGLU (PAPER: 128·round((8·D/3)/128), at least 128)."""
        return self.mlp_width or max(128, 128 * round(8 * self.width / 3 / 128))


class BatchConfig(Section):
    """How much is read per step."""

    global_sequences: PositiveInt
    """Sequences per optimizer step, over all ranks and accumulation steps."""
    micro_sequences: PositiveInt
    """Sequences per rank in one forward pass; gradient accumulation follows from it."""

    def accumulation_steps(self, ranks: int) -> int:
        """Forward passes per optimizer step on each of `ranks` ranks; UserError if they do not fit."""
        if self.global_sequences % (ranks * self.micro_sequences):
            raise UserError(
                f"batch.global_sequences={self.global_sequences} is not a multiple of {ranks} ranks × "
                f"batch.micro_sequences={self.micro_sequences}; choose a multiple of "
                f"{ranks * self.micro_sequences}, or other micro sequences"
            )
        return self.global_sequences // (ranks * self.micro_sequences)


class OptimizerConfig(Section):
    """AdamW or Muon. Weight decay applies to matrices; norms have none."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: DeepSpeed's Muon for the matrices of trunk and p_psi, AdamW for embedding, head and norms."""
    learning_rate: PositiveFloat
    """Peak learning rate (of AdamW's part)."""
    muon_learning_rate: PositiveFloat | None = None
    """Peak learning rate of Muon's part, in units of an update's spectral norm, such as 0.02."""
    muon_momentum: Fraction = 0.95
    """Decay of Muon's momentum."""
    weight_decay: NonNegativeFloat
    """Decoupled weight decay."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """Decay of the first and second moments."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    gradient_clip: PositiveFloat | None
    """Largest global norm of the gradient; null switches clipping off."""

    @model_validator(mode="after")
    def _check_muon(self) -> OptimizerConfig:
        if self.name == "muon" and self.muon_learning_rate is None:
            raise ValueError("missing key optimizer.muon_learning_rate; optimizer.name=muon needs it, such as 0.02")
        if self.name != "muon" and self.muon_learning_rate is not None:
            raise ValueError(
                f"optimizer.muon_learning_rate={self.muon_learning_rate} has no meaning for optimizer.name="
                f"{self.name}; leave it out, or use muon"
            )
        if self.name == "muon" and self.gradient_clip is not None:
            raise ValueError(
                f"optimizer.gradient_clip={self.gradient_clip} would clip Muon's orthogonal updates, whose size is "
                "not that of the gradient; set it to null"
            )
        return self


class ScheduleConfig(Section):
    """The learning rate over a run, and its length. Every length is given in steps or in tokens."""

    name: Literal["constant", "cosine", "wsd"]
    """wsd: warm-up, stable, then a linear decay."""
    steps: PositiveInt | None = None
    """Length of the run in optimizer steps; this or `tokens`."""
    tokens: PositiveInt | None = None
    """Length of the run in tokens; this or `steps`."""
    warmup_steps: NonNegativeInt | None = None
    """Linear warm-up from zero; this or `warmup_tokens`, none by default."""
    warmup_tokens: NonNegativeInt | None = None
    decay_steps: PositiveInt | None = None
    """Length of the final linear decay (wsd alone); this or `decay_tokens`."""
    decay_tokens: PositiveInt | None = None
    final_fraction: Fraction = 0.0
    """Learning rate at the end of cosine or wsd, as a fraction of the peak."""

    @model_validator(mode="after")
    def _check_lengths(self) -> ScheduleConfig:
        if (self.steps is None) == (self.tokens is None):
            given = self._given("steps", "tokens")
            raise ValueError(f"give exactly one of schedule.steps and schedule.tokens, not {given or 'neither'}")
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            raise ValueError(f"{self._given('warmup_steps', 'warmup_tokens')}: give one of the two, not both")
        decays = self._given("decay_steps", "decay_tokens")
        if self.name == "wsd" and (self.decay_steps is None) == (self.decay_tokens is None):
            raise ValueError(
                "schedule.name=wsd needs exactly one of schedule.decay_steps and schedule.decay_tokens, "
                f"not {decays or 'neither'}"
            )
        if self.name != "wsd" and decays:
            raise ValueError(f"{decays} has no meaning for schedule.name={self.name}; leave it out, or use wsd")
        return self

    def _given(self, *keys: str) -> str:
        """`schedule.key=value and …` of those that were given; empty if none was."""
        values = {key: getattr(self, key) for key in keys}
        return " and ".join(f"schedule.{key}={value}" for key, value in values.items() if value is not None)


class CheckpointConfig(Section):
    """When the run is saved. A run is always saved at its end."""

    every: PositiveInt | None = None
    """Steps between two checkpoints; null: at the end alone."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of so many steps stay for ever."""
    keep_best: NonNegativeInt = 0
    """How many of those with the lowest validation loss stay."""
    mirror: str | None = None
    """A folder or URL (any that fsspec knows, such as s3://bucket/run) that gets a second copy, in the background."""
    in_background: bool = True
    """Copy a checkpoint in host memory and write the copy while training goes on; false: training waits."""
    failures_allowed: NonNegativeInt = 2
    """How many saves in a row may fail before the run ends."""

    @model_validator(mode="after")
    def _check_keep_every(self) -> CheckpointConfig:
        if self.keep_every is not None and (self.every is None or self.keep_every % self.every):
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} is not a multiple of checkpoint.every={self.every}; "
                "there would be no checkpoint to keep at those steps"
            )
        return self


class FaultsConfig(Section):
    """How the run meets trouble."""

    collective_timeout_minutes: PositiveFloat = 30.0
    """A rank that waits longer than this for the others gives up."""
    hang_minutes: PositiveFloat = 10.0
    """If all ranks are in one phase of a step (data, forward, …) longer than this, the run ends with exit code 76."""
    slow_phase_minutes: PositiveFloat = 25.0
    """The same for starting, loading, the first step, saving and validation; at least `hang_minutes`."""
    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """What follows a loss or gradient that is not finite, whose step is never applied. skip: the next batch. rollback:
    the weights of the last checkpoint by schedule, and the next batch: all since that checkpoint are stepped over."""
    spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """The same for a loss far above the recent ones."""
    spike_z: PositiveFloat = 10.0
    """How far: in deviations (1.4826·MAD) above the median of the recent losses."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """How many applied steps the recent losses are."""
    in_a_row: PositiveInt = 5
    """More steps than this in a row that were not applied stop the run."""


class MetricsConfig(Section):
    """Where the numbers go. metrics.jsonl is always written."""

    console_every: PositiveInt = 1
    """Steps between two console lines."""
    diagnostics_every: PositiveInt | None = 100
    """Steps between two sets of diagnostics (pretrain/diagnostics.py); null: none."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; its run id is kept in the run's folder."""
    wandb_project: str = "nextlat"
    peak_tflops: PositiveFloat | None = None
    """Peak dense TFLOP/s of one accelerator, for `mfu`. None: known by the GPU's name, else mfu is null."""


class ValidationConfig(Section):
    """Validation on the data set's validation split."""

    every: PositiveInt | None = None
    """Steps between two validations; null: at the end alone."""
    sequences: PositiveInt | None = None
    """How many sequences are read, from the start of the split; null: all of them."""


class Config(Section):
    """One run."""

    run: RunConfig
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 3}})
    """Ordinary DeepSpeed configuration, passed through. What follows from the run's own keys is refused here."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    metrics: MetricsConfig = MetricsConfig()
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _check_sections_against_each_other(self) -> Config:
        horizon = getattr(self.objective, "horizon", 0)
        if horizon >= self.data.sequence_length:
            raise ValueError(
                f"objective.horizon={horizon} must be smaller than data.sequence_length="
                f"{self.data.sequence_length}; shorten the horizon or lengthen the sequences"
            )
        if isinstance(self.objective, JtpConfig) and self.model.width % self.model.fetch_heads:
            raise ValueError(
                f"objective.name=jtp attends with {self.model.fetch_heads} heads, which do not divide "
                f"model.width={self.model.width}; choose a width that is a multiple of {self.model.fetch_heads}"
            )
        if self.batch.global_sequences % self.batch.micro_sequences:
            raise ValueError(
                f"batch.global_sequences={self.batch.global_sequences} is not a multiple of "
                f"batch.micro_sequences={self.batch.micro_sequences}; choose a multiple of it"
            )
        if self.warmup_steps + self.decay_steps > self.total_steps:
            given = self.schedule._given("warmup_steps", "warmup_tokens", "decay_steps", "decay_tokens")
            raise ValueError(
                f"{given}: {self.warmup_steps} warm-up and {self.decay_steps} decay steps do not fit into "
                f"{self.total_steps} steps; shorten them or lengthen the run"
            )
        alone = getattr(self.objective, "dynamics_only_steps", 0)
        if alone > self.total_steps:
            raise ValueError(
                f"objective.dynamics_only_steps={alone} is more than the run's {self.total_steps} steps; shorten it, "
                "or lengthen the run"
            )
        saved, validated = self.checkpoint.every, self.validation.every
        if self.checkpoint.keep_best and (saved is None or validated is None or saved % validated):
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} needs a validation with each checkpoint, and "
                f"checkpoint.every={saved} is not a multiple of validation.every={validated}; make it one"
            )
        derived = {
            "train_batch_size": "batch.global_sequences",
            "train_micro_batch_size_per_gpu": "batch.micro_sequences",
            "gradient_accumulation_steps": "batch.global_sequences and batch.micro_sequences",
            "optimizer": "optimizer",
            "scheduler": "schedule",
            "gradient_clipping": "optimizer.gradient_clip",
            "fp16": "run.precision",
            "bf16": "run.precision",
            "data_types": "run.precision",
        }
        for key, value in self.deepspeed.items():
            if key in derived:
                raise ValueError(f"deepspeed.{key}={value} follows from {derived[key]}; set that and leave this out")
        if not isinstance(self.deepspeed.get("zero_optimization", {}), dict):
            value = self.deepspeed["zero_optimization"]
            raise ValueError(f"deepspeed.zero_optimization={value!r} must be a mapping, such as {{stage: 3}}")
        if self.optimizer.name == "muon" and self.deepspeed.get("zero_optimization", {}).get("reduce_scatter"):
            raise ValueError(
                "deepspeed.zero_optimization.reduce_scatter=True leaves no gradient whole, as optimizer.name=muon "
                "needs them; leave it out"
            )
        if self.checkpoint.every is None and "rollback" in (self.faults.non_finite, self.faults.spike):
            raise ValueError("faults: rollback goes back to the last of checkpoint.every steps; set checkpoint.every")
        stage = self.zero_stage
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.zero_optimization.stage={stage!r} must be 0, 1, 2 or 3")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.batch.global_sequences * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Length of the run in optimizer steps."""
        return self._in_steps(self.schedule.steps, self.schedule.tokens)

    @property
    def warmup_steps(self) -> int:
        """Length of the warm-up in optimizer steps."""
        return self._in_steps(self.schedule.warmup_steps, self.schedule.warmup_tokens)

    @property
    def decay_steps(self) -> int:
        """Length of the final linear decay in optimizer steps; 0 unless the schedule is wsd."""
        return self._in_steps(self.schedule.decay_steps, self.schedule.decay_tokens)

    @property
    def zero_stage(self) -> Any:
        """The ZeRO stage, 3 unless the deepspeed section says otherwise."""
        return self.deepspeed.get("zero_optimization", {}).get("stage", 3)

    def _in_steps(self, steps: int | None, tokens: int | None) -> int:
        return steps if steps is not None else math.ceil((tokens or 0) / self.tokens_per_step)


def _divisors(number: int, up_to: int) -> str:
    return ", ".join(str(n) for n in range(1, up_to + 1) if number % n == 0)
