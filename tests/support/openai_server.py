"""An HTTP server on loopback that answers in the OpenAI protocol with Hugging Face `generate`."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class OpenAIServer:
    """A served Hugging Face model.

    Attributes:
        bodies: The requests that arrived, in order.
        failures: Answers to give first, instead of the model's: (status, body), or None to close
            the connection.
        token_ids: Whether a choice holds `token_ids`, as vLLM's does.
        logprob_ids: Whether it holds ids among its log-probabilities, as llama.cpp's does.
        change_text: Applied to each completion's text.
    """

    def __init__(self, hf_model: Any, tokenizer: Any, stops: list[int]) -> None:
        self._model, self._tokenizer, self._stops = hf_model, tokenizer, stops
        self._lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.failures: list[tuple[int, str] | None] = []
        self.token_ids = self.logprob_ids = False
        self.usage = True
        self.change_text = str

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        chat = path.endswith("/chat/completions")
        if chat:
            prompt = self._tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, tokenize=False
            )
            ids = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        elif isinstance(body["prompt"], str):
            ids = self._tokenizer(body["prompt"])["input_ids"]
        else:
            ids = body["prompt"]
        inputs = torch.tensor([ids])
        with self._lock:
            out = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=body["max_tokens"],
                eos_token_id=self._stops,
                pad_token_id=0,
            )
        written = out[0, len(ids) :].tolist()
        ended = written[-1] in self._stops
        text = self.change_text(self._tokenizer.decode(written, skip_special_tokens=True))
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if ended else "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if self.token_ids:
            choice["token_ids"] = written
        if self.logprob_ids:
            choice["logprobs"] = {"content": [{"id": i, "logprob": 0.0} for i in written]}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(written)}
        return {"choices": [choice], **({"usage": usage} if self.usage else {})}


@contextmanager
def serve(server: OpenAIServer) -> Iterator[str]:
    """Serve on a free port of loopback; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.bodies.append(body)
            if server.failures:
                failure = server.failures.pop(0)
                if failure is None:
                    self.close_connection = True
                    return
                status, text = failure
            else:
                status, text = 200, json.dumps(server.answer(self.path, body))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
