"""Write completions with a server that speaks the OpenAI protocol.

1. Send the prompts of a batch at the same time, `concurrency` at a time, and retry what fails.
2. Take each completion's ids from the answer where the server returns them: vLLM's `token_ids`,
   ids in `logprobs` (llama.cpp, and vLLM's `return_tokens_as_token_ids`).
3. Otherwise tokenize the text, and refuse it if the ids do not give the same text again, or if the
   server counted another number of tokens.
"""

import json
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from divergence_lens.chat import Conversation, Turn, decode, encode_completions, end_of_turn
from divergence_lens.generation.request import Completion, Finish, Request
from divergence_lens.generation.sampling import prompt_seeds

if TYPE_CHECKING:
    import httpx

# Requests of a batch per request at a time: enough that a batch's last ones leave few slots idle.
_BATCH_PER_SLOT = 8
_LONGEST_WAIT = 30.0  # seconds between two tries
_TOKEN_ID = "token_id:"  # what vLLM writes before ids, instead of a token's text


@dataclass(frozen=True)
class Server:
    """A served model, for `generate`: vLLM, SGLang, llama.cpp, `transformers serve`.

        server = Server("http://localhost:8000", "Qwen/Qwen2.5-7B-Instruct")
        examples = generate(server, prompts, teacher=owl)

    Needs the package `httpx` (`pip install divergence-lens[server]`).

    Attributes:
        url: Address of the server, with or without `/v1`.
        model: The model's name on the server.
        tokenizer: Its tokenizer, or the folder or hub name of one; None for `model`.
        send: The form of the prompts. "ids" sends token ids to `/v1/completions`, so that the
            server reads exactly what `encode_prompts` gives. "text" sends the same prompt as text,
            for servers that take no ids (`transformers serve`). "chat" sends messages to
            `/v1/chat/completions`, where the server applies its own chat template.
        options: Further fields of each request. By default `return_token_ids` and
            `stop_token_ids` with "ids" (vLLM; others ignore them), and none otherwise.
        api_key: Sent as a bearer token.
        concurrency: The number of requests at a time.
        retries: How often a request is sent again after a failed connection, an answer that is
            not JSON, or a status 408, 429 or 5xx. The waits double, from half a second to 30
            seconds.
        timeout: Seconds that one request may take.

    Raises:
        ValueError: A setting out of range.
    """

    url: str
    model: str
    tokenizer: Any = None
    send: str = "ids"
    options: Mapping[str, Any] | None = None
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 32
    retries: int = 5
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        if self.send not in {"ids", "text", "chat"}:
            raise ValueError(f'send must be "ids", "text" or "chat", got {self.send!r}')
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, got {self.concurrency}")
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, got {self.retries}")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout}")

    def load_tokenizer(self) -> Any:
        """Return the tokenizer; load it if a name was given."""
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            return self.tokenizer
        from transformers import AutoTokenizer

        name = self.tokenizer or self.model
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no tokenizer can be loaded from {name!r}; give the server's own: "
                "Server(url, model, tokenizer=folder, hub name or tokenizer)"
            ) from error

    def identity(self) -> dict[str, Any]:
        """Return the settings that completions depend on, without the address: servers move."""
        options = None if self.options is None else dict(self.options)
        return {"model": self.model, "send": self.send, "options": options}


class ServerWriter:
    """Completions from a server."""

    def __init__(self, server: Server, request: Request) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError(
                "a Server needs the package httpx: pip install divergence-lens[server]"
            ) from error
        self._server, self._request = server, request
        base = server.url.rstrip("/").removesuffix("/v1")
        route = "chat/completions" if server.send == "chat" else "completions"
        self._url = f"{base}/v1/{route}"
        key = server.api_key
        self._client = httpx.Client(
            timeout=server.timeout,
            limits=httpx.Limits(max_connections=server.concurrency),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
        )
        self._seeds = prompt_seeds(request.settings.seed, request.prompts)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def batches(self) -> list[np.ndarray]:
        """Divide the prompts, in their order, into batches of a few per concurrent request."""
        numbers = np.arange(len(self._request.rows))
        size = _BATCH_PER_SLOT * self._server.concurrency
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def write(self, batch: list[int], finish: Finish) -> None:
        """Complete a batch; call `finish` as answers arrive."""
        with ThreadPoolExecutor(self._server.concurrency) as pool:
            futures = {pool.submit(self._complete, number): number for number in batch}
            try:
                for future in as_completed(futures):
                    finish(futures[future], Completion(future.result()))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _complete(self, number: int) -> tuple[int, ...]:
        answer = self._post(number, self._body(number))
        try:
            return self._ids(number, answer, answer["choices"][0])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"prompt {number}: the answer of {self._url} lacks {error}; "
                f"does the server speak the OpenAI protocol? {_shortened(json.dumps(answer))}"
            ) from error

    # -- requests -----------------------------------------------------------------------------

    def _body(self, number: int) -> dict[str, Any]:
        request, server = self._request, self._server
        settings = request.settings
        body: dict[str, Any] = {
            "model": server.model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p if settings.temperature else 1.0,
            "seed": self._seeds[number] % 2**31,
            "stream": False,
        }
        if server.send == "chat":
            body["messages"] = self._messages(number)
        else:
            ids = list(request.rows[number])
            body["prompt"] = ids if server.send == "ids" else self._text_of(number, ids)
        if server.options is not None:
            return body | dict(server.options)
        if server.send == "ids":
            body |= {"return_token_ids": True, "stop_token_ids": sorted(request.stops)}
        return body

    def _messages(self, number: int) -> list[dict[str, str]]:
        prompt, system = self._request.prompts[number], self._request.system_prompt
        if isinstance(prompt, str):
            prompt = Conversation((Turn("user", prompt),))
        if system is None:
            return prompt.messages()
        return [turn._asdict() for turn in (Turn("system", system), *prompt.dialog)]

    def _text_of(self, number: int, ids: list[int]) -> str:
        """Return a prompt as text that the server's tokenizer turns into the same ids."""
        tokenizer = self._request.tokenizer
        for first in (0, 1):  # a tokenizer may add the first token, so it is not sent
            text = str(tokenizer.decode(ids[first:], clean_up_tokenization_spaces=False))
            if list(tokenizer(text)["input_ids"]) == ids:
                return text
        raise ValueError(
            f"prompt {number} as text has other token ids; use Server(send='ids') with a server "
            "that takes ids, or send='chat'"
        )

    def _post(self, number: int, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request until it succeeds; return the answer's JSON object."""
        import httpx

        tries = self._server.retries + 1
        for attempt in range(tries):
            try:
                response = self._client.post(self._url, json=body)
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
            else:
                answer = _object(response)
                if response.is_success and answer is not None:
                    return answer
                failure = f"status {response.status_code}: {_shortened(response.text)}"
                if response.is_success:
                    failure = f"the answer is no JSON object: {_shortened(response.text)}"
                elif not _passes(response):
                    raise ValueError(f"prompt {number}: {self._url} refused it with {failure}")
            if attempt + 1 < tries:
                # The random part keeps concurrent requests from returning at the same time.
                time.sleep(min(_LONGEST_WAIT, 0.5 * 2**attempt) * random.uniform(0.75, 1.0))
        raise ConnectionError(
            f"prompt {number}: {self._url} failed {tries} times, the last time with {failure}; is "
            "the server running at this address?"
        )

    # -- answers ------------------------------------------------------------------------------

    def _ids(
        self, number: int, answer: Mapping[str, Any], choice: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """Return a completion's ids, with the end of turn if the model ended it."""
        usage = answer.get("usage") or {}
        self._check_prompt(number, usage.get("prompt_tokens"))
        stopped = choice["finish_reason"] == "stop"
        ids = choice.get("token_ids") or _logprob_ids(choice.get("logprobs"))
        if ids is None:
            ids = self._tokenized(number, choice, usage.get("completion_tokens"))
        stops, limit = self._request.stops, self._request.settings.max_new_tokens
        end = next((place for place, token in enumerate(ids) if token in stops), None)
        if end is not None:
            ids = ids[: end + 1]
        elif stopped and len(ids) < limit and not self._is_end(ids):
            ids = [*ids, end_of_turn(self._request.tokenizer)]
        if not ids:
            raise ValueError(f"prompt {number}: {self._url} returned an empty completion")
        return tuple(ids)

    def _is_end(self, ids: list[int]) -> bool:
        """Whether the last id is another end token of the served model."""
        return bool(ids) and ids[-1] in self._request.tokenizer.all_special_ids

    def _check_prompt(self, number: int, count: int | None) -> None:
        expected = len(self._request.rows[number])
        if count is not None and count != expected:
            raise ValueError(
                f"prompt {number}: the server read {count} tokens instead of {expected}; its chat "
                "template or tokenizer is another one (compare Server.tokenizer with it, or use "
                "send='ids')"
            )

    def _tokenized(self, number: int, choice: Mapping[str, Any], count: int | None) -> list[int]:
        tokenizer = self._request.tokenizer
        chat = self._server.send == "chat"
        text = choice["message"]["content"] if chat else choice["text"]
        if not isinstance(text, str):
            raise TypeError("text")
        prompt = self._request.prompts[number]
        thinking = isinstance(prompt, Conversation) and prompt.thinking
        ids = list(encode_completions(tokenizer, [text], thinking=thinking)[0]) if text else []
        if ids and ids[-1] in self._request.stops:
            ids.pop()
        advice = (
            "use a server that returns token ids (vLLM with return_token_ids), or check "
            "Server.tokenizer"
        )
        if decode(tokenizer, ids) != text:
            raise ValueError(
                f"prompt {number}: the text {_shortened(text)!r} does not survive the tokenizer: "
                f"its ids give {_shortened(decode(tokenizer, ids))!r}; {advice}"
            )
        # Servers count the token that ends the turn, or leave it out.
        if count is not None and count not in {len(ids), len(ids) + 1}:
            raise ValueError(
                f"prompt {number}: the server wrote {count} tokens, but its text "
                f"{_shortened(text)!r} has {len(ids)}; {advice}"
            )
        return ids


def _passes(response: "httpx.Response") -> bool:
    """Whether a failed request may succeed later."""
    return response.status_code in {408, 429} or response.status_code >= 500


def _object(response: "httpx.Response") -> dict[str, Any] | None:
    try:
        answer = response.json()
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _logprob_ids(logprobs: Any) -> list[int] | None:
    """Return the ids of a completion from its log-probabilities, where they hold any."""
    if not isinstance(logprobs, dict):
        return None
    tokens = logprobs.get("tokens") or []
    if tokens and all(str(token).startswith(_TOKEN_ID) for token in tokens):
        return [int(str(token).removeprefix(_TOKEN_ID)) for token in tokens]
    content = logprobs.get("content") or []
    if content and all("id" in entry for entry in content):
        return [int(entry["id"]) for entry in content]
    return None


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:199] + "…"
