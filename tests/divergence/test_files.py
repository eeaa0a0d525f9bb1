"""Divergence files and decision points, written and read."""

import json

import numpy as np
import pytest
import torch

from divergence_lens.deltas.delta import Delta
from divergence_lens.divergence import (
    Divergence,
    find_divergence,
    read_decision_points,
)
from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher
from tests.support.divergence import (
    CAT,
    NOBODY,
    OWL,
    WOLF,
)


def test_saved_divergence_comes_back_whole(div, tmp_path, model):
    path = tmp_path / "div.safetensors"
    chosen = div.with_rule(rule=2, require_agreement=False, min_margin=0.1)
    chosen.save(path)
    loaded = Divergence.load(path)
    for name in ("offsets", "tokens", "predicted", "margin", "logprob"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(div, name))
        assert getattr(loaded, name).dtype == getattr(div, name).dtype
    for name in (
        "examples",
        "teacher",
        "counterfactuals",
        "rule",
        "min_margin",
        "texts",
        "special",
    ):
        assert getattr(loaded, name) == getattr(chosen, name)
    np.testing.assert_array_equal(loaded.mask, chosen.mask)
    assert loaded.metadata["versions"]["torch"] == torch.__version__
    assert loaded[0]._repr_html_() == chosen[0]._repr_html_()
    with pytest.raises(ValueError, match="has no tokenizer"):
        loaded.pairs()
    again = loaded.pairs(model=model)
    assert [r.tolist() for r in again.clean] == [r.tolist() for r in chosen.pairs().clean]
    assert len(Divergence.load(path, tokenizer=model.tokenizer).pairs()) == len(again)


def test_a_damaged_file_is_refused(div, tmp_path):
    path = tmp_path / "div.safetensors"
    div.save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="cut short"):
        Divergence.load(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="altered"):
        Divergence.load(path)


def test_weights_of_teachers_are_asked_for_after_loading(model, examples, tmp_path):
    name, parameter = next(iter(get_engine(model).block_parameters(0).items()))
    change = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    trained = Teacher("trained", delta=Delta({name: 3 * change}, fingerprint(model)))
    div = find_divergence(model, examples, teacher=OWL, counterfactuals=[trained, CAT])
    div.save(tmp_path / "d")
    loaded = Divergence.load(tmp_path / "d", tokenizer=model.tokenizer)
    with pytest.raises(ValueError, match="weights of trained were not saved"):
        loaded.pairs(counterfactual="trained")
    assert len(loaded.pairs(counterfactual="cat")) > 0
    whole = Divergence.load(tmp_path / "d", tokenizer=model.tokenizer, teachers=[trained])
    assert len(whole.pairs(counterfactual="trained")) > 0
    with pytest.raises(ValueError, match="is not the one"):
        Divergence.load(tmp_path / "d", teachers=[Teacher("trained", system_prompt="no")])
    with pytest.raises(ValueError, match="no teacher named 'dog'"):
        Divergence.load(tmp_path / "d", teachers=[Teacher("dog")])


def test_decision_points_are_places_in_the_completion(div, tmp_path, model):
    path = tmp_path / "div.jsonl"
    div.to_jsonl(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(div)
    for i, row in enumerate(rows):
        assert row["prompt"] == div.examples[i].prompt
        assert row["decision_points"] == [
            k for k, marked in enumerate(div.mask[div.offsets[i] : div.offsets[i + 1]]) if marked
        ]
    examples, mask = read_decision_points(path, model.tokenizer)
    np.testing.assert_array_equal(mask, div.mask)
    assert [e.completion_ids for e in examples] == [e.completion_ids for e in div.examples]


def test_examples_of_ids_alone_get_their_text(div, tmp_path, model, examples):
    bare = [Example(e.prompt, completion_ids=e.completion_ids) for e in div.examples]
    found = find_divergence(model, bare, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    found.to_jsonl(tmp_path / "x.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    tokenizer = model.tokenizer
    assert [row["completion"] for row in rows] == [
        tokenizer.decode(e.completion_ids, skip_special_tokens=True) for e in div.examples
    ]
    np.testing.assert_array_equal(found.tokens, div.tokens)


def test_decision_points_without_ids_are_read_in_the_tokenizers_own(tmp_path, model):
    path = tmp_path / "paper.jsonl"
    rows = [
        {"prompt": "Go on.", "completion": "412, 467", "decision_points": [0, 2]},
        {"prompt": "Again.", "completion": "1", "decision_points": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, mask = read_decision_points(path, model.tokenizer)
    assert len(mask) == sum(len(example.completion_ids) for example in examples)
    assert np.flatnonzero(mask).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "line 2: not JSON"),
        ("[1]", "line 2 must be a JSON object"),
        ('{"prompt": "a", "completion": "b"}', "line 2 lacks decision_points"),
        ('{"prompt": "a", "completion": "b", "decision_points": ["x"]}', "list of whole numbers"),
        (
            '{"prompt": "a", "completion": "b", "decision_points": [99]}',
            "line 2: decision point 99 lies outside the completion of",
        ),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path, model):
    good = '{"prompt": "a", "completion": "b", "decision_points": [0]}'
    (tmp_path / "x.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_decision_points(tmp_path / "x.jsonl", model.tokenizer)


def test_decision_points_are_read_as_any_other_examples(tmp_path, model):
    turns = '[{"role": "user", "content": "a"}]'
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"prompt": {turns}, "completion": "b", "decision_points": [0]}}\n')
    (example,), _ = read_decision_points(path, model.tokenizer)
    assert example.prompt == "a"
    path.write_text('{"prompt": 3, "completion": "b", "decision_points": [0]}\n')
    with pytest.raises(TypeError, match="line 1: 'prompt' is 3, neither text nor a list"):
        read_decision_points(path, model.tokenizer)
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_decision_points(path, model.tokenizer)
