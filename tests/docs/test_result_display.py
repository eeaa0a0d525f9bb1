"""Display of results: one short line in a terminal, a table in a notebook."""

import importlib
import inspect
import pkgutil
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import divergence_lens as dl
from divergence_lens.data import Rewritten, TrainingData
from divergence_lens.evaluation.entanglement import entangled_numbers
from divergence_lens.study import gradient_alignment, steering_vectors
from divergence_lens.study.findings import Finding

EVIL = "<script>x</script>"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """One result of each class, from a prompt that contains a script tag."""
    model = dl.load_model("tiny")
    owl, cat = dl.animal_teachers(["owl", "cat"])
    examples = dl.generate(model, dl.number_prompts(8, seed=0), teacher=owl, max_new_tokens=8)
    examples[0] = dl.Example(f"{EVIL} {examples[0].prompt}", examples[0].completion)
    examples = dl.examples.with_ids(model.tokenizer, examples)
    div = dl.find_divergence(model, examples, teacher=owl, counterfactuals=[cat])
    pairs = div.pairs(first_only=True, limit=3)
    data = TrainingData.of(div)
    recipe, questions = dl.Recipe(epochs=1), dl.preference_questions()[:2]
    student = dl.finetune(model, examples, layers=[0], recipe=recipe)
    effects = dl.attribution_patch(model, pairs, verify=2)
    same = dl.Pairs.from_tokens(
        pairs.clean,
        pairs.clean,
        answers=pairs.answers,
        foils=pairs.foils,
        corrupted_teacher=dl.Teacher("student", delta=student),
    )
    scores = dl.edge_scores(model, pairs)
    circuit = scores.circuit(top=4)
    audit = dl.audit(model, examples, candidates=["owl", "cat"], neutral_rows=0, own_rows=0)
    objects = [
        *(audit, audit.show(0), audit.drop_rows("owl")),
        dl.audit_student(model, student, examples, candidates=["owl", "cat"], questions=questions),
        *(examples[0], div, div[0], pairs, data, student, effects, effects.verified),
        *(scores, circuit, dl.faithfulness(model, pairs, circuit)),
        dl.attention_patterns(model, pairs, heads=[(0, 1)]),
        Rewritten(data, np.ones(len(data), dtype=bool), (EVIL,) * len(data)),
        dl.preference(model, target="owl", questions=questions),
        dl.layer_sweep(
            model, examples, measure=lambda m: m.cfg.n_layers, layers=[0], recipe=recipe
        ),
        dl.task_quality(model, examples[1:]),
        dl.cross_patch(model, student, same),
        entangled_numbers(model, owl, [cat], prompts=questions),
        steering_vectors(model, owl, prompts=questions),
        gradient_alignment(
            model, examples, div.mask, candidates=["owl", "cat"], questions=questions
        ),
        dl.NumberFilter().report([EVIL, *(e.completion for e in examples)]),
        dl.freeze_except(model, layers=[0]),
        Finding("early", f"A claim {EVIL}", 2.5, (2.0, 3.0), "supported", "whole interval above 1",
                "times", "tiny model", {"owl": 2.0, "cat": 3.0}),
    ]  # fmt: skip
    study = {"students": [{}, {}], "failures": [{}]}
    objects.append(dl.Study(study, (objects[-1],) * 60, {}, {}, {}, {}))
    return {type(one).__name__: one for one in objects}


def classes() -> set[str]:
    """Names of all public classes that have a data frame or an HTML representation."""
    names = set()
    for module in pkgutil.iter_modules(dl.__path__, "divergence_lens."):
        if module.name.endswith("__main__"):  # importing it runs the command line
            continue
        for name, one in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            public = one.__module__.startswith("divergence_lens") and not name.startswith("_")
            own = {"to_dataframe", "_repr_html_"} & set(vars(one))
            if public and own and not getattr(one, "_is_protocol", False):
                names.add(name)
    return names


def test_every_displayable_class_is_covered(results):
    assert classes() <= set(results)


def test_repr_is_one_short_line(results):
    for name, one in results.items():
        text = repr(one)
        if name == "Trainable":  # its repr is the table of trained parameters
            continue
        assert len(text) <= 300, name
        assert text.startswith(name), name
        assert "\n" not in text, name
        assert "object at 0x" not in text, name


def test_html_is_a_table_and_escapes_its_text(results):
    for name, one in results.items():
        if name == "Example":
            continue
        page = one._repr_html_()
        tags: list[str] = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, _, tags=tags: tags.append(tag)
        parser.feed(page)
        # An agreement is one sentence; all others are a table or colored text.
        assert {"table", "div"} & set(tags) or name == "Agreement", name
        assert "script" not in tags, name
        assert len(page) < 60_000, name


def test_nothing_is_printed(results, capfd):
    for one in results.values():
        repr(one)
    dl.find_divergence(
        dl.load_model("tiny"),
        results["TrainingData"].examples,
        teacher=dl.Teacher("a"),
        counterfactuals=[dl.animal_teachers(["owl"])[0]],
    )
    assert capfd.readouterr() == ("", "")


def test_repr_of_settings_shows_changed_fields(results):
    config = dl.StudyConfig(targets=("owl", "cat"), seeds=(0,))
    assert repr(config) == "StudyConfig(model='tiny', targets=('owl', 'cat'), seeds=(0,))"
    large = repr(dl.StudyConfig.for_model("Qwen/Qwen2.5-7B-Instruct", prompts=99))
    assert "model='Qwen/Qwen2.5-7B-Instruct'" in large
    assert len(large) <= 300
    condition = dl.Condition(name="first", isolates="x" * 99, group="layers", layers=(0,))
    assert repr(condition) == "Condition(name='first', layers=(0,))"
    study = results["Study"]
    summary = "Study(60 claims: 60 supported; 2 rows of students, 1 cells failed)"
    assert repr(study) == summary
    assert summary in study._repr_html_()
    assert study._repr_html_().count("&lt;script") == 60


def test_repr_of_a_long_example_is_truncated():
    shown = repr(dl.Example("a" * 500, "b" * 500, (1, 2), "owl"))
    assert shown == f"Example('{'a' * 59}…', '{'b' * 59}…', 2 ids, teacher='owl')"
