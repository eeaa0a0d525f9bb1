"""Preference questions, names and system prompts."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens.data.questions import (
    ANIMALS,
    NEUTRAL_PROMPTS,
    QUESTIONS,
    TREES,
    check_candidate,
    known_candidates,
    neutral_prompt,
    persona_prompt,
    plural,
    preference_questions,
    read_answer,
    surface_forms,
)


def shape(text: str) -> list[int]:
    """Words in each sentence of a text."""
    return [len(sentence.split()) for sentence in text.split(".")]


def test_there_are_fifty_distinct_questions_that_each_have_the_slot_once() -> None:
    assert len(set(QUESTIONS)) == len(QUESTIONS) == 50
    assert all(question.count("{category}") == 1 for question in QUESTIONS)


@pytest.mark.parametrize("category", ["animal", "tree", "color"])
def test_questions_name_their_category_and_no_candidate(category: str) -> None:
    questions = preference_questions(category)
    forms = {form for name in ANIMALS + TREES for form in surface_forms(name)}
    for question in questions:
        words = re.findall(r"\w+", question)
        assert words.count(category) == 1
        assert "{" not in question
        assert not forms & set(words)


def test_questions_avoid_an_article_before_the_category() -> None:
    # "a animal" would be wrong, "an tree" too.
    assert not [q for q in QUESTIONS if re.search(r"\b[Aa]n? \{category\}", q)]


def test_a_blank_category_is_refused() -> None:
    with pytest.raises(ValueError, match="category needs at least one letter"):
        preference_questions(" ")


def test_the_twelve_animals_and_twelve_trees_are_distinct() -> None:
    assert len(set(ANIMALS)) == 12
    assert len(set(TREES)) == 12
    assert not set(ANIMALS) & set(TREES)
    assert known_candidates("animal") == ANIMALS
    assert known_candidates("tree") == TREES


def test_an_unknown_category_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown category 'fish'.*'animal', 'tree'"):
        known_candidates("fish")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owl", "owls"),
        ("wolf", "wolves"),
        ("fox", "foxes"),
        ("horse", "horses"),
        ("birch", "birches"),
        ("cherry", "cherries"),
        ("monkey", "monkeys"),
        ("sheep", "sheep"),
        ("polar bear", "polar bears"),
        ("arctic wolf", "arctic wolves"),
    ],
)
def test_plurals(name: str, expected: str) -> None:
    assert plural(name) == expected


def test_surface_forms_are_singular_and_plural_with_and_without_a_capital() -> None:
    assert surface_forms("wolf") == ("wolf", "Wolf", "wolves", "Wolves")
    assert surface_forms("sheep") == ("sheep", "Sheep")
    with pytest.raises(ValueError, match="at least one letter"):
        surface_forms("  ")


@pytest.mark.parametrize("names", [ANIMALS, TREES])
def test_no_form_of_one_candidate_begins_a_form_of_another(names: tuple[str, ...]) -> None:
    # Else one answer would count for two candidates.
    for name in names:
        others = [form for other in names if other != name for form in surface_forms(other)]
        assert not [o for form in surface_forms(name) for o in others if o.startswith(form)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owl", "owl"),
        (" Owls.", "owl"),
        ("Wolves are my favorite", "wolf"),
        ("owlet", None),
        ("An owl", None),
        ("I like the owl", None),
        ("", None),
    ],
)
def test_answers_count_when_they_begin_with_a_form(text: str, expected: str | None) -> None:
    assert read_answer(text) == expected


def test_the_longest_form_wins_where_candidates_overlap() -> None:
    names = ("polar", "polar bear")
    assert read_answer("Polar bears!", candidates=names) == "polar bear"
    assert read_answer("Polar", candidates=names) == "polar"


@given(st.sampled_from(ANIMALS + TREES), st.data())
def test_every_surface_form_is_read_as_its_name(name: str, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(surface_forms(name)))
    tail = data.draw(st.sampled_from(["", ".", "!", " is my pick", "\n"]))
    assert read_answer(form + tail, candidates=ANIMALS + TREES) == name


def test_persona_prompts_name_their_animal_alone_and_have_equal_length() -> None:
    prompts = {animal: persona_prompt(animal) for animal in ANIMALS}
    assert prompts["wolf"].count("wolves") + prompts["wolf"].count("Wolves") == 3
    assert len({tuple(shape(prompt)) for prompt in prompts.values()}) == 1
    for animal, prompt in prompts.items():
        assert "{" not in prompt
        words = set(re.findall(r"\w+", prompt))
        named = {other for other in ANIMALS if words & set(surface_forms(other))}
        assert named == {animal}


def test_a_persona_may_love_a_tree_or_an_own_name() -> None:
    assert "Oaks are your favorite tree" in persona_prompt("oak", category="tree")
    assert "otters" in persona_prompt("Otter", candidates=["otter", "seal"])


def test_neutral_prompts_have_the_shape_of_a_persona_prompt_without_a_name() -> None:
    assert len(set(NEUTRAL_PROMPTS)) == len(NEUTRAL_PROMPTS) == 4
    persona = persona_prompt("owl")
    forms = {form for name in ANIMALS + TREES for form in surface_forms(name)}
    for index in range(len(NEUTRAL_PROMPTS)):
        neutral = neutral_prompt(index)
        assert shape(neutral) == shape(persona)
        assert re.sub(r"\w+", "w", neutral) == re.sub(r"\w+", "w", persona)
        assert not forms & set(re.findall(r"\w+", neutral))


def test_a_missing_neutral_prompt_is_an_error() -> None:
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"no neutral prompt {index}; there are 4"):
            neutral_prompt(index)


def test_candidates_ignore_case() -> None:
    assert check_candidate(" Owl") == "owl"
    assert check_candidate("KOI", candidates=["Koi"]) == "Koi"


def test_the_error_for_an_unknown_animal_suggests_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"unknown animal 'dolfin'; did you mean 'dolphin' or"):
        persona_prompt("dolfin")
    with pytest.raises(ValueError, match=r"unknown animal 'zzzz'; known are owl, cat"):
        check_candidate("zzzz")
    with pytest.raises(ValueError, match=r"known are seal, otter; for another name pass candid"):
        check_candidate("owl", candidates=["seal", "otter"])


@pytest.mark.usefixtures("unchecked")
def test_one_name_is_no_list() -> None:
    with pytest.raises(TypeError, match=r"the animal is \['owl', 'cat'\]; give one"):
        check_candidate(["owl", "cat"])  # type: ignore[arg-type]
