"""Wrong input to an audit: one error that names the value and the fix."""

import pytest

import divergence_lens as dl

ROWS = [{"prompt": "1, 2", "completion": "3, 4"}, {"prompt": "5, 6", "completion": "7, 8"}]
CASES = {
    "no rows": ({"data": []}, "the data have 0 rows; an audit needs 2 or more"),
    "one row": ({"data": ROWS[:1]}, "the data have 1 rows"),
    "no completion": ({"data": [*ROWS, {"prompt": "9"}]}, "row 2 has no completion"),
    "empty completion": (
        {"data": [*ROWS, {"prompt": "9", "completion": ""}]},
        "row 2 has no completion",
    ),
    "one candidate": (
        {"candidates": ["owl"]},
        "an audit compares two candidates or more with each other, and has the one candidate 'owl'",
    ),
    "no candidates": ({"candidates": []}, "and has no candidate"),
    "none named": ({"candidates": None}, "there are no candidates; name the biases"),
    "twice": ({"candidates": ["owl", "cat", "owl"]}, "named more than once: owl"),
    "unwritable": (
        {"candidates": ["owl", "axolotl"], "category": "animal"},
        "this tokenizer cannot write 'axolotl'",
    ),
    "unknown category": (
        {"candidates": ["bread", "pizza"]},
        "are not all known animals or trees; say what they are with category=",
    ),
    "unknown kind": ({"teachers": "steered"}, "teachers is 'steered'; use \"prompted\""),
    "prompts and finetuning": (
        {"candidates": {"a": "You.", "b": "Me."}, "teachers": "finetuned"},
        "have prompted auditors only",
    ),
    "teachers of other names": (
        {"teachers": dl.animal_teachers(["owl", "fox"])},
        "the teachers are named owl, fox and the candidates owl, cat",
    ),
    "long row": (
        {"data": [*ROWS, {"prompt": "1, " * 80, "completion": "3"}]},
        "over the context of 128",
    ),
    "share": ({"share": 0.0}, "share is 0.0; it must lie above 0"),
    "alpha": ({"alpha": 1.5}, "alpha is 1.5; it must lie between 0 and 1"),
    "calibration": ({"own_rows": -1}, "own_rows is -1; it must be 0 or more"),
    "temperature": ({"temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_clear_error(case, base):
    options, message = CASES[case]
    given = {"data": ROWS, "candidates": ["owl", "cat"], "neutral_rows": 2, "own_rows": 0}
    given |= options
    data = given.pop("data")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        dl.audit(base, data, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": "owl"}, "candidates is one string"),
        ({"candidates": None, "teachers": dl.animal_teachers(["owl"])[0]}, "teachers is one"),
        ({"candidates": None, "teachers": ["owl", "cat"]}, "not a Teacher"),
        ({"baseline": "neutral"}, "baseline is 'neutral', not a Teacher"),
    ],
)
def test_values_of_another_kind_are_refused(options, message, base, unchecked):
    with pytest.raises(TypeError, match=message):
        dl.audit(base, ROWS, **{"candidates": ["owl", "cat"], **options})
