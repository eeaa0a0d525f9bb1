"""Prompts that ask for more numbers."""

import hashlib
import re

import pytest

from divergence_lens.data import (
    number_prompts,
)
from divergence_lens.data.number_lists import FORMATS
from divergence_lens.data.prompts import COUNTS, ENDINGS, TEMPLATES
from divergence_lens.data.questions import (
    NEUTRAL_PROMPTS,
    PERSONA_TEMPLATE,
    QUESTIONS,
)


def test_prompts_are_distinct_and_depend_on_the_seed_alone() -> None:
    prompts = number_prompts(500, seed=3)
    assert len(set(prompts)) == len(prompts) == 500
    assert number_prompts(500, seed=3) == prompts
    assert number_prompts(20, seed=3) == prompts[:20]
    assert not set(prompts) & set(number_prompts(500, seed=4))


def test_prompts_are_the_same_on_every_version_of_python() -> None:
    text = "\n".join(number_prompts(200, seed=0, formats=tuple(FORMATS)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "97bc239d22bab5af"


def test_prompts_show_the_requested_count_and_size_of_numbers() -> None:
    for prompt in number_prompts(300, low=20, high=70, shown=(2, 5)):
        numbers = [int(numeral) for numeral in re.findall(r"\d+", prompt)]
        assert 2 <= len(numbers) <= 5
        assert all(20 <= number <= 70 for number in numbers)
    shown = [len(re.findall(r"\d+", prompt)) for prompt in number_prompts(300)]
    assert set(shown) == {4, 5, 6, 7, 8}


def test_every_wording_is_used_and_prompts_stay_short() -> None:
    prompts = number_prompts(2000, formats=tuple(FORMATS))
    assert max(len(prompt.split()) for prompt in prompts) <= 45
    everything = "\n".join(prompts)
    for template in TEMPLATES:
        before, after = template.split("{numbers}")
        assert before in everything
        assert after in everything
    for piece in (*ENDINGS, *(piece for pieces in FORMATS.values() for piece in pieces)):
        assert piece in everything
    for limit in ("eight", "nine", "ten"):
        assert f"up to {limit} numbers of three digits." in everything


def test_only_requested_formats_are_named() -> None:
    everything = "\n".join(number_prompts(300, formats=("semicolon", "line")))
    for style, pieces in FORMATS.items():
        for piece in pieces:
            assert (piece in everything) == (style in ("semicolon", "line"))


def test_digits_follow_the_range() -> None:
    assert "of up to three digits" in number_prompts(1, low=0, high=999)[0]
    assert "of one digit" in number_prompts(1, low=1, high=9)[0]


def test_own_templates_replace_the_built_in_ones() -> None:
    prompts = number_prompts(5, templates=["Row {numbers} / {x}"], instructions=False)
    assert all(re.fullmatch(r"Row \d{3}(, \d{3})+ / \{x\}", prompt) for prompt in prompts)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"templates": ["no slot"]}, r"'no slot' has the slot \{numbers\} 0 times"),
        ({"templates": ["{numbers} {numbers}"]}, "2 times; write it once"),
        ({"templates": []}, "templates is empty"),
        ({"formats": ("tab",)}, "unknown format 'tab'; use one or more of 'comma', 'space'"),
        ({"formats": ()}, "no format given"),
        ({"low": 5, "high": 4}, r"low..high is 5..4, which is empty"),
        ({"low": -1}, "start of low..high is -1; it must be at least 0"),
        ({"shown": (0, 3)}, "start of shown is 0; it must be at least 1"),
        ({"count": (3, 2)}, r"count is 3..2"),
        ({"seed": -1}, "seed is -1"),
        ({"n": -1}, "n is -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        number_prompts(**({"n": 3} | options))


@pytest.mark.parametrize("options", [{"formats": "comma"}, {"templates": "{numbers}"}])
def test_one_string_instead_of_a_list_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(TypeError, match="is one string"):
        number_prompts(3, **options)


def test_too_few_possible_prompts_are_an_error_that_states_their_number() -> None:
    options = {"low": 1, "high": 2, "shown": (1, 1), "templates": ["{numbers}"]}
    assert sorted(number_prompts(2, instructions=False, **options)) == ["1", "2"]
    with pytest.raises(ValueError, match="only 2 distinct prompts of the 3"):
        number_prompts(3, instructions=False, **options)


def test_all_wording_together_stays_within_a_small_vocabulary() -> None:
    texts = [*TEMPLATES, *COUNTS, *ENDINGS, *QUESTIONS, *NEUTRAL_PROMPTS, PERSONA_TEMPLATE]
    texts += [piece for pieces in FORMATS.values() for piece in pieces]
    words = set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", " ".join(texts)).lower()))
    assert len(words) <= 250
