from __future__ import annotations

import pytest

from data_pipeline import UserError
from pretrain import generate
from pretrain.decoding import load_export
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

    real = generate.continue_text

    def other_text(export, prompt, new, draft, *rest):
        tokens, statistics = real(export, prompt, new, draft, *rest)
        return ([0, *tokens[1:]] if draft else tokens), statistics

    monkeypatch.setattr(generate, "continue_text", other_text)
    main([str(exported), "--prompt", "x", "--max-new-tokens", "16", "--stats"])
    assert "text equal to plain greedy text: NO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft", "0"], "--draft 0: give a number of tokens of at least 1, auto or off"),
        (["--draft", "-2"], "--draft -2: give a number"),
        (["--draft", "many"], "--draft many: give a number"),
        (["--temperature", "-1"], "temperature -1.0 must be"),
        (["--top-p", "0"], "top-p 0.0 must lie"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--prompt", "x" * 60], "--prompt has 61 tokens and the model's context 48; shorten the prompt"),
        (["--max-new-tokens", "47"], "a prompt of 2 tokens and 47 new ones exceed the model's context of 48"),
    ],
    ids=lambda value: " ".join(value)[:24] if isinstance(value, list) else "",
)
def test_mistakes(arguments, message, exported, capsys):
    with pytest.raises(UserError, match=message):
        main([str(exported), "--prompt", "x", *arguments])
    assert capsys.readouterr().out == ""


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
