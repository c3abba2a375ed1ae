from __future__ import annotations

import pytest
import torch

from data_pipeline import UserError
from pretrain import generate
from pretrain.decoding import Sampling, load_export
from pretrain.decoding.continuation import continue_texts
from pretrain.generate import TextStream, main, parse_draft


def test_prints_the_prompt_and_the_same_text_with_and_without_drafts(exported, capsys):
    shown = []
    for draft in (["off"], ["3"], ["auto"], []):
        main([str(exported), "--prompt", "def f", "--max-new-tokens", "20", *(["--draft", *draft] if draft else [])])
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    export = load_export(exported)
    ids = export.tokenizer("def f", return_tensors="pt")
    expected = export.model.generate(**ids, do_sample=False, max_new_tokens=20)[0]
    assert shown[0] == export.tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_a_seed_fixes_the_text_and_another_changes_it(exported, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        main(
            [str(exported), "--prompt", "x", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--seed", seed]
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_stats_say_what_was_accepted_how_fast_and_whether_equal(exported, capsys, monkeypatch):
    main([str(exported), "--prompt", "x", "--max-new-tokens", "16", "--stats"])
    shown = capsys.readouterr().out
    assert "accepted per cycle" in shown and "draft 4:" in shown and "times plain (medians of 3 runs in turn)" in shown
    assert "text equal to plain greedy text: yes" in shown

    real = generate.continue_texts

    def other_text(export, prompts, new, draft, *rest):
        texts, statistics = real(export, prompts, new, draft, *rest)
        return ([[0, *texts[0][1:]]] if draft else texts), statistics

    monkeypatch.setattr(generate, "continue_texts", other_text)
    main([str(exported), "--prompt", "x", "--max-new-tokens", "16", "--stats"])
    assert "text equal to plain greedy text: NO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft", "0"], "--draft 0: give a number of tokens of at least 1, auto or off"),
        (["--draft", "-2"], "--draft -2: give a number"),
        (["--draft", "many"], "--draft many: give a number"),
        (["--draft", "2.5"], "--draft 2.5: give a number"),
        (["--temperature", "-1"], "temperature -1.0 must be"),
        (["--temperature", "nan"], "temperature nan must be"),
        (["--top-k", "0"], "top-k 0 must be at least 1"),
        (["--top-p", "0"], "top-p 0.0 must lie"),
        (["--top-p", "1.5"], "top-p 1.5 must lie"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--draft-vocabulary", "nowhere.json"], "--draft-vocabulary nowhere.json: cannot be read"),
        (["--draft-vocabulary", "0"], "--draft-vocabulary 0: "),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: cannot be read"),
        (["--prompt", "x" * 60], "--prompt has 61 tokens and the model's context 48; shorten the prompt"),
        (["--max-new-tokens", "47"], "a prompt of 2 tokens and 47 new ones exceed the model's context of 48"),
    ],
    ids=lambda value: " ".join(value)[:24] if isinstance(value, list) else "",
)
def test_mistakes(arguments, message, exported, capsys):
    with pytest.raises(UserError, match=message) as error:
        main([str(exported), "--prompt", "x", *arguments])
    assert capsys.readouterr().out == "" and "\n" not in str(error.value)


def test_no_prompt(exported, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for arguments in ([], ["--prompts", str(tmp_path / "empty.txt")]):
        with pytest.raises(UserError, match="give at least one --prompt TEXT"):
            main([str(exported), *arguments])


def test_an_empty_prompt_is_continued_from_the_start_of_a_document(exported, capsys):
    main([str(exported), "--prompt", "", "--max-new-tokens", "8"])
    export = load_export(exported)
    expected = export.model.generate(torch.tensor([[export.eos_id]]), do_sample=False, max_new_tokens=8)[0]
    assert capsys.readouterr().out == export.tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_what_auto_learned_serves_the_next_text(exported):
    export = load_export(exported)
    for _ in range(2):
        continue_texts(export, [[export.eos_id]], 12, "auto", Sampling())
    assert export.adaptive_length._cycles > 12 // 2


def test_several_prompts_are_one_batch_of_the_same_texts(exported, tmp_path, capsys):
    alone = []
    for text in ("def f", "a = [1", ""):
        main([str(exported), "--prompt", text, "--max-new-tokens", "12"])
        alone.append(capsys.readouterr().out)
    (tmp_path / "prompts.txt").write_text("a = [1\n\n")
    main([str(exported), "--prompt", "def f", "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "12"])
    expected = "".join(f"── {number}/3\n{text}" for number, text in enumerate(alone, start=1))
    assert capsys.readouterr().out == expected


def test_a_draft_vocabulary_changes_the_drafts_and_not_the_text(exported, tmp_path, capsys):
    shown = []
    (tmp_path / "ids.json").write_text("[97]")
    for options in ([], ["--draft-vocabulary", str(tmp_path / "ids.json")]):
        main([str(exported), "--prompt", "def f", "--max-new-tokens", "20", "--stats", *options])
        shown.append(capsys.readouterr().out)
    texts = [text.partition("tokens in")[0].rpartition("\n")[0] for text in shown]
    assert texts[0] == texts[1]
    assert all("text equal to plain greedy text: yes" in text for text in shown)
    accepted = [text.partition("accepted per cycle")[2] for text in shown]
    assert accepted[0] != accepted[1]
    (tmp_path / "ids.json").write_text("[97, 99999]")
    with pytest.raises(UserError, match="give at least one token id, each from 0 to"):
        main([str(exported), "--prompt", "x", "--draft-vocabulary", str(tmp_path / "ids.json")])


def test_mistakes_about_the_folder(gpt, tmp_path):
    with pytest.raises(UserError, match="not an exported model"):
        main([str(tmp_path), "--prompt", "x"])
    with pytest.raises(UserError, match="has no latent dynamics model to draft with; use --draft off"):
        main([str(gpt), "--prompt", "x", "--draft", "auto"])
    assert parse_draft(None, False, gpt) == 0


def test_a_character_is_shown_when_its_last_byte_has_come():
    written: list[str] = []
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), written.append)
    for byte in "a🙂".encode():
        stream([byte])
    assert "".join(written) == "a🙂" and not any("\ufffd" in piece for piece in written)
    stream([0xE2])
    assert "".join(written) == "a🙂"
    stream([], last=True)
    assert "".join(written) == "a🙂\ufffd"
