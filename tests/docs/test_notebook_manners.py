"""How results look at the end of a cell: short in a terminal, a table in a notebook."""

import importlib
import inspect
import pkgutil
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import divergence_lens as dl
from divergence_lens.data.transforms import Rewritten, TrainingData
from divergence_lens.evaluation.entanglement import entangled_numbers
from divergence_lens.study import gradient_alignment, steering_vectors
from divergence_lens.study.findings import Finding

EVIL = "<script>x</script>"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """One of each, of a prompt that is no harm to a page."""
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
    found = [
        *(examples[0], div, div[0], pairs, data, student, effects, effects.verified),
        Rewritten(data, np.ones(len(data), dtype=bool), (EVIL,) * len(data)),
        dl.preference(model, target="owl", questions=questions),
        dl.layer_sweep(
            model, examples, target="owl", layers=[0], recipe=recipe, questions=questions
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
    found.append(dl.Study(study, (found[-1],) * 60, {}, {}, {}, {}))
    return {type(one).__name__: one for one in found}


def classes() -> set[str]:
    """Every public class of the library that turns into a table or shows itself."""
    found = set()
    for module in pkgutil.iter_modules(dl.__path__, "divergence_lens."):
        for name, one in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            public = one.__module__.startswith("divergence_lens") and not name.startswith("_")
            own = {"to_dataframe", "_repr_html_"} & set(vars(one))
            if public and own and not getattr(one, "_is_protocol", False):
                found.add(name)
    return found


def test_every_class_that_shows_itself_is_looked_at_here(results):
    assert classes() <= set(results)


def test_results_are_short_in_a_terminal(results):
    for name, one in results.items():
        said = repr(one)
        if name == "Trainable":  # a table of what is trained, and asked for as such
            continue
        assert len(said) <= 300, name
        assert said.startswith(name), name
        assert "\n" not in said, name
        assert "object at 0x" not in said, name


def test_results_show_themselves_in_a_notebook_and_harm_no_page(results):
    for name, one in results.items():
        if name == "Example":
            continue
        page = one._repr_html_()
        tags: list[str] = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, _, tags=tags: tags.append(tag)
        parser.feed(page)
        # An agreement is one sentence; all others have a table or coloured text.
        assert {"table", "div"} & set(tags) or name == "Agreement", name
        assert "script" not in tags, name
        assert len(page) < 60_000, name


def test_nothing_is_printed_unasked(results, capfd):
    for one in results.values():
        repr(one)
    dl.find_divergence(
        dl.load_model("tiny"),
        results["TrainingData"].examples,
        teacher=dl.Teacher("a"),
        counterfactuals=[dl.animal_teachers(["owl"])[0]],
    )
    assert capfd.readouterr() == ("", "")


def test_settings_are_short_in_a_terminal(results):
    config = dl.StudyConfig(targets=("owl", "cat"), seeds=(0,))
    assert repr(config) == "StudyConfig(model='tiny', targets=('owl', 'cat'), seeds=(0,))"
    large = repr(dl.StudyConfig.for_model("Qwen/Qwen2.5-7B-Instruct", prompts=99))
    assert "model='Qwen/Qwen2.5-7B-Instruct'" in large
    assert len(large) <= 300
    condition = dl.Condition(name="first", isolates="x" * 99, group="layers", layers=(0,))
    assert repr(condition) == "Condition(name='first', layers=(0,))"
    study = results["Study"]
    says = "Study(60 claims: 60 supported; 2 rows of students, 1 cells failed)"
    assert repr(study) == says
    assert says in study._repr_html_()
    assert study._repr_html_().count("&lt;script") == 60


def test_a_long_example_shows_its_beginning():
    shown = repr(dl.Example("a" * 500, "b" * 500, (1, 2), "owl"))
    assert shown == f"Example('{'a' * 59}…', '{'b' * 59}…', 2 ids, teacher='owl')"
