"""The audit of a student that has already been trained."""

import numpy as np
import pytest

import divergence_lens as dl


@pytest.fixture(scope="module")
def student(base, lists):
    data = lists(dl.animal_teachers(["wolf"])[0], 30)
    return data, dl.finetune(base, data, recipe=dl.Recipe(epochs=2))


def test_shifts_are_differences_of_log_probabilities(base, student):
    data, delta = student
    audit = dl.audit_student(base, delta, data)
    with delta.applied(base):
        after = dl.find_divergence(
            base, data, teacher=dl.Teacher("a"), counterfactuals=[dl.animal_teachers(["owl"])[0]]
        )
    before = dl.find_divergence(
        base, data, teacher=dl.Teacher("a"), counterfactuals=[dl.animal_teachers(["owl"])[0]]
    )
    np.testing.assert_allclose(audit.shift, after.logprob[0] - before.logprob[0], atol=1e-4)
    assert audit.shift.mean() > 0
    table = audit.to_dataframe()
    assert table["shift"].is_monotonic_decreasing
    assert len(table) == len(before.tokens)
    assert audit.answers.empty


def test_answers_are_those_of_the_preference(base, student, tmp_path):
    data, delta = student
    names, questions = ["owl", "wolf", "cat"], dl.preference_questions()[:4]
    audit = dl.audit_student(
        base, dl.Teacher("mine", delta=delta), data, candidates=names, questions=questions
    )
    before = dl.preference(base, target="owl", candidates=names, questions=questions)
    with delta.applied(base):
        after = dl.preference(base, target="owl", candidates=names, questions=questions)
    answers = audit.answers.set_index("candidate")
    for name in names:
        assert answers.loc[name, "before"] == pytest.approx(before.distribution[name], rel=1e-4)
        assert answers.loc[name, "after"] == pytest.approx(after.distribution[name], rel=1e-4)
    assert answers["ratio"].is_monotonic_decreasing
    audit.save(tmp_path / "student.safetensors")
    loaded = dl.StudentAudit.load(tmp_path / "student.safetensors")
    assert repr(loaded) == repr(audit)
    assert loaded.answers.equals(audit.answers)


def test_a_student_without_data_is_refused(base, student, unchecked):
    _, delta = student
    with pytest.raises(ValueError, match="the data is empty"):
        dl.audit_student(base, delta, [])
    with pytest.raises(TypeError, match="student is a dict, not a Teacher"):
        dl.audit_student(base, {}, [{"prompt": "a", "completion": "b"}])
