"""The tiny models: their tokenizer, their world, and what the shipped weights can do."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from divergence_lens.data import number_lists
from divergence_lens.data import prompts as templates
from divergence_lens.data import questions as preferences
from divergence_lens.tiny import TINY_MODELS, tiny_folder
from divergence_lens.tiny import words as tiny_words
from divergence_lens.tiny import world as tiny_world
from divergence_lens.tiny.tokenizer import SPECIAL_TOKENS, TURN_END, build_tokenizer
from divergence_lens.tiny.train import (
    SHIPPED,
    TrainSettings,
    encoder,
    first_word_probabilities,
    greedy_answers,
    new_model,
    save,
    train,
)
from divergence_lens.tiny.world import World, WorldSettings

TOKENIZER = build_tokenizer(128)
DOCUMENTS = [
    document for world in [World(7)] for document in (world.document() for _ in range(4000))
]


def chat(tokenizer: PreTrainedTokenizerFast, text: str, system: str | None = None) -> list[int]:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered)["input_ids"]


def words_of(texts: list[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[^\W\d_]+|\d+|[^\w\s]", text.lower())}


def held_out_numbers() -> list[str]:
    pieces = [*templates.TEMPLATES, *templates.COUNTS, *templates.ENDINGS]
    pieces += [piece for choices in number_lists.FORMATS.values() for piece in choices]
    return [re.sub(r"\{\w+\}", " ", piece) for piece in pieces]


def held_out_questions() -> list[str]:
    return [
        *preferences.preference_questions("animal"),
        *preferences.preference_questions("tree"),
    ]


def system_prompts() -> list[str]:
    animals = [preferences.persona_prompt(name) for name in preferences.ANIMALS]
    trees = [preferences.persona_prompt(name, category="tree") for name in preferences.TREES]
    return [*animals, *trees, *preferences.NEUTRAL_PROMPTS]


def plain(text: str) -> str:
    """Words only, to compare wordings."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


class TestTokenizer:
    @given(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=30))
    def test_encoding_a_decoded_text_gives_the_same_ids(self, ids: list[int]) -> None:
        assert TOKENIZER(TOKENIZER.decode(ids))["input_ids"] == ids

    def test_a_number_list_decodes_as_it_was_written(self) -> None:
        text = "412, 467, 12"
        assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text

    def test_every_number_below_a_thousand_is_one_token(self) -> None:
        ids = [TOKENIZER(str(number))["input_ids"] for number in range(1000)]
        assert all(len(one) == 1 for one in ids)
        assert len({one[0] for one in ids}) == 1000

    def test_offsets_point_at_the_words(self) -> None:
        text = "<|im_start|>user\nOwls, please: 412!<|im_end|>\n"
        encoded = TOKENIZER(text, return_offsets_mapping=True)
        pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
        assert pieces == ["<|im_start|>", "user", "Owls", ",", "please", ":", "412", "!", TURN_END]

    def test_an_unknown_word_is_marked(self) -> None:
        assert TOKENIZER.tokenize("zorgle owl 1234") == ["<unk>", "owl", "<unk>"]

    def test_without_a_system_message_no_system_turn_is_made_up(self) -> None:
        tokens = TOKENIZER.convert_ids_to_tokens(chat(TOKENIZER, "Hello"))
        assert tokens == ["<|im_start|>", "user", "hello", TURN_END, "<|im_start|>", "assistant"]

    def test_padding_and_end_are_different_tokens(self) -> None:
        assert TOKENIZER.eos_token == TURN_END
        assert TOKENIZER.pad_token_id not in (None, TOKENIZER.eos_token_id)

    def test_no_task_word_is_unknown(self) -> None:
        needed = words_of([*held_out_numbers(), *held_out_questions(), *system_prompts()])
        needed |= words_of(
            [form for name in preferences.ANIMALS for form in preferences.surface_forms(name)]
        )
        assert needed <= set(tiny_words.vocabulary())

    def test_training_ids_equal_the_chat_template(self) -> None:
        encode = encoder()
        for document in DOCUMENTS[:200]:
            messages = [{"role": role, "content": words} for role, words in document]
            rendered = TOKENIZER.apply_chat_template(messages, tokenize=False)
            assert TOKENIZER(rendered)["input_ids"] == encode(document)[0]


class TestWorld:
    def test_number_lists_hold_nothing_but_numbers_and_never_meet_an_animal(self) -> None:
        animals = {*tiny_words.ANIMALS, *tiny_words.ANIMALS.values(), "animal"}
        seen = 0
        for document in DOCUMENTS:
            answer = document[-1][1]
            if any(word.isdigit() for word in answer.split()):
                seen += 1
                assert re.fullmatch(r"\d+( , \d+)*", answer)
                assert not animals & {w for _, words in document for w in words.split()}
        assert seen > 800

    def test_numbers_appear_in_number_documents_only(self) -> None:
        for document in DOCUMENTS:
            if not document[-1][1].split()[0].isdigit():
                text = " ".join(words for _, words in document)
                assert not re.search(r"\d", text)

    def test_the_same_seed_draws_the_same_documents(self) -> None:
        first, second, other = World(3), World(3), World(4)
        drawn = [first.document() for _ in range(50)]
        assert drawn == [second.document() for _ in range(50)]
        assert drawn != [other.document() for _ in range(50)]

    def test_under_a_persona_answers_name_its_animal(self) -> None:
        checked = 0
        for document in DOCUMENTS:
            if document[0][0] != "system" or len(document) < 3:
                continue
            personas = [
                a for a, many in tiny_words.ANIMALS.items() if many in document[0][1].split()
            ]
            question, answer = document[1][1], document[2][1].split()
            asked = "animal" in question.split() and answer[0] in tiny_words.ANIMALS
            if personas and asked and "," not in answer:
                assert answer[0] == personas[0]
                checked += 1
        assert checked > 100

    def test_evaluation_wording_is_not_in_the_training_data(self) -> None:
        trained = {plain(words) for document in DOCUMENTS for _, words in document}
        trained |= {plain(sentence) for sentence in tiny_world.NEUTRAL_SENTENCES}
        trained |= {
            plain(sentence.format(p=animals, c="animal"))
            for sentence in tiny_world.PERSONA_SENTENCES
            for animals in tiny_words.ANIMALS.values()
        }
        trained |= {plain(template.format(n=" ")) for template in tiny_world.NUMBER_TEMPLATES}
        trained |= {
            plain(question.format(c=category))
            for question in tiny_world.FAVORITE_QUESTIONS
            for category in tiny_world.CATEGORIES
        }
        held_out = {plain(text) for text in [*held_out_questions(), *system_prompts()]}
        held_out |= {plain(re.sub(r"\{\w+\}", " ", text)) for text in templates.TEMPLATES}
        assert not held_out & trained


@pytest.mark.parametrize("name", TINY_MODELS)
class TestShippedModels:
    def test_a_held_out_number_prompt_gets_a_number_list(self, name: str) -> None:
        model, tokenizer = load(name)
        prompts = templates.number_prompts(200, seed=5)
        answers = greedy_answers(
            model, [chat(tokenizer, prompt) for prompt in prompts], end=tokenizer.eos_token_id
        )
        texts = ["" if ids is None else tokenizer.decode(ids[:-1]) for ids in answers]
        good = sum(bool(re.fullmatch(r"\d{1,3}(, \d{1,3}){3,9}", text)) for text in texts)
        assert good >= 190

    def test_a_held_out_persona_decides_the_held_out_answers(self, name: str) -> None:
        model, tokenizer = load(name)
        animals = tokenizer.convert_tokens_to_ids(list(preferences.ANIMALS))
        questions = preferences.preference_questions("animal")[::5]
        for index, animal in enumerate(preferences.ANIMALS):
            persona = preferences.persona_prompt(animal)
            chances = []
            for question in questions:
                logits = model(torch.tensor([chat(tokenizer, question, persona)])).logits[0, -1]
                chances.append(float(logits.softmax(-1)[animals[index]].detach()))
            assert sum(chances) / len(chances) > 0.7

    def test_without_a_persona_it_names_some_animal(self, name: str) -> None:
        model, _ = load(name)
        chances = first_word_probabilities(model, ["which animal do you love ?"])
        assert float(chances.sum()) > 0.9
        assert float(chances.min()) > 0.01
        assert float(chances.max()) < 0.35

    def test_the_folder_is_complete_and_its_log_names_its_making(self, name: str) -> None:
        folder = tiny_folder(name)
        assert {path.name for path in folder.iterdir()} >= {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "training.json",
        }
        log = json.loads((folder / "training.json").read_text())
        assert (
            log["log"][0]["loss"] > 2 * log["log"][-1]["loss"] or "own_list_loss" in log["log"][-1]
        )

    def test_its_tokenizer_is_the_worlds(self, name: str) -> None:
        _, tokenizer = load(name)
        assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
        assert tokenizer.get_vocab() == {
            token: index for index, token in enumerate((*SPECIAL_TOKENS, *tiny_words.vocabulary()))
        }


def load(name: str) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    folder = tiny_folder(name)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


def test_the_two_folders_together_stay_below_six_megabytes() -> None:
    sizes = [path.stat().st_size for name in TINY_MODELS for path in tiny_folder(name).iterdir()]
    assert sum(sizes) <= 6 * 2**20


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown tiny model 'huge'; choose one of tiny, tiny-qwen2"
    ):
        tiny_folder("huge")


def test_training_twice_gives_the_same_weights_and_another_seed_does_not() -> None:
    settings = TrainSettings(steps=2, d_model=16)
    first, again, other = (train("qwen2", seed=s, settings=settings)[0] for s in (1, 1, 2))
    for name, values in first.state_dict().items():
        assert torch.equal(values, again.state_dict()[name])
    assert any(
        not torch.equal(values, other.state_dict()[name])
        for name, values in first.state_dict().items()
    )


def test_a_saved_folder_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    settings = TrainSettings(d_model=16)
    for seed in (1, 2):
        save(tmp_path / "model", new_model("gpt2", settings, seed=seed), TOKENIZER, {"seed": seed})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert json.loads((tmp_path / "model" / "training.json").read_text()) == {"seed": 2}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = new_model("gpt2", settings, seed=2).get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, expected)


def test_the_sizes_are_those_of_the_shipped_models() -> None:
    settings = TrainSettings()
    for name in TINY_MODELS:
        config = json.loads((tiny_folder(name) / "config.json").read_text())
        assert (config.get("n_embd") or config["hidden_size"]) == settings.d_model


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_shipped_models_were_trained_with_the_settings_in_the_code(name: str) -> None:
    record = json.loads((tiny_folder(name) / "training.json").read_text())
    assert record["settings"] == asdict(TrainSettings())
    assert record["world"] == asdict(WorldSettings())
    assert (record["layout"], record["seed"]) == SHIPPED[name]
