"""Suite `lm_eval`: downstream tasks by lm-evaluation-harness, which is installed as the extra `eval`.

The tasks are the harness's own, whose data sets it takes from the hub or its cache, or those that a folder describes
(--tasks-folder: YAML files, beside data files if they like). Which ones, and the metrics, are the harness's; ours are
the model and its conventions: a text begins with EOS, which is BOS, as every training document did. Where the
harness itself puts BOS in front of a text, for rolling likelihoods, it is not put there twice.

From an export the harness sees transformers' model; from a checkpoint, next-token logits as the objective makes them,
so that JTP and BST can be compared too. Only an export generates text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from data_pipeline import Dataset, UserError
from pretrain.evals.ahead import rows_per_batch
from pretrain.evals.pictures import ACCENT, INK, new_picture
from pretrain.evals.subject import Subject
from pretrain.evals.suite import Suite
from pretrain.evals.task_subject import one_document_each

PAPER = (
    "wikitext",
    "lambada_standard",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "social_iqa",
    "sciq",
)
"""The tasks of the paper's table, zero-shot."""


def measure(
    subject: Subject,
    dataset: Dataset | None,
    limit: int | None,
    progress: Progress,
    tasks: tuple[str, ...] = (),
    few_shot: int | None = None,
    tasks_folder: str | None = None,
) -> dict[str, Any]:
    """Evaluate tasks, on the first `limit` samples of each.

    few_shot: examples in front of each sample, chosen with the harness's own fixed seed; None for the task's own
    number. Keys of the result: those of `Subject.described`, harness (its version), mean_accuracy (of `acc` over the
    tasks that have it; None if none), and tasks: by name version, few_shot, samples, and metrics: by name value, error
    (standard error; None where unknown) and higher_is_better.
    """
    from lm_eval import simple_evaluate

    names = expand(tasks)
    with _quiet():
        found = simple_evaluate(
            _model(subject, progress),
            tasks=_load(names, tasks_folder),
            task_manager=_task_manager(names, tasks_folder),
            num_fewshot=few_shot,
            limit=limit,
            log_samples=False,
        )
    results = {name: _described(found, name) for name in found["results"] if name in found["n-samples"]}
    accuracies = [task["metrics"]["acc"]["value"] for task in results.values() if "acc" in task["metrics"]]
    return subject.described() | {
        "harness": version("lm_eval"),
        "mean_accuracy": sum(accuracies) / len(accuracies) if accuracies else None,
        "tasks": results,
    }


def expand(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """The harness's names of tasks: `paper` stands for nine."""
    return tuple(dict.fromkeys(name for task in tasks for name in (PAPER if task == "paper" else (task,))))


def _described(found: Any, name: str) -> dict[str, Any]:
    """One task's entry of the result. The harness calls metrics `acc,none` and `acc_stderr,none`, after a filter."""
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr"):
            continue
        error = found["results"][name].get(f"{metric}_stderr,{filtered}")
        metrics[metric if filtered == "none" else f"{metric} ({filtered})"] = {
            "value": float(value),
            "error": float(error) if isinstance(error, float) else None,
            "higher_is_better": found["higher_is_better"][name].get(metric),
        }
    return {
        "version": found["versions"][name],
        "few_shot": found["n-shot"][name],
        "samples": found["n-samples"][name]["effective"],
        "metrics": metrics,
    }


def _load(names: tuple[str, ...], folder: str | None) -> list[Any]:
    """The harness's task objects, with their data. Raises UserError for unknown ones, and for data that is missing."""
    manager = _task_manager(names, folder)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        own = (
            f"--tasks-folder {folder} has none in a YAML file that can be read"
            if folder
            else "--tasks-folder DIR adds yours"
        )
        raise UserError(f"lm_eval:{','.join(unknown)}: no such task; `lm_eval ls tasks` lists the harness's, and {own}")
    loaded: list[Any] = []
    for name in names:
        try:
            loaded += manager.load([name])["tasks"].values()
        except Exception as error:  # whatever the hub, its libraries or a task's own code raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"lm_eval:{name}: its data set cannot be had ({error.__class__.__name__}: {reason}); fetch it once "
                "where there is a network, HF_HOME keeps it, or describe a local copy in --tasks-folder DIR"
            ) from None
    return loaded


def _task_manager(names: tuple[str, ...], folder: str | None) -> Any:
    """The harness's list of tasks: those of `folder`, and its own thousands, which take seconds, only where needed."""
    own = _listed(folder, False)
    return own if set(names) <= set(own.all_tasks) else _listed(folder, True)


@lru_cache
def _listed(folder: str | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=include_defaults)


def _model(subject: Subject, progress: Progress) -> Any:
    """The subject as the harness's model."""
    from lm_eval.models.huggingface import HFLM

    bar = progress.add_task("lm_eval", total=0)

    class Harnessed(HFLM):
        """transformers' model in the harness, with our progress bar, BOS once, and a checkpoint's own logits."""

        asked = 0

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            self.add_bos_token = False  # here the harness begins each text with BOS itself
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                self.add_bos_token = True

        def _loglikelihood_tokens(self, requests: list[Any], *_: Any, **options: Any) -> Any:
            with self._counted(requests):
                return super()._loglikelihood_tokens(requests, **options | {"disable_tqdm": True})

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            with self._counted(requests):
                return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Tensor, *rest: Any, **options: Any) -> Tensor:
            progress.advance(bar, len(inps))
            if subject.kind == "export":
                return super()._model_call(inps, *rest, **options)
            return next_token_logits(subject, inps)

        def _model_generate(self, context: Tensor, *rest: Any, **options: Any) -> Tensor:
            progress.advance(bar, len(context))
            return super()._model_generate(context, *rest, **options)

        @contextmanager
        def _counted(self, requests: list[Any]) -> Iterator[None]:
            """Requests with one context go through the model once, so the bar may jump at the end."""
            self.asked += len(requests)
            progress.update(bar, total=self.asked)
            yield
            progress.update(bar, completed=self.asked)

    decoder = subject.decoder().model if subject.kind == "export" else None
    stand_in = SimpleNamespace(device=subject.device, config=SimpleNamespace(model_type="llama"))
    return Harnessed(
        pretrained=stand_in if decoder is None else getattr(decoder, "llama", decoder),
        backend="causal",
        tokenizer=subject.transformers_tokenizer(),
        max_length=subject.sequence_length,
        batch_size=rows_per_batch(subject),
        add_bos_token=True,
    )


@torch.inference_mode()
def next_token_logits(subject: Subject, tokens_BT: Tensor) -> Tensor:
    """(B, T, V): rows that each hold one document from its start, padded at the end."""
    return subject.hidden_states(one_document_each(tokens_BT)) @ subject.head_VD.T


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log below errors: it warns of what is meant here."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def headline(result: dict[str, Any]) -> dict[str, float]:
    """Each task's first metric, and the mean accuracy."""
    numbers = {name: next(iter(task["metrics"].values()))["value"] for name, task in result["tasks"].items()}
    mean = result["mean_accuracy"]
    return numbers | ({} if mean is None else {"mean accuracy": mean})


def table(result: dict[str, Any]) -> Table:
    """For the console."""
    rows = Table(title="lm_eval", title_justify="left")
    for column in ("task", "few-shot", "samples", "metric", "value"):
        rows.add_column(column, justify="right" if column in ("few-shot", "samples", "value") else "left")
    for name, task in result["tasks"].items():
        first = (name, str(task["few_shot"]), f"{task['samples']:,}")
        for metric, one in task["metrics"].items():
            error = "" if one["error"] is None else f" ± {one['error']:.4f}"
            rows.add_row(*first, metric, f"{one['value']:.4f}{error}")
            first = ("", "", "")
    if result["mean_accuracy"] is not None:
        rows.add_row("mean", "", "", "acc", f"{result['mean_accuracy']:.4f}")
    return rows


def picture(result: dict[str, Any]) -> Figure:
    """Accuracies with their standard errors; what is no accuracy is in the table."""
    bars = {
        name: task["metrics"]["acc"] for name, task in reversed(result["tasks"].items()) if "acc" in task["metrics"]
    }
    figure, axes = new_picture("Accuracy (more is better)", height=1.4 + 0.45 * len(bars))
    axes.barh(list(bars), [100 * one["value"] for one in bars.values()], color=ACCENT, height=0.6)
    for row, one in enumerate(bars.values()):
        error = "" if one["error"] is None else f" ± {100 * one['error']:.1f}"
        place = (100 * one["value"], row)
        axes.annotate(
            f"{100 * one['value']:.1f}{error}", place, (4, 0), textcoords="offset points", va="center", color=INK
        )
    axes.set_xlabel("right (%)")
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 20))
    return figure


def check(
    subject: Subject,
    dataset: Dataset | None,
    limit: int | None,
    tasks: tuple[str, ...] = (),
    few_shot: int | None = None,
    tasks_folder: str | None = None,
) -> None:
    """Needs the harness, tasks that it knows, and their data."""
    if not tasks:
        raise UserError(
            "--suite lm_eval: name its tasks, as in lm_eval:sciq,piqa, or lm_eval:paper for the paper's nine"
        )
    try:
        import lm_eval  # noqa: F401  # only whether it can be imported
    except ImportError as error:
        raise UserError(
            f"--suite lm_eval: needs lm-evaluation-harness ({error}); pip install 'nextlat-pretrain[eval]'"
        ) from None
    if few_shot is not None and few_shot < 0:
        raise UserError(f"--few-shot {few_shot} must be at least 0")
    if tasks_folder is not None and not Path(tasks_folder).is_dir():
        raise UserError(f"--tasks-folder {tasks_folder}: no such folder; give one with a YAML file for each task")
    with _quiet():
        loaded = _load(expand(tasks), tasks_folder)
    writing = [task.config.task for task in loaded if task.OUTPUT_TYPE == "generate_until"]
    if writing and subject.kind == "checkpoint":
        raise UserError(f"lm_eval:{writing[0]}: generates text, for which an exported model is needed; export it first")


LM_EVAL = Suite(
    measure, table, picture, check, headline, options=("tasks", "few_shot", "tasks_folder"), reads_data=False
)
