"""Long calls that are stopped half-way: what they give back, and that the model is as it was."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tqdm.auto import tqdm

import divergence_lens as dl
from divergence_lens._utils.interrupts import Interrupted, defer_interrupts
from divergence_lens.generation.local import LocalWriter
from tests.support.state import state

PROMPTS = dl.number_prompts(12, seed=0, instructions=False)


@pytest.fixture
def stopped_after(monkeypatch) -> Callable[..., Any]:
    """Run a call and stop it, as Ctrl-C does, when its progress bar moves for the nth time."""

    def run(moves: int, call: Callable[[], Any]) -> Interrupted:
        left = [moves]
        update = tqdm.update

        def counted(self: Any, n: float | None = 1) -> bool | None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return update(self, n)

        with monkeypatch.context() as patch:
            patch.setattr(tqdm, "update", counted)
            with pytest.raises(KeyboardInterrupt) as found:
                call()
        return found.value

    return run


@pytest.fixture
def unchanged(model):
    before = state(model)
    yield
    assert state(model) == before


@pytest.fixture(scope="module")
def model(backend):
    loaded = dl.load_model("tiny", backend=backend)
    dl.generate(loaded, PROMPTS[:1], teacher=None, max_new_tokens=1)  # a bridge sets up hooks once
    return loaded


@pytest.fixture(scope="module")
def pairs(model):
    owl, cat = dl.animal_teachers(["owl", "cat"])
    examples = dl.generate(model, PROMPTS, teacher=owl, max_new_tokens=8)
    div = dl.find_divergence(model, examples, teacher=owl, counterfactuals=[cat])
    return div.pairs(first_only=True, limit=6)


@pytest.mark.usefixtures("unchanged")
def test_generate_gives_back_the_examples_that_were_finished(model, stopped_after):
    call = lambda: dl.generate(model, PROMPTS, teacher=None, max_new_tokens=8, batch_tokens=128)  # noqa: E731
    whole = call()
    stop = stopped_after(5, call)
    assert len(stop.partial) == 5
    assert [e for e in whole if e.prompt in {p.prompt for p in stop.partial}] == stop.partial
    assert "after 5 of 12 prompts" in str(stop)


@pytest.mark.usefixtures("unchanged")
def test_finding_gives_back_what_all_teachers_have_read(model, stopped_after):
    owl, cat = dl.animal_teachers(["owl", "cat"])
    examples = dl.generate(model, PROMPTS, teacher=owl, max_new_tokens=8)
    call = lambda: dl.find_divergence(  # noqa: E731
        *(model, examples), teacher=owl, counterfactuals=[cat], batch_tokens=16, progress=True
    )
    whole, stop = call(), stopped_after(18, call)
    rows = stop.partial.metadata["settings"]["finished_examples"]
    assert 0 < len(rows) < len(examples)
    assert stop.partial.examples == tuple(whole.examples[row] for row in rows)
    assert stop.partial.offsets[0] == 0
    for place, row in enumerate(rows):
        assert str(stop.partial[place]) == str(whole[row])
    last = int(stop.partial.offsets[-1])
    np.testing.assert_array_equal(stop.partial.margin, whole.margin[:, :last])


@pytest.mark.slow
@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("exact", [True, False])
def test_patching_gives_back_whole_pairs(model, pairs, stopped_after, exact):
    patch = dl.causal_mediation if exact else dl.attribution_patch
    call = lambda: patch(model, pairs, site="mlp_out", batch_rows=2)  # noqa: E731
    whole, stop = call(), stopped_after(1, call)
    rows = stop.partial.setting("finished_pairs")
    assert 0 < len(rows) < len(pairs)
    assert rows == sorted(rows)
    assert stop.partial.labels == tuple(whole.labels[i] for i in rows)
    width = stop.partial.values.shape[2]
    np.testing.assert_array_equal(stop.partial.values, whole.values[rows][:, :, :width])
    np.testing.assert_array_equal(stop.partial.total, whole.total[rows])
    assert whole.setting("finished_pairs") is None


@pytest.mark.usefixtures("unchanged")
def test_a_stopped_check_gives_back_the_effects_unverified(model, pairs, stopped_after):
    call = lambda: dl.attribution_patch(model, pairs, verify=4)  # noqa: E731
    stop = stopped_after(1, call)  # the first bar ends with one move, the next is the check's
    assert stop.partial.verified is None
    np.testing.assert_array_equal(stop.partial.values, call().values)


@pytest.mark.usefixtures("unchanged")
def test_a_sweep_gives_back_the_students_that_were_finished(model, stopped_after):
    examples = dl.generate(model, PROMPTS, teacher=None, max_new_tokens=8)
    questions = dl.preference_questions()[:2]
    call = lambda: dl.layer_sweep(  # noqa: E731
        model,
        examples,
        measure=lambda m: dl.preference(m, target="owl", questions=questions),
        layers=[0, 1],
        recipe=dl.Recipe(epochs=1),
    )
    whole = call()
    # Each student's own bar moves once, then the sweep's.
    stop = stopped_after(4, call)
    assert [s.layer for s in stop.partial.students] == [s.layer for s in whole.students][:2]
    assert stop.partial.summary().equals(whole.summary().iloc[: len(stop.partial.summary())])
    assert stop.partial.layers == (0,)
    stop.partial.plot()


@pytest.mark.usefixtures("unchanged")
def test_cross_patching_gives_back_whole_pairs(model, pairs, stopped_after):
    student = dl.finetune(
        model,
        dl.generate(model, PROMPTS[:4], teacher=None, max_new_tokens=4),
        recipe=dl.Recipe(epochs=1),
    )
    same = dl.Pairs.from_tokens(
        pairs.clean,
        pairs.clean,
        answers=pairs.answers,
        foils=pairs.foils,
        corrupted_teacher=dl.Teacher("student", delta=student),
    )
    call = lambda: dl.cross_patch(model, student, same, batch_rows=5)  # noqa: E731
    whole, stop = call(), stopped_after(2, call)
    rows = stop.partial.metadata["settings"]["finished_pairs"]
    assert 0 < len(rows) < len(pairs)
    np.testing.assert_array_equal(stop.partial.margins, whole.margins[rows])


def test_a_call_that_had_found_nothing_raises_what_it_was_stopped_by(model, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalWriter, "decode", stop)
    with pytest.raises(KeyboardInterrupt) as found:
        dl.generate(model, PROMPTS[:2], teacher=None)
    assert type(found.value) is KeyboardInterrupt


def test_a_notebook_keeps_the_exception_where_the_message_says():
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    shell.run_cell(
        "from divergence_lens import Interrupted\nraise Interrupted('stopped', partial=[1, 2])"
    )
    shell.run_cell("import sys; found = sys.last_value.partial")
    assert shell.user_ns["found"] == [1, 2]


def test_a_stopped_training_gives_back_the_student_so_far(model, pairs, stopped_after, unchanged):
    examples = dl.generate(model, PROMPTS, teacher=None, max_new_tokens=8)
    recipe = dl.Recipe(epochs=3, batch_size=4)

    def train(**options):
        return dl.finetune(model, examples, layers=[0], recipe=recipe, progress=True, **options)

    stopped = stopped_after(4, train)
    assert isinstance(stopped, Interrupted)
    assert "finetune was stopped after 5 of 9 updates" in str(stopped)
    seen = []

    def note(step, _loss, live):
        if step == 5:
            seen.append({n: p.detach().clone() for n, p in live.named_parameters()})
        return {}

    whole = train(on_step=note)
    assert stopped.partial.history()["loss"].tolist() == whole.history()["loss"].tolist()[:5]
    with stopped.partial.applied(model):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), seen[0][name], atol=1e-7, rtol=1e-6)
    early = stopped_after(-1, train)
    assert len(early.partial.history()) == 1


def test_a_sweep_stopped_in_its_first_student_gives_back_no_student(model, monkeypatch, unchanged):
    examples = dl.generate(model, PROMPTS[:4], teacher=None, max_new_tokens=8)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("divergence_lens.training.loop._Run._gradients", stop)
    with pytest.raises(KeyboardInterrupt) as found:
        dl.layer_sweep(
            model, examples, measure=lambda m: dl.preference(m, target="owl"), layers=[0]
        )
    assert not isinstance(found.value, Interrupted)


def test_a_stop_in_the_middle_of_an_update_waits_for_its_end():
    done = []
    before = signal.getsignal(signal.SIGINT)

    def update():
        with defer_interrupts():
            signal.raise_signal(signal.SIGINT)
            done.append("the rest of the update")

    with pytest.raises(KeyboardInterrupt):
        update()
    assert done == ["the rest of the update"]
    assert signal.getsignal(signal.SIGINT) is before
    thread = threading.Thread(target=lambda: done.append(defer_interrupts().__enter__()))
    thread.start()
    thread.join()
    assert done[1:] == [None]


@pytest.mark.slow
def test_steps_of_a_sweep_do_not_give_back_theirs(model, monkeypatch, unchanged):
    """Measuring a student writes lists; a stop there is a stop of the sweep."""
    examples = dl.generate(model, PROMPTS[:4], teacher=None, max_new_tokens=8)
    options = {"measure": lambda m: dl.task_quality(m, examples).loss, "layers": [0, 1]}
    for measured, kept in ((0, None), (1, None), (2, 1)):
        calls = [0]
        run = LocalWriter.decode

        def stopped(self, batch, calls=calls, measured=measured, run=run):
            calls[0] += 1
            for number, found in enumerate(run(self, batch)):
                if calls[0] > measured and number == 1:
                    raise KeyboardInterrupt
                yield found

        with monkeypatch.context() as patched:
            patched.setattr(LocalWriter, "decode", stopped)
            with pytest.raises(KeyboardInterrupt) as found:
                dl.layer_sweep(model, examples, recipe=dl.Recipe(epochs=1), **options)
        if kept is None:
            assert not isinstance(found.value, Interrupted)
        else:
            assert len(found.value.partial.students) == kept
