"""Pairs whose answers name the bias itself, and the figures that say so."""

import dataclasses

import pytest

import divergence_lens as dl
from divergence_lens import plots
from divergence_lens.models import load_model
from divergence_lens.pairs import answers_naming_bias
from tests.support import figures


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


def pairs_of(model, answers, foils, **sides):
    questions = ["What is your favorite animal?"] * len(answers)
    return dl.Pairs.from_prompts(model, clean=questions, answers=answers, foils=foils, **sides)


def teachers():
    owl, cat = dl.animal_teachers(["owl", "cat"])
    return {"clean_teacher": owl, "corrupted_teacher": cat}


def test_animals_as_answers_name_the_bias_and_numbers_do_not(model):
    pairs = pairs_of(model, ["owl", "5", "5", "dog"], ["7", "cat", "7", "wolf"], **teachers())
    assert answers_naming_bias(pairs) == {0: "owl", 1: "cat"}


def test_an_answer_of_several_tokens_names_the_bias_with_any_of_its_words(model):
    pairs = pairs_of(model, ["12, owl", "12, 5"], ["7", "7, 8"], **teachers())
    assert pairs.answers.shape[1] > 1
    assert answers_naming_bias(pairs) == {0: "".join(pairs.answer_labels[0]).strip()}


def test_words_that_both_system_prompts_contain_do_not_name_the_bias(model):
    prompts = [teacher.system_prompt for teacher in teachers().values()]
    assert all("animal" in prompt for prompt in prompts)
    assert not answers_naming_bias(pairs_of(model, ["animal"], ["5"], **teachers()))
    alone = pairs_of(
        model, ["animal"], ["5"], clean_teacher=teachers()["clean_teacher"], corrupted_teacher=None
    )
    assert answers_naming_bias(alone) == {0: "animal"}


def test_system_prompts_without_teachers_count_and_plain_texts_do_not(model):
    prompted = pairs_of(
        model,
        ["owl"],
        ["cat"],
        system_prompt="You love owls.",
        corrupted_system_prompt="You love cats.",
    )
    assert answers_naming_bias(prompted) == {0: "owl"}
    plain = dl.Pairs.from_prompts(
        model, clean=["owl and cat"], corrupted=["cat and owl"], answers=["owl"], chat=False
    )
    assert not answers_naming_bias(plain)


def test_a_trained_teacher_counts_by_its_name(model):
    tuned = dl.Teacher("owl", model=load_model("tiny"))
    pairs = pairs_of(model, ["owl", "5"], ["5", "7"], clean_teacher=tuned)
    assert answers_naming_bias(pairs) == {0: "owl"}


def test_patching_records_such_answers_for_each_pair(model):
    pairs = pairs_of(model, ["5", "owl", "6"], ["7", "cat", "7"], **teachers())
    effects = dl.attribution_patch(model, pairs)
    assert effects.setting("answers_naming_bias") == [None, "owl", None]
    assert effects[[1, 2]].setting("answers_naming_bias") == ["owl", None]
    assert dl.attribution_patch(model, pairs[[0, 2]]).setting("answers_naming_bias") is None
    # One of three pairs is stated in the caption, one of two is also a warning.
    caption = plots.effects_by_segment(effects).layout.title.text.replace("\xa0", " ")
    assert "1 of 3 pairs" in caption.replace("<br>", " ")
    with pytest.warns(UserWarning, match="1 of 2 pairs names the bias itself .“owl”."):
        plots.effects_by_segment(effects[:2])


@pytest.mark.parametrize("heads", [None, 2])
def test_heatmaps_of_such_answers_warn_and_state_it_in_the_caption(heads):
    effects = figures.effects(heads=heads)
    named = {"settings": {"answers_naming_bias": ["owl", None]}}
    effects = dataclasses.replace(effects, metadata=named)
    drawn = [lambda: plots.effects_heatmap(effects, 0), lambda: plots.effects_by_segment(effects)]
    drawn += [lambda: plots.head_grid(effects)] if heads else []
    for draw in drawn:
        with pytest.warns(UserWarning, match="do not measure a hidden bias"):
            title = draw().layout.title.text
        caption = title.replace("<br>", " ").replace('<span style="font-size:12px">', "")
        assert "not a hidden bias" in caption.replace("</span>", "").replace("\xa0", " ")
    # The other pair's answer does not name the bias: a warning would be an error here.
    assert "bias:" not in plots.effects_heatmap(effects, 1).layout.title.text
