"""Results go to the hub and come back, through `huggingface_hub` and a stand-in for its server."""

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

import divergence_lens as dl
from divergence_lens._utils.hub import OnHub
from tests.support.hub import TOKEN, serve_hub

# huggingface_hub's own upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


NAMES = [
    *("AttentionPatterns", "Audit", "Circuit", "CrossPatch", "Delta", "Divergence", "EdgeScores"),
    *("Effects", "Faithfulness", "Preference", "StudentAudit", "Sweep"),
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, which `huggingface_hub` takes for the real one."""
    with serve_hub() as served:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        path = template[template.index("/{repo_id}") :]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + path)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        huggingface_hub.close_session()
        yield served
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def results():
    """One result of each class that can be saved."""
    model = dl.load_model("tiny")
    owl, cat = dl.animal_teachers(["owl", "cat"])
    prompts = dl.number_prompts(6, seed=0, instructions=False)
    examples = dl.generate(model, prompts, teacher=owl)
    divergence = dl.find_divergence(model, examples, teacher=owl, counterfactuals=[cat])
    pairs = divergence.pairs(limit=2)
    student = dl.finetune(model, examples, layers=[0])
    scores = dl.edge_scores(model, pairs, method="gradient")
    audit = dl.audit(model, examples, candidates=["owl", "cat", "wolf"])
    disagreements = dl.Pairs.from_disagreements(model, student, pairs.clean)
    return {
        "AttentionPatterns": dl.attention_patterns(model, pairs, heads=[(0, 1)]),
        "Audit": audit,
        "Circuit": scores.circuit(top=20),
        "Delta": student,
        "EdgeScores": scores,
        "Faithfulness": dl.faithfulness(model, pairs, scores.circuit(top=20)),
        "StudentAudit": dl.audit_student(model, student, examples),
        "Divergence": divergence,
        "Effects": dl.causal_mediation(model, pairs),
        "CrossPatch": dl.cross_patch(model, student, disagreements),
        "Preference": dl.preference(model, target="owl"),
        "Sweep": dl.layer_sweep(
            model, examples, layers=[0], measure=lambda m: dl.preference(m, target="owl")
        ),
    }


def arrays(result) -> list[np.ndarray]:
    return {
        "AttentionPatterns": lambda: [result.clean, result.corrupted],
        "Audit": lambda: [result.by_row, result.neutral],
        "Circuit": lambda: [result.chosen, result.scores],
        "EdgeScores": lambda: [result.values],
        "Faithfulness": lambda: [result.metric, result.full],
        "StudentAudit": lambda: [result.before, result.after],
        "Delta": lambda: [result.tensors[name].numpy() for name in sorted(result.tensors)],
        "Divergence": lambda: [result.mask, result.tokens],
        "Effects": lambda: [result.values],
        "CrossPatch": lambda: [result.margins],
        "Preference": lambda: [result.probabilities],
        "Sweep": lambda: [student.values["share"] for student in result.students],
    }[type(result).__name__]()


@pytest.mark.parametrize("name", NAMES)
def test_a_result_comes_back_from_the_hub(hub, results, name):
    result = results[name]
    url = result.push_to_hub("user/owls", token=TOKEN)
    kind = "model" if name == "Delta" else "dataset"
    files = hub.files[kind, "user/owls"]
    assert set(files) == {f"{name.lower()}.safetensors", "README.md"}
    assert url.startswith(hub.url)
    assert hub.commits == [f"Add {name.lower()}.safetensors, saved by divergence-lens"]
    loaded = type(result).from_hub("user/owls")
    assert loaded.metadata == result.metadata
    for mine, theirs in zip(arrays(loaded), arrays(result), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_every_result_that_can_be_saved_goes_to_the_hub(results):
    saved = sorted(name for name in dl.__all__ if hasattr(getattr(dl, name), "save"))
    assert saved == NAMES == sorted(results)
    assert all(issubclass(getattr(dl, name), OnHub) for name in NAMES)


def test_the_code_on_the_card_loads_the_result(hub, results):
    results["Preference"].push_to_hub("user/owls", filename="seed-1/owl.safetensors", token=TOKEN)
    card = hub.files["dataset", "user/owls"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: divergence-lens\n")
    code = card.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code, names)  # noqa: S102
    assert names["result"].share == results["Preference"].share
    assert '"name": "tiny"' in card


def test_several_results_share_a_repository_and_its_card(hub, results):
    hub.files["dataset", "user/mine"] = {"README.md": b"my own words"}
    results["Effects"].push_to_hub("user/mine", token=TOKEN, commit_message="Effects of layer 0")
    results["Preference"].push_to_hub("user/mine", token=TOKEN)
    files = hub.files["dataset", "user/mine"]
    assert set(files) == {"README.md", "effects.safetensors", "preference.safetensors"}
    assert files["README.md"] == b"my own words"
    assert hub.commits[0] == "Effects of layer 0"


def test_a_new_repository_can_be_private(hub, results):
    results["Preference"].push_to_hub("user/secret", private=True, token=TOKEN)
    assert hub.private["dataset", "user/secret"]


def test_the_hubs_refusals_are_passed_on(hub, results):
    with pytest.raises(HfHubHTTPError, match="401"):
        results["Preference"].push_to_hub("user/owls", token="hf_wrong")
    assert hub.files == {}
    results["Preference"].push_to_hub("user/owls", token=TOKEN)
    with pytest.raises(EntryNotFoundError):
        dl.Effects.from_hub("user/owls")
    with pytest.raises(ValueError, match="holds 'preference', not 'effects'"):
        dl.Effects.from_hub("user/owls", filename="preference.safetensors")


def test_a_student_from_the_hub_is_applied(hub, results):
    results["Delta"].push_to_hub("user/student", token=TOKEN)
    model = dl.load_model("tiny")
    tokens = torch.arange(1, 9)[None]
    logits = []
    for student in (results["Delta"], dl.Delta.from_hub("user/student")):
        with student.applied(model), torch.no_grad():
            logits.append(model(tokens))
    assert torch.equal(*logits)
    with torch.no_grad():
        assert not torch.equal(model(tokens), logits[0])
