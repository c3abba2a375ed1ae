"""The page and the picture of `benchmarks.decoding`."""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure

from pretrain.decoding import DecodingStatistics, Export
from pretrain.evals.pictures import ACCENT, GREY, INK, new_picture

if TYPE_CHECKING:
    from benchmarks.decoding import Row

LENGTHS = tuple(range(1, 11))


def write_page(rows: list[Row], export: Export, arguments: argparse.Namespace, out: Path | None) -> None:
    """Print the results as Markdown; write them to `out`, and a picture into the folder of its name."""
    picture = "decoding/acceptance.png"
    text = "\n".join([*head(rows, export, arguments), *speeds(rows), *acceptance(rows, picture), *costs(rows)]) + "\n"
    print(text)
    if out:
        target = out.parent / picture
        target.parent.mkdir(parents=True, exist_ok=True)
        acceptance_picture(rows).savefig(target)
        out.write_text(text, encoding="utf-8")


def head(rows: list[Row], export: Export, arguments: argparse.Namespace) -> list[str]:
    """What was run, where and when."""
    model = export.model.config
    on_gpu = export.model.device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else "one thread of a shared x86-64 machine, processor seconds"
    return [
        "# Drafting against plain decoding",
        "",
        f"    OMP_NUM_THREADS=1 python -m benchmarks.decoding --export {arguments.export} --rounds {arguments.rounds} "
        f"--tokens {arguments.tokens}{' --trained' * arguments.trained}",
        f"    # {datetime.date.today()}, {where}, torch {torch.__version__}, {str(export.model.dtype)[6:]}",
        "",
        f"The trained model: {model.num_hidden_layers} layers, width {model.hidden_size}, V = {model.vocab_size:,}, "
        f"p_ψ's inner width {export.dynamics.input.out_features if export.dynamics else 0}. Its prompts are of code "
        f"and prose (docstrings) from validation documents, a round's 8 decoded together or one by one, "
        f"{arguments.tokens} new tokens, half as many without a cache. "
        + ("" if arguments.trained else other_trunk(rows[-1].tokens))
        + "Before it is timed, every way decodes "
        "another text or batch, and auto eight texts three times: batches as large as it is timed with.",
        "",
    ]


def other_trunk(tokens: int) -> str:
    """What the rows of GPT-2's size are."""
    return (
        "The other trunk has GPT-2's size (12 layers, width 768, V = 50,257; p_ψ 2,448) and random weights, "
        f"{tokens} new tokens, 2 texts one by one: its draft steps are computed in full, and then draft the right "
        "token as often as the trained model's did at that position, on code. So its times are measured, its "
        "acceptance is set. "
    )


def speeds(rows: list[Row]) -> list[str]:
    """Speed-ups: every way of every row."""
    counts = " and ".join(f"{len(row.rounds[0])} ({row.trunk})" for row in {row.trunk: row for row in rows}.values())
    lines = [
        "## Speed over plain decoding",
        "",
        f"Medians of rounds, {counts}, each of which decodes texts of its own in every way. **Best**: the "
        "fastest fixed length, none (1.00) included, known only afterwards. **auto ÷ best**: against the length "
        "that was fastest for the other rounds' texts, as the fastest for a round's own is so by luck too; geometric "
        "mean of the rounds ± its standard error. Rows without a cache, batch 1, greedy, are the paper's definition of "
        "speed-up, where its draft length is our k + 1; rows with one are what a user feels.",
        "",
        f"| trunk | text | T | cache | batch | tokens/s | {' | '.join(map(str, LENGTHS))} | auto | auto ÷ best |",
        "|" + "---|" * (8 + len(LENGTHS)),
    ]
    for row in rows:
        best = max((0, *LENGTHS), key=row.speed_up)
        cells = [f"**{row.speed_up(k):.2f}**" if k == best else f"{row.speed_up(k):.2f}" for k in LENGTHS]
        plain = statistics.median(one.tokens_per_second for one in row.rounds[0])
        lines.append(
            f"| {named(row)} | {plain:,.0f} | {' | '.join(cells)} | {row.speed_up('auto'):.2f} "
            "| {:.2f} ± {:.2f} |".format(*geometric_mean(auto_against_best(row)))
        )
    return [*lines, ""]


def auto_against_best(row: Row) -> list[float]:
    """Of each round, auto's speed by that of the length that was the fastest in the others; in itself, if alone."""
    speeds = {way: row.ratios(way) for way in (0, *LENGTHS)}

    def best_but_for(number: int) -> int:
        others = {way: ratios[:number] + ratios[number + 1 :] or ratios for way, ratios in speeds.items()}
        return max(others, key=lambda way: statistics.median(others[way]))

    return [auto / speeds[best_but_for(number)][number] for number, auto in enumerate(row.ratios("auto"))]


def geometric_mean(ratios: list[float]) -> tuple[float, float]:
    """Of at least one ratio; and its standard error, which is not a number where there is but one."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = math.exp(statistics.fmean(logs))
    return mean, mean * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan


def named(row: Row) -> str:
    """A row's first cells."""
    cached = "yes" if row.cached else "no"
    return f"{row.trunk} | {row.text} | {row.temperature:.0f} | {cached} | {row.batch}"


def acceptance(rows: list[Row], picture: str) -> list[str]:
    """Accepted tokens a cycle, one text at a time: batch and cache change nothing here."""
    lines = [
        "## Accepted drafts per cycle",
        "",
        "The cycle's first token, the target's own, is not counted. *Drafted*: by auto, per cycle.",
        "",
        f"| text | T | {' | '.join(map(str, LENGTHS))} | auto | drafted |",
        "|" + "---|" * (4 + len(LENGTHS)),
    ]
    for row in alone(rows):
        cells = [f"{row.total(k).accepted_per_cycle:.2f}" for k in (*LENGTHS, "auto")]
        auto = row.total("auto")
        lines.append(f"| {row.text} | {row.temperature:.0f} | {' | '.join(cells)} | {auto.drafted / auto.cycles:.2f} |")
    return [*lines, "", f"![Acceptance by position]({picture})", ""]


def alone(rows: list[Row]) -> list[Row]:
    """One text at a time, with a cache, on the trained model."""
    return [row for row in rows if row.cached and row.batch == 1 and row.trunk == "trained"]


def costs(rows: list[Row]) -> list[str]:
    """What a draft step and a verification cost, and how much faster decoding could be at these costs."""
    lines = [
        "## Costs, and the ceiling they allow",
        "",
        "Milliseconds: a plain step; a draft step (of all texts of the batch at once); the forward pass over k drafts "
        "and the token before them, with the comparison. **Ceiling**: the speed-up at the best k ≤ 10 if every draft "
        "stood; **allowed**: what these costs and the row's own acceptance allow a fixed length.",
        "",
        "| trunk | text | T | cache | batch | plain | draft | 1 | 2 | 4 | 7 | 10 | draft ÷ plain | ceiling | allowed |",
        "|" + "---|" * 15,
    ]
    for row in rows:
        totals = {k: row.total(k) for k in (0, *LENGTHS)}
        plain, draft = (
            verification(totals[0]),
            statistics.median(one.draft_seconds / one.draft_steps for k, one in totals.items() if k),
        )
        shares = totals[10].acceptance_by_position
        perfect, found = (best_speed_up(totals, draft, chances) for chances in ([1.0] * 10, shares))
        cells = [
            f"{1e3 * seconds:.2f}" for seconds in (plain, draft, *(verification(totals[k]) for k in (1, 2, 4, 7, 10)))
        ]
        lines.append(f"| {named(row)} | {' | '.join(cells)} | {draft / plain:.2f} | {perfect:.2f} | {found:.2f} |")
    return lines


def verification(total: DecodingStatistics) -> float:
    """Seconds of a trunk's forward pass with what follows it."""
    return total.verify_seconds / total.verifications


def best_speed_up(totals: dict[int, DecodingStatistics], draft: float, chances: list[float]) -> float:
    """The best that a fixed length of at least 1 gives, where draft i stands with chances[i] if those before it do."""
    best, tokens, alive = 0.0, 1.0, 1.0
    for k, chance in zip(LENGTHS, chances, strict=False):
        alive *= chance
        tokens += alive
        best = max(best, tokens * verification(totals[0]) / (k * draft + verification(totals[k])))
    return best


def acceptance_picture(rows: list[Row]) -> Figure:
    """Acceptance by position, of each text."""
    figure, axes = new_picture("Drafts that stood, of those compared, by position (10 drafts a cycle)")
    for row in alone(rows):
        shares = [100 * share for share in row.total(10).acceptance_by_position]
        colour, line = (ACCENT if row.text == "code" else GREY), ("--" if row.temperature else "-")
        how = "sampled at T = 1" if row.temperature else "greedy"
        axes.plot(range(1, len(shares) + 1), shares, line, color=colour, marker="o", label=f"{row.text}, {how}")
    axes.set_xlabel("position of the draft in its cycle")
    axes.set_ylabel("accepted, where all before it were (%)")
    axes.set_xticks(LENGTHS)
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure
