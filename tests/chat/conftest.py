"""Tokenizers with chat templates, and the same templates written down by hand."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.templates import CASES, Pieces, template_tokenizer


@pytest.fixture(scope="package", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, Callable[..., Pieces]]:
    """A tokenizer with one template, and the same template written down by hand."""
    return template_tokenizer(request.param), CASES[request.param][2]


@pytest.fixture(scope="package")
def qwen25(shared_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """The tokenizer of Qwen2.5-Instruct."""
    source = shared_data / "qwen2.5-tokenizer"
    if not source.is_dir():
        pytest.skip(f"no Qwen2.5 tokenizer at {source}")
    folder = tmp_path_factory.mktemp("qwen2.5")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    with gzip.open(source / "tokenizer.json.gz") as packed:
        (folder / "tokenizer.json").write_bytes(packed.read())
    return AutoTokenizer.from_pretrained(folder)
