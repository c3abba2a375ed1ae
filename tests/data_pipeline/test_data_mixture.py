from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import quiet
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import Dataset, Stream, UserError, open_mixture
from data_pipeline.mixture import (
    WHOLE,
    Mixture,
    Phase,
    anneal,
    by_epochs,
    by_phases,
    by_weights,
    largest_remainder,
    share,
)
from data_pipeline.prepare import prepare

WEIGHTS = st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=9).filter(lambda w: sum(w) > 0.01)
PLACES = st.integers(0, 10**12)


@given(n=st.integers(0, 2**50), whole=st.integers(1, 2**50 - 1), data=st.data())
def test_share_is_exact(n: int, whole: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(0, whole))
    expected = (2 * n * part + whole) // (2 * whole)  # Python's integers have no size
    assert int(share(np.array([n]), part, whole)[0]) == expected


def test_share_is_exact_where_floating_point_is_not() -> None:
    chance = np.random.default_rng(0)
    whole = 2**50 - 1
    places = chance.integers(0, 2**61, 2000)
    for part in (1, 2**49, whole - 2, int(chance.integers(0, whole))):
        expected = [(2 * int(n) * part + whole) // (2 * whole) for n in places]
        assert share(places, part, whole).tolist() == expected


@given(weights=WEIGHTS, start=PLACES)
@settings(deadline=None)
def test_walking_and_jumping_agree_and_each_source_is_read_in_its_order(weights: list[float], start: int) -> None:
    mixture = by_weights(weights)
    source, index = mixture.locate(np.arange(start, start + 60))
    counts = mixture.counts(start)
    assert counts.sum() == start
    for step in range(60):
        one, at = mixture.locate(np.array([start + step]))
        assert (one[0], at[0]) == (source[step], index[step])
        assert index[step] == counts[source[step]]
        counts[source[step]] += 1
    assert np.array_equal(mixture.counts(start + 60), counts)


@given(weights=WEIGHTS, place=PLACES)
def test_shares_are_exact_at_every_prefix(weights: list[float], place: int) -> None:
    """Off by half a sample for each level of the tree, and what 2⁻⁴⁰ of the weights amounts to."""
    counts = by_weights(weights).counts(place)
    exact = np.array([float(Fraction(w) / sum(map(Fraction, weights)) * place) for w in weights])
    levels = (len(weights) - 1).bit_length()
    assert np.abs(counts - exact).max() <= 0.5 * levels + 2 + place * 9 / WHOLE
    assert all(count == 0 for count, weight in zip(counts, weights, strict=True) if weight == 0)


@given(
    sizes=st.lists(st.integers(2, 10**9), min_size=1, max_size=6),
    epochs=st.lists(st.sampled_from([0.5, 1, 2, 3.25, 7]), min_size=6, max_size=6),
)
def test_epochs_come_out_even(sizes: list[int], epochs: list[float]) -> None:
    mixture = by_epochs(epochs[: len(sizes)], sizes)
    wanted = [round(number * size) for number, size in zip(epochs, sizes, strict=False)]
    for turns in (1, 2, 5):
        counts = mixture.counts(turns * sum(wanted))
        assert np.abs(counts - turns * np.array(wanted)).max() <= (0 if turns == 1 else 8)


@given(st.data())
@settings(deadline=None)
def test_phases_leave_no_drift(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    weights = st.lists(st.sampled_from([0.0, 0.1, 1 / 3, 1.0, 5.0]), min_size=count, max_size=count)
    lengths = st.integers(1, 50)
    phases = [
        Phase(tuple(w), n)
        for w, n in data.draw(st.lists(st.tuples(weights.filter(any), lengths), min_size=1, max_size=20))
    ]
    mixture = by_phases([*phases, Phase(phases[0].weights)])
    exact, place = np.zeros(count), 0
    for phase in phases:
        before = mixture.counts(place)
        place += phase.samples or 0
        exact += np.array(phase.weights) / sum(phase.weights) * (phase.samples or 0)
        added = mixture.counts(place) - before
        assert added.sum() == phase.samples and (added[np.array(phase.weights) == 0] == 0).all()
    # What a source without weight is owed it gets later, so a bound is only kept where all have some.
    if all(all(phase.weights) for phase in phases):
        assert np.abs(mixture.counts(place) - exact).max() < 2
    source, index = mixture.locate(np.arange(place + 40))
    for number in range(count):
        assert index[source == number].tolist() == list(range(int((source == number).sum())))


def test_many_short_phases_add_up() -> None:
    """A third of 7 samples cannot be had in one phase; what a source is owed it gets in the next."""
    mixture = by_phases([Phase((1.0, 1.0, 1.0), 7)] * 300)
    assert np.abs(mixture.counts(7 * 299) - 7 * 299 / 3).max() < 2


@given(
    shares=st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(lambda s: sum(s) > 1),
    total=st.integers(1, 10**6),
)
def test_largest_remainder(shares: list[float], total: int) -> None:
    wanted = np.array(shares) / sum(shares) * total
    whole = largest_remainder(wanted, total)
    assert whole.sum() == total and np.abs(whole - wanted).max() < 1 + 1e-6 and (whole >= 0).all()


def test_weights_at_the_ends_of_floating_point() -> None:
    for large in ([1.7e308, 1.7e308], [5e-324, 5e-324]):
        assert by_weights(large).counts(1000).tolist() == [500, 500]
    assert by_weights([1e300, 1e-300]).counts(1000).tolist() == [1000, 0]


def test_annealing_moves_from_one_mixture_to_the_other() -> None:
    mixture = by_phases([*anneal([1, 0], [0, 1], 64_000), Phase((0.0, 1.0))])
    counts = np.array([mixture.counts(n * 6400)[1] for n in range(11)])
    assert np.abs(counts - [320 * n * n for n in range(11)]).max() < 30  # n² / 2N of a straight line
    assert (mixture.locate(np.arange(64_000, 65_000))[0] == 1).all()


def test_mixtures_are_pinned() -> None:
    """Resuming a run with another version must go on with the same samples."""
    mixture = by_phases([*anneal([0.7, 0.2, 0.1], [0.1, 0.2, 0.7], 6_000), Phase((0.5, 0.3, 0.2))])
    places = np.stack(mixture.locate(np.arange(10_000))).astype("<i8")
    assert hashlib.sha256(places.tobytes()).hexdigest() == (
        "c722447014229361f75e59ad7a64746029b81266a502c1a67218f6d59c63d4df"
    )


def test_a_place_far_away_costs_no_more() -> None:
    mixture = by_weights(np.arange(1.0, 65.0).tolist())
    began = time.perf_counter()
    source, _ = mixture.locate(np.arange(10**12, 10**12 + 4096))
    assert time.perf_counter() - began < 0.5 and len(set(source.tolist())) == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: by_weights([]), "at least one above 0"),
        (lambda: by_weights([0.0, 0.0]), "at least one above 0"),
        (lambda: by_weights([1.0, -1.0]), "numbers of 0 or more"),
        (lambda: by_weights([1.0, float("nan")]), "numbers of 0 or more"),
        (lambda: by_epochs([1.0], [5, 5]), "for each source"),
        (lambda: by_epochs([1e-9, 1e-9], [5, 5]), "less than one sample together"),
        (lambda: by_epochs([1e18, 1.0], [5, 5]), "fewer than 1,125,899,906,842,624"),
        (lambda: by_phases([Phase((1.0,), 1 << 50), Phase((1.0,))]), "fewer than"),
        (lambda: by_phases([Phase((1.0,)), Phase((1.0,))]), "a length for every phase"),
        (lambda: by_phases([Phase((1.0,), 0), Phase((1.0,))]), "give 1 or more"),
        (lambda: by_phases([Phase((1.0,), 5), Phase((1.0, 2.0))]), "every phase must name every source"),
    ],
)
def test_mixtures_that_are_none(make: Callable[[], Mixture], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


# ---- streams of mixtures


@pytest.fixture(scope="module")
def paths(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three data sets in bytes, of 67, 67 and 66 documents."""
    out = tmp_path_factory.mktemp("mixture")
    for number in range(3):
        prepare(str(corpus / f"part{number}"), "bytes", out / str(number), workers=1, validation=0.0, console=quiet())
    return [str(out / str(number)) for number in range(3)]


SIZES: dict[str, Any] = {"seed": 3, "sequence_length": 32, "global_sequences": 12}


def test_rows_are_the_windows_of_their_source(paths: list[str]) -> None:
    weights = [0.5, 0.2, 0.3]
    stream = open_mixture([{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)], **SIZES)
    alone = [Stream(split, **SIZES) for split in stream.splits]
    counts = np.zeros(3)
    for step in range(120):
        numbers, batch = stream.sample_numbers(step), stream.batch(step)
        for row, (_, sample, source) in enumerate(numbers.tolist()):
            expected = alone[source].split.read(sample * 32, sample * 32 + 33)
            assert np.array_equal(batch.tokens[row], expected)
            counts[source] += 1
        assert np.abs(counts - np.array(weights) * 12 * (step + 1)).max() <= 2
    parts = [stream.batch(7, rank, 3).tokens for rank in range(3)]
    assert np.array_equal(np.concatenate(parts), stream.batch(7).tokens)


def test_sources_of_one_size_are_read_in_orders_of_their_own(paths: list[str]) -> None:
    stream = open_mixture([{"path": paths[0], "weight": 1}, {"path": paths[0], "weight": 1}], **SIZES)
    numbers = np.concatenate([stream.sample_numbers(step) for step in range(20)])
    a, b = (numbers["sample"][numbers["source"] == source] for source in (0, 1))
    assert (a[:100] == b[:100]).sum() < 10


def test_each_source_of_a_mixture_is_seen_once_per_epoch(paths: list[str]) -> None:
    stream = open_mixture([{"path": p, "epochs": e} for p, e in zip(paths, (1, 2, 3), strict=True)], **SIZES)
    total = sum(e * s.count for e, s in zip((1, 2, 3), stream.samples, strict=True))
    numbers = np.concatenate([stream.sample_numbers(step) for step in range(total // 12 + 1)])[:total]
    for source, epochs in enumerate((1, 2, 3)):
        for epoch in range(epochs):
            seen = numbers["sample"][(numbers["source"] == source) & (numbers["epoch"] == epoch)]
            assert sorted(seen) == list(range(stream.samples[source].count))


def test_documents_of_a_mixture_are_numbered_through(paths: list[str]) -> None:
    stream = open_mixture([{"path": p, "weight": 1} for p in paths], **SIZES)
    found = stream.documents(0)
    borders = np.cumsum([0] + [split.documents for split in stream.splits])
    for source, samples in enumerate(stream.samples):
        numbers = stream.sample_numbers(0)
        own = samples.documents(numbers["sample"][numbers["source"] == source]) + borders[source]
        assert np.array_equal(found[(found >= borders[source]) & (found < borders[source + 1])], own)


def test_a_schedule_of_weights(paths: list[str]) -> None:
    schedule = [{"tokens": 32 * 120, "weights": [1, 0, 0]}, {"tokens": 32 * 64, "weights": [1, 0, 0], "to": [0, 0, 1]}]
    stream = open_mixture([{"path": p} for p in paths], schedule=[*schedule, {"weights": [0, 1, 0]}], **SIZES)
    sources = np.concatenate([stream.sample_numbers(step)["source"] for step in range(30)])
    assert set(sources[:120]) == {0} and set(sources[184:]) == {1} and set(sources[130:180]) == {0, 2}


def test_sources_that_do_not_go_together(paths: list[str], corpus: Path, tmp_path: Path) -> None:
    prepare(str(corpus), "train:sentencepiece:300", tmp_path / "other", workers=1, console=quiet())
    for sources, message in [
        ([], "needs sources"),
        ([{"path": paths[0]}], "a weight for every source"),
        ([{"path": paths[0], "weight": 1}, {"path": paths[1], "epochs": 1}], "a weight for every source"),
        ([{"path": p, "weight": 1} for p in (paths[0], str(tmp_path / "other"))], "another tokenizer"),
    ]:
        with pytest.raises(UserError, match=message):
            open_mixture(sources, **SIZES)
    with pytest.raises(UserError, match="groups only with a single"):
        open_mixture([{"path": p, "weight": 1} for p in paths], groups=2, **SIZES)


def test_one_source_of_weight_one_is_the_plain_stream(dataset: Dataset) -> None:
    plain = Stream(dataset.split("train"), **SIZES)
    mixed = open_mixture([{"path": str(dataset.path), "weight": 3}], **SIZES)
    for step in (0, 1, 500):
        assert np.array_equal(plain.sample_numbers(step), mixed.sample_numbers(step))
