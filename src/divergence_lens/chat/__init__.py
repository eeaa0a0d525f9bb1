"""From text to token ids through a chat template, and from token ids to readable text.

`encode_prompt` returns the ids of a prompt or conversation, each with the name of its segment, and
`encode_completion` those of an answer. Together they are the ids that the template gives for the
whole conversation.
"""

from divergence_lens.chat.completions import (
    after_turn,
    answer_header,
    decode,
    encode_answers,
    encode_completion,
    encode_completions,
    end_of_turn,
    stop_ids,
)
from divergence_lens.chat.conversations import (
    Conversation,
    Prompt,
    Turn,
    as_list,
    as_prompt,
    check_text,
    raw_ids,
    read_turns,
    split_conversation,
)
from divergence_lens.chat.display import (
    choice_texts,
    piece_bytes,
    row_texts,
    token_labels,
    token_texts,
)
from divergence_lens.chat.prompts import (
    SEGMENTS,
    Encoded,
    check_length,
    encode_prompt,
    encode_prompts,
)
from divergence_lens.chat.system_prompts import prompt_ids

__all__ = [
    "SEGMENTS",
    "Conversation",
    "Encoded",
    "Prompt",
    "Turn",
    "after_turn",
    "answer_header",
    "as_list",
    "as_prompt",
    "check_length",
    "check_text",
    "choice_texts",
    "decode",
    "encode_answers",
    "encode_completion",
    "encode_completions",
    "encode_prompt",
    "encode_prompts",
    "end_of_turn",
    "piece_bytes",
    "prompt_ids",
    "raw_ids",
    "read_turns",
    "row_texts",
    "split_conversation",
    "stop_ids",
    "token_labels",
    "token_texts",
]
