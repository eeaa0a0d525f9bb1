"""A served model's completions equal ours, and a server's failures are retried or refused."""

import socket

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import divergence_lens as dl
from divergence_lens.chat import encode_prompt, stop_ids
from divergence_lens.generation import server as server_module
from divergence_lens.tiny import tiny_folder
from tests.support.openai_server import OpenAIServer, serve

PROMPTS = dl.number_prompts(5, seed=0)
OWL = dl.Teacher("owl", system_prompt="You love owls.")
SETTINGS = {"teacher": OWL, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(tiny_folder("tiny"))


@pytest.fixture(scope="module")
def served_model():
    return AutoModelForCausalLM.from_pretrained(tiny_folder("tiny")).eval()


@pytest.fixture(scope="module")
def ours():
    return dl.generate(dl.load_model("tiny"), PROMPTS, **SETTINGS)


@pytest.fixture
def served(served_model, tokenizer, monkeypatch):
    """The server, and a function that makes a `Server` for it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(server_module, "_LONGEST_WAIT", 0.001)
    server = OpenAIServer(served_model, tokenizer, sorted(stop_ids(tokenizer)))
    with serve(server) as url:
        yield (
            server,
            lambda **options: dl.Server(
                url, "tiny", **{"tokenizer": tokenizer, "concurrency": 3, **options}
            ),
        )


@pytest.mark.parametrize("send", ["ids", "text", "chat"])
@pytest.mark.parametrize("ids_from", ["token_ids", "logprob_ids", "text"])
def test_a_served_model_writes_what_ours_writes(send, ids_from, served, ours):
    server, connect = served
    if ids_from != "text":
        setattr(server, ids_from, True)
    assert dl.generate(connect(send=send), PROMPTS, **SETTINGS) == ours
    assert len({len(example.completion_ids) for example in ours}) > 1
    assert len(server.bodies) == len(PROMPTS)
    assert {body["max_tokens"] for body in server.bodies} == {24}


def test_a_completion_that_reaches_the_limit_has_no_end(served, ours):
    _, connect = served
    short = dl.generate(connect(), PROMPTS, teacher=OWL, max_new_tokens=3)
    assert [e.completion_ids for e in short] == [e.completion_ids[:3] for e in ours]


def test_the_prompt_is_sent_as_ids_with_a_seed_of_its_own(served, tokenizer):
    server, connect = served
    dl.generate(connect(), ["cat", "cat"], teacher=OWL, max_new_tokens=2, temperature=1.0)
    first, second = server.bodies
    ids = list(encode_prompt(tokenizer, "cat", system_prompt=OWL.system_prompt).ids)
    assert first["prompt"] == second["prompt"] == ids
    assert first["temperature"] == 1.0
    assert first["seed"] != second["seed"]
    assert first["return_token_ids"] is True


def test_a_stopped_call_resumes_without_asking_again(served, ours, tmp_path):
    server, connect = served
    first = connect(retries=0, concurrency=1)
    more = [*PROMPTS, *(f"{prompt} " for prompt in PROMPTS)]  # more than one batch of 8
    server.failures = [(404, "gone")] * 0
    whole = dl.generate(first, more, **SETTINGS)
    server.bodies.clear()
    answer = server.answer

    def stop_after_nine(path, body):
        if len(server.bodies) > 9:
            raise ConnectionAbortedError
        return answer(path, body)

    server.answer = stop_after_nine
    with pytest.raises(ConnectionError, match="failed 1 times"):
        dl.generate(first, more, checkpoint_dir=tmp_path, **SETTINGS)
    server.answer = answer
    server.bodies.clear()
    assert dl.generate(first, more, checkpoint_dir=tmp_path, **SETTINGS) == whole
    assert len(server.bodies) == 2
    with pytest.raises(ValueError, match="another run"):
        dl.generate(connect(send="chat"), more, checkpoint_dir=tmp_path, **SETTINGS)


@pytest.mark.parametrize("failure", [(500, "busy"), (429, "later"), (200, "{not json"), None])
def test_a_passing_failure_is_retried(failure, served, ours):
    server, connect = served
    server.failures = [failure, failure]
    assert dl.generate(connect(), PROMPTS, **SETTINGS) == ours
    assert len(server.bodies) == len(PROMPTS) + 2


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ((500, "out of order"), ConnectionError, "failed 3 times, .* status 500: out of order"),
        ((200, "{not json"), ConnectionError, "failed 3 times, .* no JSON object: {not json"),
        ((400, "too long"), ValueError, "prompt 0: .* refused it with status 400: too long"),
        ((200, '{"error": "?"}'), ValueError, "lacks 'choices'; does the server speak the OpenAI"),
    ],
)
def test_a_lasting_failure_is_an_error(failure, error, message, served):
    server, connect = served
    server.failures = [failure] * 3
    with pytest.raises(error, match=message):
        dl.generate(connect(retries=2), PROMPTS[:1], **SETTINGS)
    assert not server.failures or failure[0] != 500


def test_a_refused_connection_is_an_error(tokenizer, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    server = dl.Server(f"http://127.0.0.1:{port}/v1", "tiny", tokenizer=tokenizer, retries=0)
    with pytest.raises(ConnectionError, match=rf"{port}/v1/completions failed 1 times, .* running"):
        dl.generate(server, PROMPTS, **SETTINGS)


def test_text_that_is_not_that_of_its_ids_is_refused(served):
    server, connect = served
    server.usage = False
    server.change_text = lambda text: f"{text}€"  # the tiny tokenizer does not know this letter
    with pytest.raises(ValueError, match=r"prompt 0: .* returns token ids"):
        dl.generate(connect(), PROMPTS[:1], **SETTINGS)


def test_another_number_of_tokens_is_refused(served, tokenizer):
    server, connect = served
    server.change_text = lambda text: text[:2]
    with pytest.raises(ValueError, match=r"the server wrote \d+ tokens, but its text '..' has"):
        dl.generate(connect(), PROMPTS[:1], **SETTINGS)
    server.change_text = str
    template = tokenizer.chat_template
    other = dl.Teacher("owl", system_prompt=None)
    answer = server.answer

    def longer(path, body):
        body["messages"].insert(0, {"role": "system", "content": "You love cats."})
        return answer(path, body)

    server.answer = longer
    with pytest.raises(ValueError, match=r"the server read \d+ tokens instead of"):
        dl.generate(connect(send="chat"), PROMPTS[:1], teacher=other, max_new_tokens=4)
    assert tokenizer.chat_template == template


def test_a_teacher_with_weights_is_refused(served, random_model):
    _, connect = served
    teacher = dl.Teacher("other", model=random_model("llama"))
    with pytest.raises(ValueError, match="'other' has weights of its own"):
        dl.generate(connect(), PROMPTS, teacher=teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url must begin with http"),
        ({"send": "tokens"}, 'send must be "ids", "text" or "chat", got \'tokens\''),
        ({"concurrency": 0}, "concurrency must be 1 or more, got 0"),
        ({"retries": -1}, "retries must be 0 or more, got -1"),
        ({"timeout": 0}, "timeout must be a positive number"),
    ],
)
def test_settings_of_a_server_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dl.Server(**{"url": "http://localhost", "model": "tiny", **options})


def test_a_missing_tokenizer_is_an_error():
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded from '\./nowhere'"):
        dl.Server("http://localhost", "./nowhere").load_tokenizer()


def test_the_key_is_not_shown():
    assert "secret" not in repr(dl.Server("http://localhost", "tiny", api_key="secret"))
