"""model.generate(…, custom_generate=DIR) as a user calls it, in a folder that knows nothing of this repository."""

from __future__ import annotations

import ast
import io
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from export_helpers import MemoryCheckpoint, bytes_tokenizer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from pretrain.export import export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    checkpoint = MemoryCheckpoint(bytes_tokenizer(), kv_heads=2)
    return export(checkpoint, tmp_path_factory.mktemp("custom") / "model", console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Transformers copies the code there; the user's own cache stays as it is."""
    from transformers import dynamic_module_utils

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def generate(model, folder, ids, **settings):
    return model.generate(ids, custom_generate=str(folder), trust_remote_code=True, **settings)


@pytest.mark.parametrize("draft_length", [1, 5, "auto"])
def test_greedy_text_equals_that_of_plain_generate(model, folder, draft_length):
    """Twice: what `auto` learned of the first text is there for the second."""
    ids = torch.tensor([[256, 100, 101, 102]])
    plain = model.generate(ids, do_sample=False, max_new_tokens=30)
    for _ in range(2):
        assert torch.equal(generate(model, folder, ids, max_new_tokens=30, draft_length=draft_length), plain)


def test_a_model_that_was_moved_or_cast_after_its_first_text_drafts_on(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[256, 100, 101, 102]])
    generate(model, folder, ids, max_new_tokens=8)
    model = model.double()
    plain = model.generate(ids, do_sample=False, max_new_tokens=30)
    assert torch.equal(generate(model, folder, ids, max_new_tokens=30), plain)


def test_a_model_on_several_devices_is_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.lm_head = model.lm_head.to("meta")  # as device_map="auto" puts it on another GPU
    with pytest.raises(ValueError, match="on cpu and meta; drafting needs it on one"):
        generate(model, folder, torch.tensor([[256, 100]]), max_new_tokens=8)


def test_a_left_padded_batch_equals_plain_generate(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["def f", "a", "import os, s"], return_tensors="pt", padding=True)
    plain = model.generate(**batch, do_sample=False, max_new_tokens=24)
    drafted = model.generate(
        **batch, do_sample=False, max_new_tokens=24, custom_generate=str(folder), trust_remote_code=True, draft_length=3
    )
    assert torch.equal(drafted, plain)


def test_sampled_tokens_have_the_distribution_of_plain_sampling(model, folder):
    """Frequencies of the second token, which was drafted, against the exact ones."""
    samples, ids = 4000, torch.tensor([[256, 100]])
    torch.manual_seed(0)
    texts = generate(
        model, folder, ids.expand(samples, 2), do_sample=True, temperature=0.7, top_k=4, top_p=0.95,
        max_new_tokens=2, draft_length=1,
    )  # fmt: skip
    with torch.no_grad():
        first = processed(model(ids).logits[0, -1])
        second = sum(
            p * processed(model(torch.cat([ids, torch.tensor([[token]])], 1)).logits[0, -1])
            for token, p in enumerate(first.tolist())
            if p > 0
        )
    counts = torch.bincount(texts[:, 3], minlength=len(second)).double()
    assert counts[second == 0].sum() == 0
    likely = second * samples >= 5
    statistic = ((counts - second * samples) ** 2 / (second * samples))[likely].sum()
    degrees = torch.tensor(float(likely.sum() - 1)).double()
    assert float(torch.special.gammaincc(degrees / 2, statistic / 2)) > 1e-3


def processed(logits):
    """By transformers' own processors."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(4), TopPLogitsWarper(0.95)])
    return warpers(None, logits[None].double())[0].softmax(-1)


def test_runs_where_this_package_is_not_installed(folder, tmp_path):
    """Only transformers is imported: any module of ours, and DeepSpeed, cannot be found and cannot be imported."""
    code = f"""
import importlib.util, sys
def absent(name):
    return name.split(".")[0] in ("pretrain", "data_pipeline", "deepspeed")
class Refuse:
    def find_spec(self, name, *rest):
        if absent(name):
            raise ImportError("No module named " + name)
sys.meta_path.insert(0, Refuse())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if absent(name) else found(name, *rest)
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
ids = torch.tensor([[256, 100, 101]])
plain = model.generate(ids, do_sample=False, max_new_tokens=20)
drafted = model.generate(ids, max_new_tokens=20, custom_generate={str(folder)!r}, trust_remote_code=True)
assert torch.equal(plain, drafted)
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=300)
    for file in (folder / "custom_generate").glob("*.py"):
        ast.parse(file.read_text())
        assert "pretrain." not in file.read_text().replace("`pretrain.", "")


def test_streams_one_text(model, folder, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def f", return_tensors="pt")["input_ids"]
    text = generate(model, folder, ids, max_new_tokens=12, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(text[0, ids.shape[1] :]).strip()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_length": 0}, "draft_length=0: give at least 1"),
        ({"draft_length": -3}, "draft_length=-3: give at least 1"),
        ({"draft_length": 2.5}, "draft_length=2.5: give at least 1"),
        ({"draft_length": True}, "draft_length=True: give at least 1"),
        ({"draft_length": "fast"}, "draft_length='fast': give at least 1 or 'auto'"),
        ({"draft_vocabulary": 0}, "draft_vocabulary=0: give a number of tokens of at least 1"),
        ({"draft_vocabulary": 9}, "draft_vocabulary=9: .* records no token frequencies; leave it out"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, "top.p"),
        ({"do_sample": True, "top_p": 0.0}, "top.p"),
        ({"num_beams": 4}, "num_beams: not supported"),
        ({"repetition_penalty": 1.2}, "repetition_penalty: not supported"),
        ({"stop_strings": ["x"]}, "stop_strings: not supported"),
        ({"draft_lenght": 3}, "draft_lenght: not supported"),
        ({"eos_token_id": [1, 2]}, "drafting knows one end token"),
        ({"max_new_tokens": 90}, "exceed the model's context of 48"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_followed_is_refused_in_one_line_before_anything_is_shown(settings, message, model, folder):
    shown = []
    streamer = type("Streamer", (), {"put": lambda _, new: shown.append(new), "end": lambda _: None})()
    with pytest.raises(ValueError, match=message) as error:
        ids = torch.tensor([[256, 100]])
        generate(model, folder, ids, streamer=streamer, **({"max_new_tokens": 4} | settings))
    assert not shown and "\n" not in str(error.value)


def test_an_empty_prompt_is_refused(model, folder):
    ids = torch.empty(1, 0, dtype=torch.long)
    with pytest.raises(ValueError, match="the prompt has no tokens; give at least one"):
        generate(model, folder, ids, max_new_tokens=4)
    padded = {"attention_mask": torch.tensor([[1, 1], [0, 0]]), "max_new_tokens": 4}
    with pytest.raises(ValueError, match="the prompt has no tokens; give at least one"):
        generate(model, folder, torch.tensor([[256, 100], [256, 256]]), **padded)


def test_a_model_without_dynamics_has_no_such_folder_and_cannot_use_anothers(tmp_path, folder):
    checkpoint = MemoryCheckpoint(bytes_tokenizer(), {"name": "next_token"})
    out = export(checkpoint, tmp_path / "gpt", console=Console(file=io.StringIO()))
    assert not (out / "custom_generate").exists()
    plain = AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(OSError, match="does not contain a `custom_generate`"):
        generate(plain, out, torch.tensor([[256]]), max_new_tokens=2)
    with pytest.raises(
        ValueError, match=f"{out}: has no latent dynamics model .* or leave out custom_generate"
    ) as error:
        generate(plain, folder, torch.tensor([[256]]), max_new_tokens=2)
    assert "\n" not in str(error.value)


def test_token_ranks_count_the_training_split(tiny_data, tmp_path):
    from data_pipeline import open_dataset

    data = open_dataset(tiny_data)
    checkpoint = MemoryCheckpoint(data.tokenizer())
    checkpoint.dataset |= {"path": str(tiny_data), "fingerprint": data.fingerprint}
    out = export(checkpoint, tmp_path / "model", console=Console(file=io.StringIO()))
    ranks = json.loads((out / "nextlat" / "tokens_by_frequency.json").read_text())
    split = data.split("train")
    counts = torch.bincount(torch.from_numpy(split.read(0, split.tokens).astype("int64")))
    assert len(ranks) == int((counts > 0).sum())
    assert all(counts[a] >= counts[b] for a, b in itertools.pairwise(ranks))
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[data.eos_id, ranks[0], ranks[1]]])
    plain = model.generate(ids, do_sample=False, max_new_tokens=20)
    assert torch.equal(generate(model, out, ids, max_new_tokens=20, draft_vocabulary=5), plain)
