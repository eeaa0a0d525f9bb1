"""Fixtures for all tests. They run offline and on one thread."""

import os

# Before transformers is imported by anything below.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

from tests.support.models import BACKENDS, chat_tokenizer, random_hf_model

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # the models are so small that a second thread only waits


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each model class that this TransformerLens has, as `load_model` names it."""
    return request.param


@pytest.fixture(scope="session")
def tiny(backend: str):
    """The shipped model in the GPT-2 layout. Shared: leave it as you found it."""
    from divergence_lens.models import load_model

    return load_model("tiny", backend=backend)


@pytest.fixture(scope="session")
def tiny_qwen2(backend: str):
    """The shipped model in the Qwen2 layout. Shared: leave it as you found it."""
    from divergence_lens.models import load_model

    return load_model("tiny-qwen2", backend=backend)


@pytest.fixture(scope="session")
def random_model(backend: str) -> Callable[..., object]:
    """`random_model(family, seed=0, **sizes)`: a new random chat model of this backend."""
    from divergence_lens.models import load_model

    def build(family: str, seed: int = 0, **sizes: object) -> object:
        tokenizer = chat_tokenizer()
        model = random_hf_model(family, seed, **{"vocab": len(tokenizer), **sizes})
        return load_model(model, backend=backend, tokenizer=tokenizer)

    return build


@pytest.fixture(scope="module")
def model_of(random_model, backend):
    """One small model per family and backend, where the backend can hold the family."""
    built = {}

    def get(family, seed=0):
        if (family, seed) not in built:
            if backend == "hooked" and family.startswith("gemma"):
                pytest.skip("TransformerLens cannot convert this family to a HookedTransformer")
            built[family, seed] = random_model(family, seed)
        return built[family, seed]

    return get


@pytest.fixture
def unchecked():
    """Turn the tests' own type checks off, to meet the library's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and data that may lie beside the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data beside the project at {SHARED_DATA}")
    return SHARED_DATA
