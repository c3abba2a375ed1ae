"""Suite `belief`: how much of the exact posterior over hidden states lies linearly in a model's states.

On outputs of a hidden Markov model the posterior after every symbol is known. A linear map with a constant is fitted
from hidden states to posteriors by least squares on one half of fresh test samples and judged on the other:

    r2                  1 − Σ ‖b − b̂‖² / Σ ‖b − mean b‖² over all positions, with an interval from resampled samples
    effective_rank      exp(entropy of σ / Σσ) of the matrix of hidden states, uncentred; and that of the posteriors
    near, apart         mean distance between hidden states of different histories whose posteriors nearly agree, and
                        of histories taken at random, in units of the states' root mean square: near / apart is 0
                        where histories with one belief share one state
    excess_loss         nats above the entropy of the next symbol given the posterior: the least there can be
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.progress import Progress
from rich.table import Table

from data_pipeline import Dataset
from data_pipeline.tasks.belief import Belief
from pretrain.evals.pictures import ACCENT, INK, style
from pretrain.evals.subject import Subject
from pretrain.evals.suite import Suite
from pretrain.evals.task_subject import SEED, effective_rank, hidden_states, test_task

SAMPLES = 1000
PAIRS = 2000
NEAR = 0.01
"""Total variation up to which two posteriors nearly agree."""
RESAMPLES = 200
SHOWN = 3000


def measure(subject: Subject, dataset: Dataset, limit: int | None, progress: Progress) -> dict[str, Any]:
    """Compare states and posteriors on `limit` test samples; keys as above, and task, samples, spectra and points."""
    task, samples = test_task(dataset, Belief), max(4, limit or SAMPLES)
    bar = progress.add_task("belief", total=3)
    rows = task.samples(0, samples).rows()
    beliefs_NLS = task.posteriors(rows[:, 1:])
    states_NLD = hidden_states(subject, rows).float()
    progress.advance(bar)
    logits = (states_NLD @ subject.head_VD.T.float()).log_softmax(-1).cpu().numpy()[:, :-1]
    nats = -np.take_along_axis(logits, rows[:, 1:, None], 2).mean()
    least = task.entropy(beliefs_NLS[:, :-1]).mean()
    states = states_NLD.double().cpu().numpy()
    r2, decoded, shown = linear_r2(states, beliefs_NLS)
    progress.advance(bar)
    rank, spectrum = effective_rank(states_NLD.flatten(0, 1))
    belief_rank, belief_spectrum = effective_rank(torch.from_numpy(beliefs_NLS).flatten(0, 1))
    near, apart, pairs = distances(states, beliefs_NLS)
    progress.advance(bar)
    return subject.described() | {
        "task": task.spec,
        "samples": samples,
        "r2": r2,
        "effective_rank": rank,
        "effective_rank_of_posteriors": belief_rank,
        "near": near,
        "apart": apart,
        "near_pairs": pairs,
        "excess_loss": float(nats - least),
        "least_loss": float(least),
        "spectrum": spectrum,
        "spectrum_of_posteriors": belief_spectrum,
        "points": {"true": plane(shown, shown), "decoded": plane(decoded, shown), "colours": shown[:, :3].tolist()},
    }


def linear_r2(
    states_NLD: NDArray[np.float64], beliefs_NLS: NDArray[np.float64]
) -> tuple[dict[str, float], NDArray[np.float64], NDArray[np.float64]]:
    """R² on the second half of the samples of a linear fit on the first, and the first points decoded, and true."""
    half = len(states_NLD) // 2
    design = np.concatenate([states_NLD, np.ones((*states_NLD.shape[:2], 1))], 2)
    weights = np.linalg.lstsq(
        design[:half].reshape(-1, design.shape[2]), beliefs_NLS[:half].reshape(-1, beliefs_NLS.shape[2]), rcond=None
    )[0]
    truth, decoded = beliefs_NLS[half:], design[half:] @ weights
    missed = ((truth - decoded) ** 2).sum((1, 2))
    spread = ((truth - truth.mean((0, 1))) ** 2).sum((1, 2))
    chance = np.random.Generator(np.random.PCG64(SEED))
    drawn = chance.integers(0, len(truth), (RESAMPLES, len(truth)))
    resampled = 1 - missed[drawn].sum(1) / spread[drawn].sum(1)
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    r2 = {"value": float(1 - missed.sum() / spread.sum()), "low": low, "high": high, "trials": len(truth)}
    size = truth.shape[2]
    return r2, decoded.reshape(-1, size)[:SHOWN], truth.reshape(-1, size)[:SHOWN]


def distances(states_NLD: NDArray[np.float64], beliefs_NLS: NDArray[np.float64]) -> tuple[float | None, float, int]:
    """(near, apart, number of near pairs): see the module. Histories at the same position of different samples.

    Near pairs are neighbours in the order of a random projection of the posteriors, kept if they nearly agree.
    """
    chance = np.random.Generator(np.random.PCG64(SEED))
    unit = np.sqrt((states_NLD**2).mean()) * np.sqrt(states_NLD.shape[2])
    near: list[float] = []
    apart: list[float] = []
    for position in range(1, states_NLD.shape[1]):
        states, beliefs = states_NLD[:, position], beliefs_NLS[:, position]
        order = np.argsort(beliefs @ chance.normal(size=beliefs.shape[1]), kind="stable")
        first, second = order[:-1], order[1:]
        differs = 0.5 * np.abs(beliefs[first] - beliefs[second]).sum(1)
        agree = differs < NEAR
        gaps = np.linalg.norm(states[first] - states[second], axis=1) / unit
        near += gaps[agree].tolist()[:PAIRS]
        shuffled = chance.permutation(len(states))
        apart += (np.linalg.norm(states - states[shuffled], axis=1) / unit).tolist()
    return (float(np.mean(near)) if near else None), float(np.mean(apart)), len(near)


def plane(points: NDArray[np.float64], of: NDArray[np.float64]) -> list[list[float]]:
    """Points in the plane: a triangle for three states, else the two directions in which `of` varies most."""
    if of.shape[1] == 3:
        corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
        return np.round(points @ corners, 5).tolist()
    middle = of.mean(0)
    directions = np.linalg.svd(of - middle, full_matrices=False)[2][:2]
    return np.round((points - middle) @ directions.T, 5).tolist()


def headline(result: dict[str, Any]) -> dict[str, float]:
    """R², ranks and distances."""
    numbers = {"linear R²": result["r2"]["value"], "effective rank": result["effective_rank"]}
    if result["near"] is not None:
        numbers["near / apart"] = result["near"] / result["apart"]
    return numbers | {"excess loss": result["excess_loss"]}


def table(result: dict[str, Any]) -> Table:
    """For the console."""
    rows = Table(title="belief", title_justify="left", show_header=False)
    r2, near = result["r2"], result["near"]
    rows.add_row("linear R² of the posterior", f"{r2['value']:.4f}  ({r2['low']:.4f} – {r2['high']:.4f})")
    rows.add_row("effective rank of the states", f"{result['effective_rank']:.2f}")
    rows.add_row("effective rank of the posteriors", f"{result['effective_rank_of_posteriors']:.2f}")
    if near is not None:
        rows.add_row("distance at equal beliefs / at random", f"{near:.3f} / {result['apart']:.3f}")
    rows.add_row("loss above the least possible", f"{result['excess_loss']:.4f} nats")
    return rows


def picture(result: dict[str, Any]) -> Figure:
    """The posteriors, the same decoded from hidden states, and the spectra."""
    figure = Figure(figsize=(11, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3)
    points = result["points"]
    true = np.array(points["true"])
    colours = np.array(points["colours"])
    colours = np.pad(colours, ((0, 0), (0, 3 - colours.shape[1])))
    for axes, key, title in ((panels[0], "true", "exact posterior"), (panels[1], "decoded", "read from hidden states")):
        place = np.array(points[key])
        axes.scatter(place[:, 0], place[:, 1], c=np.clip(colours / colours.max(), 0, 1), s=2, linewidths=0)
        axes.set_title(title, loc="left", color=INK, fontsize=11)
        margin = 0.05 * np.ptp(true, axis=0) + 1e-6
        axes.set_xlim(true[:, 0].min() - margin[0], true[:, 0].max() + margin[0])
        axes.set_ylim(true[:, 1].min() - margin[1], true[:, 1].max() + margin[1])
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal")
    style(panels[2])
    panels[2].set_title("singular values, share of their sum", loc="left", color=INK, fontsize=11)
    panels[2].semilogy(range(1, len(result["spectrum"]) + 1), result["spectrum"], color=ACCENT, label="hidden states")
    spectrum = [value for value in result["spectrum_of_posteriors"] if value > 1e-12]
    panels[2].semilogy(range(1, len(spectrum) + 1), spectrum, "o", color=INK, markersize=4, label="posteriors")
    panels[2].legend(frameon=False)
    return figure


def check(subject: Subject, dataset: Dataset, limit: int | None) -> None:
    """Needs a data set of a hidden Markov model."""
    test_task(dataset, Belief)


BELIEF = Suite(measure, table, picture, check, headline)
