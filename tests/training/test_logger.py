"""The training history reaches an experiment tracker."""

import pytest

import divergence_lens as dl


@pytest.fixture(scope="module")
def model():
    return dl.load_model("tiny")


@pytest.fixture(scope="module")
def examples(model):
    owl = dl.animal_teachers(["owl"])[0]
    return dl.generate(model, dl.number_prompts(8, seed=0, instructions=False), teacher=owl)


RECIPE = dl.Recipe(epochs=3, batch_size=4)


def test_every_loss_is_logged_with_its_step(model, examples):
    logged = []

    def log(values, *, step):
        logged.append((step, values))

    student = dl.finetune(
        model, examples, layers=[0], recipe=RECIPE, on_step=dl.log_to(log, prefix="layer 0/")
    )
    history = student.history()
    assert len(history) == 6
    assert logged == [
        (step, {"layer 0/loss": loss})
        for step, loss in zip(history["step"], history["loss"], strict=True)
    ]


def test_measures_are_logged_and_stored(model, examples):
    logged = []

    def measure(trained):
        return {"preference": dl.preference(trained, target="owl").share}

    student = dl.finetune(
        *(model, examples),
        layers=[0],
        recipe=RECIPE,
        every=3,
        on_step=dl.log_to(lambda values, step: logged.append((step, values)), measure=measure),
    )
    measured = student.history().dropna(subset=["preference"])
    assert [step for step, _ in logged] == measured["step"].to_list() == [3, 6]
    assert [values["preference"] for _, values in logged] == measured["preference"].to_list()
    with student.applied(model):
        assert logged[-1][1]["preference"] == pytest.approx(measure(model)["preference"], abs=1e-6)


def test_logging_changes_nothing_in_the_student(model, examples):
    plain = dl.finetune(model, examples, layers=[0], recipe=RECIPE)
    logged = dl.finetune(
        model, examples, layers=[0], recipe=RECIPE, on_step=dl.log_to(lambda *_, **__: None)
    )
    assert plain.metadata["history"] == logged.metadata["history"]
    assert all(plain.tensors[name].equal(logged.tensors[name]) for name in plain.tensors)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_receives_the_history(model, examples, tmp_path, monkeypatch):
    """In wandb's offline mode: its own process writes the history to a file."""
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="owls")
    student = dl.finetune(model, examples, layers=[0], recipe=RECIPE, on_step=dl.log_to(run.log))
    run.log({"end": 1}, step=7)  # the next step commits the last one
    assert run.summary["loss"] == pytest.approx(student.history()["loss"].iloc[-1])
    run.finish()
    assert list(tmp_path.rglob("*.wandb"))
