"""Bad input to find_divergence: each error names the value."""

from dataclasses import replace

import pytest
import torch

from divergence_lens.divergence import (
    find_divergence,
)
from divergence_lens.divergence import reading as _reading
from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example
from divergence_lens.models import load_model
from divergence_lens.teachers import Teacher
from tests.support.divergence import (
    CAT,
    OWL,
    WOLF,
)
from tests.support.models import chat_tokenizer, random_hf_model


def test_progress_is_shown_only_when_asked_for(model, examples, capsys):
    find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT])
    quiet = capsys.readouterr()
    assert quiet.out == quiet.err == ""
    find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT], progress=True)
    assert "tokens/s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("counterfactuals", "message"),
    [
        ([], "no counterfactual teachers"),
        ([CAT, OWL], "'owl' is among the counterfactuals"),
        ([CAT, Teacher("owl", system_prompt="other")], "two teachers are named 'owl'"),
        ([CAT, WOLF, Teacher("cat", system_prompt="other")], "two teachers are named 'cat'"),
    ],
)
def test_impossible_teachers_are_refused(counterfactuals, message, model, examples):
    with pytest.raises(ValueError, match=message):
        find_divergence(model, examples, teacher=OWL, counterfactuals=counterfactuals)


def test_a_counterfactual_that_equals_the_teacher_warns(model, examples):
    """Such as `Teacher("finetuned")` without its model: nothing could diverge."""
    with pytest.warns(UserWarning, match="'twin' has the system prompt and the weights of"):
        div = find_divergence(
            model, examples, teacher=OWL, counterfactuals=[CAT, replace(OWL, name="twin")]
        )
    assert div.differs[0].any()
    assert not div.differs[1][div.agrees].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "owl"}, "teacher is 'owl', not a Teacher"),
        ({"counterfactuals": ["cat"]}, r"counterfactuals\[0\] is 'cat', not a Teacher"),
        ({"counterfactuals": CAT}, r"write counterfactuals=\[\.\.\.\], a list"),
        ({"model": torch.nn.Linear(1, 1)}, "expected a HookedTransformer or a TransformerBridge"),
    ],
)
def test_what_is_no_teacher_or_model_is_refused(
    options,
    message,
    model,
    examples,
    unchecked,
):
    given = {"model": model, "teacher": OWL, "counterfactuals": [CAT], **options}
    with pytest.raises(TypeError, match=message):
        find_divergence(given.pop("model"), examples, **given)


@pytest.mark.parametrize("options", [{"rule": "most"}, {"rule": 2}, {"min_margin": -1.0}])
def test_an_impossible_rule_is_refused_before_anything_is_read(
    options, model, examples, tmp_path, monkeypatch
):
    monkeypatch.setattr(_reading, "read_hidden", None)  # what reads would fail
    with pytest.raises(ValueError, match=r"unknown rule|min_margin must be"):
        find_divergence(
            model,
            examples,
            teacher=OWL,
            counterfactuals=[CAT],
            checkpoint_dir=tmp_path / "run",
            **options,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Example("Name.", ""), "example 1 has an empty completion"),
        (Example("Name.", "x", ()), "example 1 has an empty completion"),
        (Example("Name.", "x", (3, 10**6)), "example 1 has the token id 1000000"),
        (Example("Name.", "x", (5,) * 300), r"example 1 is \d+ tokens long under teacher 'owl'"),
        (Example("owl " * 200, "x", (5,)), r"example 1 is \d+ tokens long"),
    ],
)
def test_impossible_examples_are_named(row, message, model):
    with pytest.raises(ValueError, match=message):
        find_divergence(model, [Example("a", "b", (4,)), row], teacher=OWL, counterfactuals=[CAT])


def test_empty_data_is_refused(model):
    with pytest.raises(ValueError, match="data is empty"):
        find_divergence(model, [], teacher=OWL, counterfactuals=[CAT])


def test_a_batch_of_no_tokens_is_refused(model, examples):
    with pytest.raises(ValueError, match="batch_tokens must be 1 or more, got 0"):
        find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT], batch_tokens=0)


def test_dropout_in_training_mode_is_refused():
    tokenizer = chat_tokenizer()
    hf = random_hf_model("gpt2", 0, vocab=len(tokenizer), resid_pdrop=0.1)
    model = load_model(hf, backend="bridge", tokenizer=tokenizer)
    data = [Example("a", "b", (4,))]
    find_divergence(model, data, teacher=OWL, counterfactuals=[CAT])
    model.train()
    with pytest.raises(ValueError, match=r"training mode and .* drops 10%.*model\.eval"):
        find_divergence(model, data, teacher=OWL, counterfactuals=[CAT])


def test_attention_dropout_in_training_mode_is_refused():
    layer = torch.nn.Module()
    layer.attention_dropout = 0.2
    model = torch.nn.Sequential(layer)
    with pytest.raises(ValueError, match="0 drops 20%"):
        _reading.refuse_dropout(model)
    _reading.refuse_dropout(model.eval())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_the_example(value, model, examples, monkeypatch):
    engine = get_engine(model)
    final = engine.final

    def broken(tokens, past=None, *, since=0):
        hidden = final(tokens, past, since=since).clone()
        # The row of example 3 alone, recognised by its own tokens.
        ids = torch.tensor(examples[3].completion_ids[:-1])
        for row, line in enumerate(tokens):
            if any(torch.equal(w, ids) for w in line.unfold(0, len(ids), 1)):
                hidden[row] = value
        return hidden

    monkeypatch.setattr(engine, "final", broken)
    with pytest.raises(ValueError, match="logits of example 3 are not finite"):
        find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT])


def test_fields_that_do_not_fit_are_refused(div):
    with pytest.raises(ValueError, match=r"offsets .* do not fit 11 examples"):
        replace(div, examples=div.examples[:-1])
    with pytest.raises(ValueError, match="4 teachers do not fit one factual and 2"):
        replace(div, counterfactuals=div.counterfactuals[:-1])
