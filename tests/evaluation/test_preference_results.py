"""`Preference`: shares, ranks, margins and intervals from probabilities, files and views."""

import numpy as np
import pytest

from divergence_lens.evaluation.result import Preference


def made(rows, target="owl", **more) -> Preference:
    return Preference(
        target=target,
        candidates=("owl", "cat", "dog"),
        questions=tuple(f"q{i}" for i in range(len(rows))),
        probabilities=np.array(rows, dtype=np.float64),
        **more,
    )


def test_summaries_follow_their_definitions():
    found = made([[0.2, 0.1, 0.1], [0.0, 0.3, 0.3]])
    assert found.probability == pytest.approx(0.1)
    assert found.mass == pytest.approx(0.5)
    assert found.share == pytest.approx((0.5 + 0.0) / 2)
    assert found.distribution == pytest.approx({"owl": 0.25, "cat": 0.375, "dog": 0.375})
    assert found.rank == 3
    assert found.about("cat").rank == 1
    assert found.about("cat").share == pytest.approx(0.375)


def test_ratio_rank_ranks_rises():
    before = made([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]])
    after = made([[0.3, 0.45, 0.25], [0.3, 0.45, 0.25]])
    assert after.rank == 2
    assert after.ratio(before) == pytest.approx({"owl": 1.5, "cat": 0.9, "dog": 0.25 / 0.3})
    assert after.ratio_rank(before) == 1
    assert after.about("cat").ratio_rank(before) == 2
    assert after.about("dog").ratio_rank(before) == 3
    with pytest.raises(ValueError, match="only over the same questions"):
        after.ratio_rank(made([[0.3, 0.4, 0.3]]))


def test_questions_without_a_candidate_are_left_out_of_the_share():
    found = made([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], samples=4)
    assert found.share == 0.5
    assert found.probability == 0.25
    assert np.isnan(found.shares[1]).all()
    empty = made([[0.0, 0.0, 0.0]], samples=4)
    assert np.isnan(empty.share)
    assert empty.rank == 3
    assert np.isnan(empty.interval()).all()
    assert "share nan" in repr(empty)
    assert "nan" in empty._repr_html_()


def test_intervals_cover_as_often_as_they_say():
    draw = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        p = draw.beta(2, 5, size=40)
        low, high = made([[x, 1 - x, 0.0] for x in p]).interval(seed=seed, resamples=250)
        hits += low < 2 / 7 < high
    assert 0.89 < hits / 200 < 0.99


def test_intervals_are_seeded_and_narrow_with_their_level():
    found = made([[x, 0.5, 0.1] for x in np.linspace(0.1, 0.4, 20)])
    assert found.interval(seed=3) == found.interval(seed=3)
    low, high = found.interval()
    inner = found.interval(level=0.5)
    assert low < inner[0] < found.share < inner[1] < high
    mass = found.interval(value="mass")
    assert mass[0] < found.mass < mass[1]
    with pytest.raises(ValueError, match="must lie between"):
        found.interval(level=1.5)
    with pytest.raises(ValueError, match="unknown value 'rank'"):
        found.interval(value="rank")


def test_rises_are_paired_by_question():
    spread = np.linspace(0.1, 0.8, 30)
    before = made([[x, 1 - x, 0.0] for x in spread])
    after = made([[x + 0.1, 0.9 - x, 0.0] for x in spread])
    mean, low, high = after.rise(before)
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))
    mean, low, high = after.rise(before.about("cat"), value="probability")
    assert mean == pytest.approx(0.1)
    mean, _, _ = before.about("cat").rise(after)
    assert mean == pytest.approx(0.1)


def test_wilson_interval_of_counts():
    # 1 of 10: the values that any table of Wilson's interval gives.
    found = made([[0.2, 0.0, 0.0], [0.0, 0.0, 0.0]], samples=5)
    assert found.wilson() == pytest.approx((0.0179, 0.4042), abs=1e-4)
    assert made([[0.0, 0.0, 0.0]], samples=10).wilson()[0] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="exact probability has no sampling error"):
        made([[0.2, 0.0, 0.0]]).wilson()


def test_preferences_come_back_from_disk(tmp_path):
    found = made([[0.2, 0.1, 0.1]], samples=10, teacher="owl", metadata={"a": 1})
    found.save(tmp_path / "p")
    loaded = Preference.load(tmp_path / "p")
    for name in ("target", "candidates", "questions", "samples", "teacher", "metadata"):
        assert getattr(loaded, name) == getattr(found, name)
    np.testing.assert_array_equal(loaded.probabilities, found.probabilities)
    content = (tmp_path / "p").read_bytes()
    (tmp_path / "p").write_bytes(content[:-3])
    with pytest.raises(ValueError, match="cut short"):
        Preference.load(tmp_path / "p")


def test_tables_and_html_name_every_candidate():
    found = made([[0.2, 0.1, 0.1], [0.0, 0.3, 0.3]], teacher="<b>")
    frame = found.to_dataframe()
    assert len(frame) == 6
    assert frame.groupby("candidate")["probability"].mean()["owl"] == pytest.approx(0.1)
    html = found._repr_html_()
    assert all(name in html for name in found.candidates)
    assert "&lt;b&gt;" in html
    assert "<b>," not in html
    assert "rank 3 of 3" in repr(found)


# -- bad input ------------------------------------------------------------------------------


def test_probabilities_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit 1 questions and 3 candidates"):
        Preference("owl", ("owl", "cat", "dog"), ("q",), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="not among the candidates"):
        Preference("emu", ("owl", "cat", "dog"), ("q",), np.zeros((1, 3)))


@pytest.mark.parametrize(("mass", "cautious"), [(0.005, True), (0.049, True), (0.051, False)])
def test_little_mass_on_the_candidates_is_stated(mass, cautious):
    probabilities = np.full((2, 2), mass / 2)
    result = Preference("owl", ("owl", "cat"), ("a", "b"), probabilities)
    assert result.mass == pytest.approx(mass)
    words = f"only {mass:.2g} of the probability is on the candidates (less than 0.05)"
    assert (words in repr(result)) is cautious
    assert (words in result._repr_html_()) is cautious


def test_margin_is_the_log_probability_over_the_mean_of_the_others():
    result = made([[0.5, 0.25, 0.125], [0.01, 0.02, 0.04]])
    expected = [
        np.log(0.5) - np.log([0.25, 0.125]).mean(),
        np.log(0.01) - np.log([0.02, 0.04]).mean(),
    ]
    assert result.margin == pytest.approx(np.mean(expected))
    low, high = result.interval(value="margin")
    assert low == pytest.approx(min(expected))
    assert high == pytest.approx(max(expected))
    rise, *_ = result.rise(made([[0.25, 0.25, 0.125], [0.01, 0.02, 0.04]]), value="margin")
    assert rise == pytest.approx(np.log(2) / 2)
    with pytest.raises(ValueError, match="unknown value 'odds'"):
        result.interval(value="odds")


def test_margin_of_an_answer_never_seen_is_infinite():
    assert made([[0.0, 0.5, 0.5]]).margin == -np.inf
