from __future__ import annotations

import io
import json
import lzma
import math
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from data_pipeline import Dataset, UserError
from pretrain.evals import perplexity
from pretrain.evaluate import evaluate
from pretrain.export import export


def run(source, out, **options) -> dict:
    return evaluate(source, ["perplexity"], out, console=Console(file=io.StringIO()), **options)["perplexity"]


@torch.no_grad()
def direct(checkpoint, data: Dataset, length: int, windows: int | None = None) -> tuple[float, int]:
    """−Σ log p in nats and the number of targets: window by window, document by document, one forward pass each."""
    split = data.split("validation")
    stream = torch.from_numpy(split.read(0, split.tokens).astype("int64"))
    last = len(stream) - 1 if windows is None else min(len(stream) - 1, windows * length)
    nats, count = 0.0, 0
    for start in range(0, last, length):
        stop = min(start + length, last)
        cuts = [start, *(int(d) for d in split.document_starts if start < d < stop), stop]
        for a, b in pairwise(cuts):
            tokens = stream[a:b][None]
            hidden = checkpoint.model.trunk(tokens, torch.zeros_like(tokens), torch.arange(b - a)[None]).hidden
            log_p = (hidden[0] @ checkpoint.model.lm_head.weight.T).double().log_softmax(-1)
            nats -= float(log_p.gather(1, stream[a + 1 : b + 1, None]).sum())
            count += b - a
    return nats, count


@pytest.mark.parametrize("limit", [None, 2])
def test_equals_a_direct_computation_from_a_checkpoint_and_from_its_export(
    checkpoint, exported, run_folder, data, limit, tmp_path
):
    nats, count = direct(checkpoint, data, length=48, windows=limit)
    for source, kind in [(run_folder, "checkpoint"), (exported, "export")]:
        result = run(source, tmp_path / kind, limit=limit)
        assert result["kind"] == kind and result["step"] == 7
        assert result["tokens"] == count
        assert result["nats"] == pytest.approx(nats, rel=1e-5)
        assert result["loss"] == pytest.approx(nats / count, rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
        assert json.loads((tmp_path / kind / "perplexity.json").read_text()) == result
        assert (tmp_path / kind / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_bits_per_byte_and_the_compressor_are_of_the_same_text(exported, data, tmp_path):
    split, tokenizer = data.split("validation"), data.tokenizer()
    text = tokenizer.decode(split.read(0, split.tokens)).encode()
    result = run(exported, tmp_path)
    assert result["text_bytes"] == len(text) == split.text_bytes
    assert result["bits_per_byte"] == pytest.approx(result["nats"] / math.log(2) / len(text))
    assert result["xz_bytes"] == len(lzma.compress(text, preset=9))
    assert result["xz_bits_per_byte"] == pytest.approx(8 * result["xz_bytes"] / len(text))


def test_a_limit_counts_the_bytes_of_the_evaluated_tokens(exported, data, tmp_path):
    text = data.tokenizer().decode(data.split("validation").read(1, 2 * 48 + 1))
    result = run(exported, tmp_path, limit=2)
    assert result["sequences"] == 2 and result["tokens"] == 96
    assert result["text_bytes"] == len(text.encode()) == 96
    assert result["bits_per_byte"] == pytest.approx(result["nats"] / math.log(2) / 96)
    assert run(exported, tmp_path, limit=99)["text_bytes"] == data.split("validation").text_bytes


def test_a_limit_that_cuts_a_character_gives_no_bits_per_byte(exported, make_data, tmp_path):
    cut = make_data(["東" * 40])  # 48 bytes are 16 characters, 49 … are not whole
    assert run(exported, tmp_path, data=str(cut.path), limit=1)["text_bytes"] == 48
    shifted = make_data(["a" + "東" * 40])
    result = run(exported, tmp_path, data=str(shifted.path), limit=1)
    assert result["bits_per_byte"] is result["xz_bytes"] is result["text_bytes"] is None
    assert result["loss"] > 0


def test_prompt_tokens_are_no_targets_and_then_bytes_are_not_those_of_the_text(exported, make_data, tmp_path):
    texts = ["question: answer", "ask: say"]
    whole, masked = make_data(texts), make_data(texts, prompts=[9, 4])
    everything = run(exported, tmp_path, data=str(whole.path))
    answers = run(exported, tmp_path, data=str(masked.path))
    assert everything["tokens"] - answers["tokens"] == 13
    assert answers["nats"] < everything["nats"]
    assert everything["bits_per_byte"] is not None and answers["bits_per_byte"] is None


def test_pictures_show_what_the_result_has():
    result = {"loss": 2.0, "bits_per_byte": 3.0, "xz_bits_per_byte": 2.5}
    with_bytes = perplexity.picture(result).axes[0]
    assert [bar.get_width() for bar in with_bytes.patches] == [8.0, 2.5, 3.0]
    without = perplexity.picture(result | {"bits_per_byte": None}).axes[0]
    assert [bar.get_width() for bar in without.patches] == [2.0]
    assert without.get_xlabel() == "nats per token"


@pytest.fixture
def mixed(make_data, tmp_path_factory):
    """An export that was trained on three sources: code, prose, and one without validation text."""
    from export_helpers import MemoryCheckpoint, bytes_tokenizer

    sources = {"code": make_data(["def f(x):\n    return x\n" * 3]), "prose": make_data(["once upon a time " * 8])}
    sources["empty"] = make_data([])
    made = MemoryCheckpoint(bytes_tokenizer())
    made.dataset |= {"path": str(sources["prose"].path)}
    made.dataset["sources"] = {
        name: {"path": str(one.path), "fingerprint": one.fingerprint, "share": 0.3} for name, one in sources.items()
    }
    folder = export(made, tmp_path_factory.mktemp("exports") / "mixed", console=Console(file=io.StringIO()))
    return made, folder, sources


def test_each_source_of_a_mixture_has_a_row_of_its_own(mixed, tmp_path):
    checkpoint, folder, sources = mixed
    result = run(folder, tmp_path)
    assert list(result["domains"]) == ["code", "prose", "empty"]
    for name in ("code", "prose"):
        row, split = result["domains"][name], sources[name].split("validation")
        nats, count = direct(checkpoint, sources[name], length=48)
        assert row["dataset"] == str(sources[name].path)
        assert row["tokens"] == count == split.tokens - 1
        assert row["nats"] == pytest.approx(nats, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / split.text_bytes, rel=1e-5)
    assert result["domains"]["code"]["nats"] != pytest.approx(result["domains"]["prose"]["nats"], rel=0.01)
    empty = result["domains"]["empty"]
    assert empty["tokens"] == 0 and empty["loss"] is empty["perplexity"] is empty["bits_per_byte"] is None
    # What stands for the whole is the source of the largest share, as without a mixture.
    assert result["domains"]["prose"].items() <= result.items()
    bars = perplexity.picture(result).axes[0].patches
    assert [bar.get_width() for bar in bars] == [result["domains"][n]["bits_per_byte"] for n in ("prose", "code")]


def test_data_chooses_among_sources_and_other_sets(mixed, make_data, tmp_path):
    _, folder, sources = mixed
    assert "domains" not in run(folder, tmp_path, data="code")
    other = str(make_data(["something else " * 5]).path)
    result = run(folder, tmp_path, data=f"code, {other}")
    assert list(result["domains"]) == ["code", other] and result["dataset"] == str(sources["code"].path)
    with pytest.raises(UserError, match="nonsense: no such data set"):
        run(folder, tmp_path / "out", data="code,nonsense")
    sources["code"].path.joinpath("manifest.json").unlink()  # of the share that is not the largest
    with pytest.raises(UserError, match=r"the data that .* was trained on: .*; or give --data"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
