"""Downstream tasks by lm-evaluation-harness: ours, the harness's own command line, and likelihoods written out."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from data_pipeline import UserError
from pretrain.evals import harness
from pretrain.evaluate import evaluate, main, parse_suites
from pretrain.export import export
from pretrain.objectives import TokenBatch

JTP = {"name": "jtp", "horizon": 2, "joint_token_weight": 1.0}
QUESTIONS = [
    {"q": f"def f{i}(x):\n    return", "choices": [" x + 1", " self", " None\n", f" {i}"], "right": i * i % 4}
    for i in range(24)
]
TEXTS = [{"text": f"import os\nx = {i}\n" * (1 + i % 3)} for i in range(5)]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def write_task(folder: Path, name: str, rows: list[dict], metrics: list[str], **described) -> None:
    """A task as the harness reads it: a YAML file, and its samples beside it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"test": str(folder / f"{name}.jsonl")}
    content = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    content |= {"target_delimiter": "", "metric_list": [{"metric": metric} for metric in metrics]} | described
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    question = {"doc_to_text": "{{q}}", "doc_to_target": "{{choices[right]}}"}
    choice = question | {"doc_to_target": "right", "doc_to_choice": "choices"}
    write_task(folder, "choice", QUESTIONS, ["acc", "acc_norm"], output_type="multiple_choice", **choice)
    write_task(folder, "cloze", QUESTIONS, ["perplexity", "acc"], output_type="loglikelihood", **question)
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    write_task(folder, "rolling", TEXTS, ["bits_per_byte"], **rolling)
    until = {"until": ["\n"], "max_gen_toks": 4}
    writing = question | {"output_type": "generate_until", "generation_kwargs": until}
    write_task(folder, "writing", QUESTIONS, ["exact_match"], **writing)
    write_task(folder, "broken", QUESTIONS, ["acc"], output_type="multiple_choice", **choice)
    (folder / "broken.jsonl").unlink()
    (folder / "unread.yaml").write_text("task: [unread")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint in memory as the quickstart makes it, with a SentencePiece tokenizer."""
    from export_helpers import MemoryCheckpoint, sentencepiece_tokenizer

    return MemoryCheckpoint(sentencepiece_tokenizer(tmp_path_factory.mktemp("tokenizer")), init_std=0.05)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    return export(trained, tmp_path_factory.mktemp("exports") / "model", console=Console(file=io.StringIO()))


@pytest.fixture(scope="module", autouse=True)
def command_line(folder, tasks, tmp_path_factory) -> Iterator[tuple[subprocess.Popen, Path]]:
    """The harness's own command, which works beside the tests before the one that reads its result."""
    out = tmp_path_factory.mktemp("theirs")
    command = [str(Path(sys.executable).with_name("lm_eval")), "--model", "hf", "--tasks", "choice,cloze"]
    command += ["--model_args", f"pretrained={folder},dtype=float32,add_bos_token=True"]
    command += ["--include_path", str(tasks), "--device", "cpu", "--batch_size", "16", "--num_fewshot", "1"]
    environment = os.environ | OFFLINE | {"OMP_NUM_THREADS": "1"}
    with (out / "log").open("w") as log:
        process = subprocess.Popen([*command, "--output_path", str(out)], env=environment, stdout=log, stderr=log)
        yield process, out
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def run(source: Path, out: Path, tasks: Path | None, *names: str, **options) -> dict:
    options |= {"tasks": names, "tasks_folder": tasks and str(tasks), "console": Console(file=io.StringIO())}
    return evaluate(source, ["lm_eval"], out, **options)["lm_eval"]


@torch.no_grad()
def nats_of_end(checkpoint, context: str, end: str) -> float:
    """−log p of the tokens that `end` adds to a text that begins with EOS and `context`."""
    tokenizer, model = checkpoint.tokenizer(), checkpoint.model
    given, whole = ([tokenizer.eos_id, *tokenizer.encode(text)] for text in (context, context + end))
    row = torch.tensor([[*whole, 0]])
    batch = TokenBatch(row, torch.zeros_like(row), torch.arange(len(row[0]))[None], torch.ones_like(row).bool())
    log_p = (model.next_token_states(batch, tokenizer.eos_id)[0] @ model.lm_head.weight.T).double().log_softmax(-1)
    return -sum(float(log_p[t - 1, whole[t]]) for t in range(len(given), len(whole)))


@pytest.mark.parametrize("kind", ["export", "checkpoint", "jtp"])
def test_likelihoods_are_those_of_texts_that_begin_with_eos_once(kind, trained, folder, tasks, tmp_path, monkeypatch):
    checkpoint, source = trained, folder
    if kind == "jtp":
        from export_helpers import MemoryCheckpoint

        checkpoint = MemoryCheckpoint(trained.tokenizer(), JTP)
    if kind != "export":
        source = tmp_path
        monkeypatch.setattr("pretrain.checkpoints.open_checkpoint", lambda path: checkpoint)
    found = run(source, tmp_path / "out", tasks, "choice", "cloze", "rolling")["tasks"]

    nats = [[nats_of_end(checkpoint, row["q"], end) for end in row["choices"]] for row in QUESTIONS]
    chosen = [min(range(4), key=per_choice.__getitem__) for per_choice in nats]
    right = [choice == row["right"] for choice, row in zip(chosen, QUESTIONS, strict=True)]
    assert found["choice"]["metrics"]["acc"]["value"] == pytest.approx(sum(right) / 24)
    mean = sum(per_choice[row["right"]] for per_choice, row in zip(nats, QUESTIONS, strict=True)) / 24
    assert found["cloze"]["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(mean), rel=1e-4)
    bits = sum(nats_of_end(checkpoint, "", row["text"]) for row in TEXTS) / math.log(2)
    size = sum(len(row["text"].encode()) for row in TEXTS)
    assert found["rolling"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits / size, rel=1e-5)
    assert found["rolling"]["metrics"]["bits_per_byte"]["higher_is_better"] is False


def test_a_limit_a_table_a_picture_and_generated_text(folder, tasks, tmp_path, capsys):
    arguments = ["--suite", "lm_eval:choice,writing", "--tasks-folder", str(tasks), "--limit", "3"]
    main([str(folder), *arguments, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "lm_eval.json").read_text())
    assert [task["samples"] for task in result["tasks"].values()] == [3, 3]
    assert list(result["tasks"]["writing"]["metrics"]) == ["exact_match"]
    assert (tmp_path / "lm_eval.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "choice" in shown and "acc_norm" in shown and "exact_match" in shown
    assert [bar.get_width() for bar in harness.picture(result).axes[0].patches] == [100 * result["mean_accuracy"]]
    numbers = harness.headline(result)
    assert numbers["mean accuracy"] == result["mean_accuracy"] == numbers["choice"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ((), {}, "name its tasks, as in lm_eval:sciq,piqa, or lm_eval:paper"),
        (("choice", "unread"), {}, "lm_eval:unread: no such task; .*tasks0 has none in a YAML file that can be read"),
        (("choice", "broken"), {}, r"lm_eval:broken: its data set cannot be had \(FileNotFoundError"),
        (("sciq",), {}, r"lm_eval:sciq: its data set cannot be had .*fetch it once where there is a network"),
        (("choice",), {"few_shot": -1}, "--few-shot -1 must be at least 0"),
        (("choice",), {"tasks_folder": "nowhere"}, "--tasks-folder nowhere: no such folder"),
    ],
    ids=["no task", "unknown", "no data", "hub", "few-shot", "folder"],
)
def test_mistakes_are_one_line_before_anything_runs(names, options, message, folder, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *_, **__: pytest.fail("began to measure"))
    options = {"tasks": names, "tasks_folder": str(tasks)} | options
    with pytest.raises(UserError, match=message) as caught:
        evaluate(folder, ["lm_eval"], tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_checkpoint_does_not_write_texts(trained, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.checkpoints.open_checkpoint", lambda path: trained)
    with pytest.raises(UserError, match="lm_eval:writing: generates text, for which an exported model is needed"):
        run(tmp_path, tmp_path / "out", tasks, "writing")


def test_where_the_harness_is_not_installed_the_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"needs lm-evaluation-harness .*nextlat-pretrain\[eval\]"):
        run(folder, tmp_path / "out", None, "piqa")


def test_paper_stands_for_nine_tasks_that_the_harness_knows(tasks):
    known = harness._task_manager(harness.PAPER, str(tasks)).all_subtasks
    assert len(harness.PAPER) == 9 and set(harness.PAPER) <= set(known)
    assert harness.expand(("piqa", "paper", "mine")) == ("piqa", *(n for n in harness.PAPER if n != "piqa"), "mine")


@pytest.mark.parametrize(
    ("text", "suites", "chosen"),
    [
        ("perplexity, latent", ["perplexity", "latent"], None),
        ("lm_eval:piqa,sciq,latent", ["lm_eval", "latent"], ("piqa", "sciq")),
        ("latent,lm_eval:belief,lm_eval:sciq", ["latent", "lm_eval"], ("belief", "sciq")),
        ("lm_eval:paper,nonsense,probes", ["lm_eval", "probes"], ("paper", "nonsense")),
        ("lm_eval", ["lm_eval"], None),
        ("probes:3", ["probes:3"], None),
    ],
)
def test_tasks_follow_their_suite(text, suites, chosen):
    assert parse_suites(text) == (suites, chosen)


def test_the_harness_from_its_own_command_line_finds_the_same(command_line, folder, tasks, tmp_path):
    process, out = command_line
    assert process.wait(timeout=500) == 0, (out / "log").read_text()[-3000:]
    [file] = out.rglob("results_*.json")
    theirs = json.loads(file.read_text())
    ours = run(folder, tmp_path / "ours", tasks, "choice", "cloze", few_shot=1)
    assert ours["tasks"].keys() == theirs["results"].keys() == {"choice", "cloze"}
    for name, task in ours["tasks"].items():
        assert task["few_shot"] == theirs["n-shot"][name] == 1 and task["samples"] == 24
        for metric, one in task["metrics"].items():
            assert one["value"] == pytest.approx(theirs["results"][name][f"{metric},none"], rel=1e-4)
            assert one["error"] == pytest.approx(theirs["results"][name][f"{metric}_stderr,none"], rel=1e-3)
    accuracies = [theirs["results"][name]["acc,none"] for name in ("choice", "cloze")]
    assert ours["mean_accuracy"] == pytest.approx(sum(accuracies) / 2)
