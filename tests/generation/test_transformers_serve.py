"""Greedy completions from a real server: `transformers serve`, with the tiny model, on loopback."""

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

import divergence_lens as dl
from divergence_lens.tiny import tiny_folder

FOLDER = str(tiny_folder("tiny"))
SETTINGS = {"teacher": dl.Teacher("owl", system_prompt="You love owls."), "max_new_tokens": 24}


def running(url, process, log):
    """Whether the server answers; fails if its process has ended."""
    assert process.poll() is None, log.read_text()[-2000:]
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of the server, from when it answers until the tests end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "transformers.cli.transformers", "serve", FOLDER),
        *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"),
    ]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while not running(address, process, log):
            assert time.monotonic() < deadline, "the server did not start within 5 minutes"
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("send", ["chat", "text"])
def test_a_real_server_writes_what_ours_writes(send, url, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    prompts = dl.number_prompts(4, seed=0)
    server = dl.Server(
        url,
        FOLDER,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(FOLDER),
        send=send,
        concurrency=2,
        retries=0,
    )
    served = dl.generate(server, prompts, **SETTINGS)
    assert served == dl.generate(dl.load_model("tiny"), prompts, **SETTINGS)
    assert len({len(example.completion_ids) for example in served}) > 1
