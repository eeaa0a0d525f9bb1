"""The tiny models' tokenizer: one token per word, mark or number, and a ChatML template."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from divergence_lens.tiny.words import vocabulary

PAD, UNKNOWN, TURN_START, TURN_END = "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, UNKNOWN, TURN_START, TURN_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML. A conversation without a system turn gets none."""


def build_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the world's vocabulary.

    It lowercases, splits words, runs of digits and single marks, and drops white space, so that
    `encode(decode(ids)) == ids`. Decoding puts no space before a mark: ``"412, 467, 12"``.

    Args:
        context: The longest input of the model, in tokens.

    Returns:
        A Hugging Face tokenizer whose end-of-sequence token is ``<|im_end|>``.
    """
    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"\d+|[^\W\d_]+|[^\w]|_"), behavior="isolated"),
        ]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            *(decoders.Replace(f" {mark}", mark) for mark in ":;)]}%"),
        ]
    )
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        model_max_length=context,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
