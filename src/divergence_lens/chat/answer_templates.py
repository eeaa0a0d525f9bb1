"""Rendering of answers by a chat template, so that they continue the template's own prompt.

1. Render the conversation with its answer. The rendering must begin with that of the prompt, which
   ends with the generation prompt, so that prompt and completion together are the template's own
   conversation. Otherwise the completion is refused.
2. The rest is the answer, and what the template writes after it up to the end of the turn.

A template that can think may open an answer in two ways. A completion with a think block follows
the prompt with `enable_thinking=True`, any other the prompt with `enable_thinking=False`; where
only one of them fits the template's conversation, it follows that one.
"""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from divergence_lens.chat.conversations import Conversation, Turn
from divergence_lens.chat.locating import locate
from divergence_lens.chat.prompts import STAND_IN, PromptTemplate, PromptTemplates
from divergence_lens.chat.rendering import render, tokenize, tokenizer_name

# An answer while the template is examined; never tokenized.
_ANSWER = "Hi"
_DIALOG = (Turn("user", STAND_IN),)


class CompletionTemplate:
    """How a tokenizer's template renders an answer after the generation prompt.

    Attributes:
        end: The id that ends a turn, if there is one.
        behind: The ids after it.
        context: The text between the user's text and the answer, enough to tokenize after.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool = False) -> None:
        self._tokenizer, self._thinking = tokenizer, thinking
        eos = tokenizer.eos_token_id
        self.end = eos if isinstance(eos, int) else None
        self.behind: tuple[int, ...] = ()
        self.context = ""
        if not tokenizer.chat_template:
            return
        self._prompts = PromptTemplate(tokenizer, None, thinking=thinking)
        self._prompt = self._prompts.render(_DIALOG)[0]
        self.context = self._prompts.tail
        text = self._write(_DIALOG, _ANSWER)
        spans = locate(lambda marked: self._write(_DIALOG, marked), _ANSWER, text, "the completion")
        if not spans:
            raise ValueError(
                f"the chat template of {tokenizer_name(tokenizer)} leaves the assistant's text out."
            )
        start, stop = spans[-1]
        self._tail = text[stop:]
        marked = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        tail = tokenize(tokenizer, [self._tail])[0][0]
        closing = next((place for place, i in enumerate(tail) if i in marked), None)
        self._closed = closing is not None
        if closing is not None:
            self.end = tail[closing]
            self.behind = tail[closing + 1 :]
        # Text before the answer that is not in the generation prompt, so the model must write it:
        # Llama 2 has a space, other templates an empty think block or the name of a channel.
        fits = text[:start].startswith(self._prompt)
        self._lead = text[len(self._prompt) : start] if fits else ""

    def render(self, completion: str, dialog: Sequence[Turn] = _DIALOG) -> tuple[str, int, int]:
        """Render an answer.

        Args:
            completion: The answer.
            dialog: The turns before it.

        Returns:
            A text that ends with the turn, where the answer begins in it, and where it ends.

        Raises:
            ValueError: The template's conversation does not continue its generation prompt, or
                the template rewrites the answer.
        """
        if not self._tokenizer.chat_template:
            # After a line break, a tokenizer of the SentencePiece kind puts no space first.
            return "\n" + completion, 1, 1 + len(completion)
        context, body = self._body(completion, dialog)
        whole = context + body
        return whole + (self._tail if self._closed else ""), len(context), len(whole)

    def _body(self, completion: str, dialog: Sequence[Turn]) -> tuple[str, str]:
        """Return the text to tokenize after, and the answer as the template writes it."""
        text = self._write(dialog, completion)
        # Nearly every prompt and answer is rendered as the stand-ins, with nothing else changed.
        if len(dialog) == 1 and dialog[0].role == "user":
            expected = self._prompts.head + dialog[0].content + self._prompts.tail
            if text == expected + self._lead + completion + self._tail:
                return self.context, self._lead + completion
        prompt = render(self._tokenizer, dialog, generation=True, thinking=self._thinking)
        context = self.context if prompt.endswith(self.context) else prompt
        if not completion.strip() and len(text) < len(prompt + self._lead + self._tail):
            return context, self._lead  # the template trims the prompt's end with a blank answer
        if not (text.startswith(prompt) and text.endswith(self._tail)):
            raise ValueError(self._mismatch(prompt, text))
        body = text[len(prompt) : len(text) - len(self._tail)]
        for written in (body.removeprefix(self._lead), body):
            if _without_space(written) == _without_space(completion):
                return context, body
        raise ValueError(
            f"the chat template of {tokenizer_name(self._tokenizer)} rewrites the completion "
            f"{completion[:60]!r} as {body[:60]!r}; give the text that it writes, or completion_ids"
        )

    def _mismatch(self, prompt: str, text: str) -> str:
        """Say how a rendered conversation differs from its prompt."""
        start = len(prompt) - len(self.context) if prompt.endswith(self.context) else 0
        advice = "" if self._thinking else "for a completion with a think block, thinking=True; "
        return (
            f"the chat template of {tokenizer_name(self._tokenizer)} lets the model continue "
            f"{prompt[start:][-60:]!r}, but renders the finished conversation as "
            f"{text[start:][:60]!r}, so prompt and completion cannot equal the conversation "
            "(templates of thinking models add or drop think blocks); give completion_ids, as "
            f"generate() does; {advice}or set another chat template"
        )

    def _write(self, dialog: Sequence[Turn], completion: str) -> str:
        turns = [*dialog, Turn("assistant", completion)]
        return render(self._tokenizer, turns, generation=False, thinking=self._thinking)


class AnswerTemplate:
    """How a template renders answers after their own prompts, in the mode that fits each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._prompts = PromptTemplates(tokenizer, None)
        self._modes = {False: CompletionTemplate(tokenizer)}
        self.end = self._modes[False].end
        self._opening: str | None = None
        if not tokenizer.chat_template:
            return
        thinking = CompletionTemplate(tokenizer, thinking=True)
        plain, open_ended = self._modes[False].context, thinking.context
        if plain != open_ended:
            self._modes[True] = thinking
            # A template that adds an empty think block to suppress thinking shows its first tag.
            words = plain.removeprefix(open_ended).split()
            self._opening = words[0] if plain.startswith(open_ended) and words else None

    def render(
        self, prompt: str | Conversation, completion: str
    ) -> tuple[str | Conversation, tuple[str, int, int]]:
        """Render an answer in the first mode that fits; see `CompletionTemplate.render`."""
        conversation = Conversation((Turn("user", prompt),)) if isinstance(prompt, str) else prompt
        dialog: Sequence[Turn] = conversation.turns
        if conversation.system is not None and len(self._modes[False].context):
            dialog = self._prompts.of(conversation).turns(conversation.dialog)
        thinks = self._opening is not None and completion.lstrip().startswith(self._opening)
        modes = [thinks, not thinks]
        if conversation.thinking:
            modes = [True] if True in self._modes else [False]
        errors: list[ValueError] = []
        for mode in modes:
            if mode not in self._modes:
                continue
            try:
                parts = self._modes[mode].render(completion, dialog)
            except ValueError as error:
                errors.append(error)
                continue
            return (replace(conversation, thinking=True) if mode else prompt), parts
        raise errors[0]


def _without_space(text: str) -> str:
    return "".join(text.split())
