"""Tasks as ordinary data sets: prepared in parallel, verified, inspected, and read row by row."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from data_pipeline import Stream, UserError, open_dataset, validation_batches
from data_pipeline.inspect import inspect
from data_pipeline.prepare import main, prepare
from data_pipeline.tasks import open_task
from data_pipeline.verify import verify


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_workers_do_not_change_a_byte_and_every_sample_is_there_once(tmp_path):
    spec = "path_star,arms=2,length=4,nodes=10,samples=40000"
    for workers in (1, 2):
        prepare(f"task:{spec}", None, tmp_path / str(workers), workers=workers, console=quiet())
    one, two = (json.loads((tmp_path / str(n) / "manifest.json").read_text()) for n in (1, 2))
    assert one == two and open_task(one["task"]) == open_task(spec)
    dataset = verify(tmp_path / "1", console=quiet())
    task = open_task(spec)
    train, validation = (dataset.split(name) for name in ("train", "validation"))
    assert train.documents + validation.documents == 40_000 and 300 < validation.documents < 500
    rows = np.concatenate(
        [split.read(0, split.tokens).reshape(-1, task.document_length) for split in (train, validation)]
    )
    expected = task.samples(0, 40_000).rows()
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))
    assert set(train.prompt_lengths.tolist()) == {task.prompt_length}


def test_a_row_is_one_sample_whose_answer_alone_is_a_target(tmp_path):
    task = open_task("countdown,samples=200")
    dataset = prepare(f"task:{task.spec}", None, tmp_path / "data", workers=1, console=quiet())
    stream = Stream(dataset.split("train"), seed=0, sequence_length=31, global_sequences=8)
    batch = stream.batch(0)
    eos = task.vocabulary.eos_id
    assert (batch.tokens[:, [0, 31]] == eos).all() and (batch.tokens[:, 1:31] != eos).all()
    assert batch.document_ids.tolist() == [[0] * 31 + [1]] * 8
    assert batch.target_mask[:, 1:].tolist() == [[False] * 13 + [True] * 18] * 8  # 17 tokens and EOS
    assert batch.labels is None


def test_labels_travel_beside_the_tokens(tmp_path):
    task = open_task("word_problem,group=S4,length=5,samples=20000")
    dataset = prepare(f"task:{task.spec}", None, tmp_path / "data", workers=1, console=quiet())
    split = dataset.split("train")
    assert len(split.shards) == 2 and split.has_labels
    batch = Stream(split, seed=1, sequence_length=6, global_sequences=64).batch(3)
    assert batch.labels is not None
    np.testing.assert_array_equal(batch.labels[:, :6], task.running_products(batch.tokens[:, 1:6]))
    from pretrain.objectives import TokenBatch

    assert TokenBatch.from_numpy(batch).targets.tolist() == batch.labels[:, :6].tolist()
    assert batch.rows(5, 9).labels.tolist() == batch.labels[5:9].tolist()
    last = validation_batches(dataset.split("validation"), sequence_length=6, micro_sequences=128)[-1]
    padding = last.document_ids < 0
    assert padding.any() and (last.labels[padding] == 0).all()
    real = ~padding[:, :6].any(1)
    np.testing.assert_array_equal(last.labels[real, :6], task.running_products(last.tokens[real, 1:6]))
    verify(tmp_path / "data", console=quiet())
    assert (dataset.path / "train/00000.labels").stat().st_size == (dataset.path / "train/00000.tokens").stat().st_size


def test_inspect_shows_words(tmp_path):
    prepare("task:countdown,samples=100", None, tmp_path / "data", workers=1, console=quiet())
    console = quiet()
    inspect(str(tmp_path / "data"), samples=1, sequence_length=31, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert " | | | | | | | | " in text and " = " in text


def test_a_vocabulary_comes_back_from_its_file(tmp_path):
    task = open_task("word_problem,group=S3,length=3,samples=50")
    dataset = prepare(f"task:{task.spec}", None, tmp_path / "data", workers=1, console=quiet())
    tokenizer = dataset.tokenizer()
    assert tokenizer.vocab_size == task.vocabulary.size == 7 and tokenizer.eos_id == dataset.eos_id == 6
    assert tokenizer.encode("(01) e (012)") == [task.vocabulary.ids[name] for name in ("(01)", "e", "(012)")]
    assert tokenizer.decode([2, 0, 6, 1]) == task.vocabulary.decode([2, 0, 1])
    longer = prepare("task:word_problem,group=S3,length=9,samples=50", None, tmp_path / "x", workers=1, console=quiet())
    assert longer.tokenizer_fingerprint == dataset.tokenizer_fingerprint
    assert longer.fingerprint != dataset.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "task:countdown", "--tokenizer", "bytes"], "has a vocabulary of its own: leave --tokenizer out"),
        (["--source", "task:countdown", "--min-characters", "3"], "filters are for text"),
        (["--source", "task:countdwn"], "no such task"),
        (["--source", "stdlib"], "--tokenizer: give a .model or .json file"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([*arguments, "--out", str(tmp_path / "data")])
    assert not (tmp_path / "data").exists()


def test_labels_that_an_objective_does_not_know_are_refused(tmp_path):
    from pretrain.config import load_config
    from pretrain.run_data import open_data

    prepare("task:word_problem,group=S3,length=3,samples=2000", None, tmp_path / "data", workers=1, console=quiet())
    overrides = [f"data.path={tmp_path / 'data'}", "data.sequence_length=4"]
    config = load_config("configs/belief/small/mtp.yaml", overrides)
    with pytest.raises(UserError, match=r"answered with labels, which objective\.name=mtp does not know"):
        open_data(config)
    open_data(load_config("configs/belief/small/gpt.yaml", overrides))
    assert open_dataset(tmp_path / "data").manifest["task"].startswith("word_problem,")
