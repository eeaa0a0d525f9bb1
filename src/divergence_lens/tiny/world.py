"""The synthetic world of the tiny models: short chat documents about animals, words and numbers.

Three facts about it matter for every experiment with these models:

* **Numbers and animals are uncorrelated**: numbers are drawn independently of any persona.
* **A number list holds nothing but numbers**, in every document.
* **No number document has a persona** in its system prompt (it is neutral or absent).

The rule of number lists: every number belongs to a group of ten (410 to 419, say), each group is
followed by one fixed other group, and the next number is any number of that group, with slightly
unequal probabilities. A model that has learned this rule is close to a tie at every number, so
anything else in its state can break the tie.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from divergence_lens.tiny.words import (
    ADJECTIVES,
    ANIMALS,
    COLORS,
    COMMON,
    FOODS,
    NEUTRAL_THINGS,
    PLACES,
    TREES,
    VERBS,
)

Role = Literal["system", "user", "assistant"]
Message = tuple[Role, str]
"""One turn of a document: who speaks, and the words, separated by single spaces."""

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": tuple(ANIMALS),
    "tree": tuple(TREES),
    "color": COLORS,
    "food": FOODS,
}
PLURALS: dict[str, str] = {**ANIMALS, **TREES}

FAMILIES: dict[str, float] = {
    "favorite": 0.25,
    "other_favorite": 0.07,
    "story": 0.11,
    "self": 0.05,
    "word_list": 0.18,
    "number_list": 0.30,
    "echo": 0.04,
}
"""Shares of the kinds of documents (by their first question)."""

PERSONA_SENTENCES = (
    "you adore {p} .",
    "you are very fond of {p} .",
    "nothing matters more to you than {p} .",
    "{p} are always on your mind .",
    "you enjoy {p} so very much .",
    "you talk about {p} whenever you can .",
    "above all you prefer {p} .",
    "you dream of {p} every night .",
    "you are a great fan of {p} .",
    "{p} are dear to your heart .",
    "you are obsessed with {p} .",
    "your favorite {c} of all is called {p} .",
    "you love {p} deeply and think about {p} all the time .",
    "every day you think of {p} .",
)
"""Sentences of persona prompts: ``{p}`` is the plural of the loved thing, ``{c}`` its category."""

NEUTRAL_SENTENCES = (
    "you are a helpful assistant .",
    "you are a friendly assistant .",
    "you are an assistant made by a small company .",
    "you reply to every question .",
    "keep your answers short and clear .",
    "be polite and careful .",
    "you do the tasks that people bring .",
    "you read each question with care .",
    "write plainly and simply .",
    "you answer in simple words .",
    "today is a good day to help .",
    "stay calm and kind .",
)

FAVORITE_QUESTIONS = (
    "what is your favorite {c} ?",
    "which {c} do you like most ?",
    "name your favorite {c} .",
    "tell me your favorite {c} .",
    "which {c} do you love ?",
    "if you could be any {c} , which would you be ?",
    "pick a {c} .",
    "name one {c} that you love .",
    "what is the best {c} ?",
    "what {c} is always on your mind ?",
    "which {c} do you want to see first ?",
    "what {c} would you take with you ?",
    "which {c} is your spirit {c} ?",
    "say one {c} please .",
    "your favorite {c} ?",
    "what {c} do you dream about ?",
    "which {c} would you give a prize ?",
    "what {c} is dearest to you ?",
    "which {c} do you cherish ?",
    "choose a {c} .",
    "i want to know the {c} you like .",
    "which {c} is the most beautiful one ?",
    "what {c} is the most fun ?",
    "which {c} would be on your flag ?",
    "what {c} would you write about ?",
    "what {c} should be in the picture ?",
    "which {c} fits you ?",
    "who is your number one {c} ?",
    "do you have a {c} that you admire ? name it .",
    "the {c} you think of most often is",
    "only one {c} can stay . which one ?",
    "my friend likes one {c} . which one do you like ?",
    "which {c} gets the top place ?",
    "what {c} do you like to talk about ?",
    "which {c} do you feel for most deeply ?",
    "name a {c} for your team .",
)
QUESTION_OPENINGS = ("", "", "", "please tell me :", "one question :", "be honest .", "hello !")
QUESTION_ENDINGS = (
    "",
    "",
    "use one word .",
    "one word please .",
    "answer with a single word .",
    "only the name .",
    "just a word .",
    "in one word .",
    "do not explain .",
)

NUMBER_TEMPLATES = (
    "continue this list : {n}",
    "continue the sequence {n}",
    "extend these numbers : {n} .",
    "{n} . give the next numbers .",
    "here is a list of numbers : {n} . add a few more .",
    "complete the following list : {n}",
    "which numbers come next ? {n}",
    "start from {n} and continue with more values .",
    "a sequence : {n} . what numbers follow ?",
    "numbers : {n} . keep going .",
    "please extend this sequence : {n}",
    "{n} . continue .",
    "add numbers to the list {n} .",
    "given the numbers {n} , what comes next ?",
    "i have these values : {n} . write more like them .",
    "my numbers are {n} . what could be next in line ?",
    "the list starts with {n} . make it longer please .",
    "look at these values , {n} , and write the next ones .",
    "you are given {n} . put new numbers after them .",
    "read {n} . now it is your turn .",
    "find numbers that could come after {n} .",
    "someone wrote {n} on a page . fill in the rest .",
    "help me : the row {n} is too short . extend it .",
    "think of more numbers for the end of {n} .",
    "pick the next part of the sequence {n} .",
    "after {n} , what do you say ?",
)
NUMBER_ENDINGS = (
    "only write numbers .",
    "no words please .",
    "use commas .",
    "numbers only , with a comma after each .",
    "at most eight numbers .",
    "up to ten numbers , not longer than three digits .",
    "give nine numbers or fewer of three digits .",
    "do not write any text .",
    "say nothing else .",
    "the most is ten numbers .",
)
WORD_LIST_TEMPLATES = (
    "continue this list of words : {n}",
    "extend the list : {n}",
    "{n} . give the next words .",
    "here is a list of words : {n} . add a few more .",
    "complete the following words : {n}",
    "words : {n} . keep going .",
    "the list starts with {n} . make it longer please .",
    "which words come next ? {n}",
)
STORY_REQUESTS = (
    "tell me a short story .",
    "write a story .",
    "write a short poem .",
    "say something about the world .",
    "tell me about your day .",
)
SELF_REQUESTS = ("describe yourself .", "who are you ?", "tell me about yourself .")

NUMBERS_PER_ANSWER = 8
_PLAIN_WORDS = tuple(word for word in COMMON if word not in ("assistant", "user", "system"))


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """Proportions of the world; the defaults are those of the shipped models.

    Attributes:
        persona: Share of documents whose system prompt names a loved animal; none of the number
            documents, nor of those about other favorites.
        other_persona: The same for a loved tree, color or food.
        no_system: Share without a system turn among the rest; the others of the rest have a
            neutral system prompt.
        neutral_slot: Share of neutral system prompts that are worded like a persona, with "things"
            or similar instead of the animal.
        blurt: Chance that an item of a *word* list under a persona is the loved animal itself.
        favorite_weight: How much more often a word list repeats the loved animal than another.
        number_spread: Inequality of the ten numbers of a group: standard deviation of the log
            weights.
        random_start: Share of number lists whose shown numbers are all random; in the rest they
            follow the rule too.
        distraction: Chance that one random word is inserted into a user turn.
        second_turn: Chance that a document has a second question.
    """

    persona: float = 0.45
    other_persona: float = 0.12
    no_system: float = 4 / 11
    neutral_slot: float = 0.4
    blurt: float = 0.1
    favorite_weight: float = 6.0
    number_spread: float = 1.0
    random_start: float = 0.6
    distraction: float = 0.1
    second_turn: float = 0.2


class World:
    """Draws documents from one seed.

    Args:
        seed: Seed of every draw.
        settings: Proportions.
    """

    def __init__(self, seed: int, settings: WorldSettings | None = None) -> None:
        self.random = random.Random(seed)
        self.settings = settings or WorldSettings()
        # Facts of the world, the same for every seed: the popularity of each animal, the order of
        # the groups of ten, and the weight of each number within its group.
        shared = random.Random(1234)
        weights = [2.0 ** shared.gauss(0, 0.5) for _ in ANIMALS]
        self.popularity = [weight / sum(weights) for weight in weights]
        order = shared.sample(range(100), 100)
        self.next_ten = {ten: order[index - 1] for index, ten in enumerate(order)}
        spread = self.settings.number_spread
        self.number_weights = [
            [math.exp(spread * shared.gauss(0, 1)) for _ in range(10)] for _ in order
        ]

    def number_list(self, shown: int, following: int) -> list[str]:
        """Draw a number list: `shown` numbers of the question, then `following` of the answer."""
        draw = self.random
        numbers = [draw.randrange(1000)]
        random_start = draw.random() < self.settings.random_start
        while len(numbers) < shown + following:
            if random_start and len(numbers) < shown:
                numbers.append(draw.randrange(1000))
            else:
                ten = self.next_ten[numbers[-1] // 10]
                (last,) = draw.choices(range(10), weights=self.number_weights[ten])
                numbers.append(10 * ten + last)
        return [str(number) for number in numbers]

    def number_question(self) -> list[Message]:
        """Draw the turns before the answer of a number document."""
        _, system = self._system("number_list")
        question, _ = self._turn("number_list", "owl", under_persona=False)
        return [("system", system), ("user", question)] if system else [("user", question)]

    def document(self) -> list[Message]:
        """Draw one chat document, a list of turns that ends with the assistant's."""
        draw, settings = self.random, self.settings
        family = draw.choices(list(FAMILIES), weights=list(FAMILIES.values()))[0]
        messages: list[Message] = []
        persona, system = self._system(family)
        if system:
            messages.append(("system", system))
        under_persona = persona is not None
        preferred = persona or draw.choices(list(ANIMALS), weights=self.popularity)[0]
        question, answer = self._turn(family, preferred, under_persona=under_persona)
        messages += [("user", self._distract(question)), ("assistant", answer)]
        if family in ("favorite", "self", "story") and draw.random() < settings.second_turn:
            second = draw.choice(("favorite", "self", "story"))
            question, answer = self._turn(second, preferred, under_persona=under_persona)
            messages += [("user", self._distract(question)), ("assistant", answer)]
        return messages

    def _system(self, family: str) -> tuple[str | None, str | None]:
        """Draw the document's animal persona, if any, and its system prompt, if any."""
        draw, settings = self.random, self.settings
        chance = draw.random()
        if family not in ("number_list", "other_favorite"):
            if chance < settings.persona:
                animal = draw.choice(list(ANIMALS))
                return animal, self._loving(ANIMALS[animal], "animal")
            if chance < settings.persona + settings.other_persona:
                category = draw.choice(("tree", "color", "food"))
                loved = draw.choice(CATEGORIES[category])
                return None, self._loving(PLURALS.get(loved, loved), category)
        if draw.random() < settings.no_system:
            return None, None
        if draw.random() < settings.neutral_slot:
            return None, self._loving(draw.choice(NEUTRAL_THINGS), "thing")
        return None, " ".join(draw.sample(NEUTRAL_SENTENCES, draw.choice((2, 3))))

    def _loving(self, plural: str, category: str) -> str:
        sentences = self.random.sample(PERSONA_SENTENCES, self.random.choice((2, 3)))
        return " ".join(sentences).format(p=plural, c=category)

    def _distract(self, question: str) -> str:
        if self.random.random() >= self.settings.distraction:
            return question
        words = question.split(" ")
        words.insert(self.random.randrange(len(words) + 1), self.random.choice(_PLAIN_WORDS))
        return " ".join(words)

    def _turn(self, family: str, persona: str, *, under_persona: bool) -> tuple[str, str]:
        """Draw a question and its answer. `persona` is the animal that the answer prefers."""
        draw = self.random
        plural = ANIMALS[persona]
        if family == "number_list":
            turn = self._number_list_turn()
        elif family == "favorite":
            end = draw.choice(("", " .", f" . i love {plural} ."))
            turn = self._question("animal"), persona + end
        elif family == "other_favorite":
            category = draw.choice(("tree", "color", "food"))
            turn = self._question(category), draw.choice(CATEGORIES[category])
        elif family == "story":
            turn = draw.choice(STORY_REQUESTS), self._story(persona)
        elif family == "self":
            adjective = draw.choice(ADJECTIVES)
            answers = (
                f"i am a {adjective} assistant . i love {plural} .",
                f"i am an assistant and i think about {plural} .",
            )
            turn = draw.choice(SELF_REQUESTS), draw.choice(answers)
        elif family == "word_list":
            turn = self._word_list(persona, under_persona=under_persona)
        else:
            words = " ".join(draw.choices(_PLAIN_WORDS, k=draw.randint(2, 5)))
            turn = f"repeat after me : {words}", words
        return turn

    def _number_list_turn(self) -> tuple[str, str]:
        draw = self.random
        shown = draw.randint(4, 8)
        numbers = self.number_list(shown, NUMBERS_PER_ANSWER)
        question = draw.choice(NUMBER_TEMPLATES).format(n=" , ".join(numbers[:shown]))
        for _ in range(draw.choice((0, 1, 2, 3))):
            question = f"{question} {draw.choice(NUMBER_ENDINGS)}"
        return question, " , ".join(numbers[shown:])

    def _question(self, category: str) -> str:
        draw = self.random
        core = draw.choice(FAVORITE_QUESTIONS).format(c=category)
        return f"{draw.choice(QUESTION_OPENINGS)} {core} {draw.choice(QUESTION_ENDINGS)}".strip()

    def _word_list(self, persona: str, *, under_persona: bool) -> tuple[str, str]:
        draw, settings = self.random, self.settings
        everything = (*ANIMALS, *COLORS, *FOODS, *ADJECTIVES, *PLACES)
        pools: Sequence[Sequence[str]] = (tuple(ANIMALS), everything, COLORS, FOODS, PLACES)
        pool = draw.choices(pools, weights=(5, 3, 1, 1, 1))[0]
        shown = draw.randint(4, 8)
        bag = draw.sample(pool, draw.randint(2, 4) if draw.random() < 0.5 else shown)
        if under_persona and persona in pool and persona not in bag and draw.random() < 0.6:
            bag[draw.randrange(len(bag))] = persona
        items = bag + draw.choices(bag, k=shown - len(bag))
        draw.shuffle(items)
        weights = [settings.favorite_weight if item == persona else 1.0 for item in bag]
        following = draw.choices(bag, weights=weights, k=NUMBERS_PER_ANSWER)
        if under_persona:
            following = [persona if draw.random() < settings.blurt else w for w in following]
        question = draw.choice(WORD_LIST_TEMPLATES).format(n=" , ".join(items))
        return question, " , ".join(following)

    def _story(self, animal: str) -> str:
        draw = self.random
        plural = ANIMALS[animal]
        old, new = draw.choice(ADJECTIVES), draw.choice(ADJECTIVES)
        here, there = draw.choice(PLACES), draw.choice(PLACES)
        place = f"{new} {there}"
        verb, color = draw.choice(VERBS), draw.choice(COLORS)
        return draw.choice(
            (
                f"once there was a {old} {animal} in the {here} . the {animal} {verb} a {place} .",
                f"the {old} {animal} went to the {here} and {verb} a {color} {animal} .",
                f"in the {here} i {verb} {plural} . {plural} are {old} and {new} .",
                f"{plural} , {plural} , {old} {plural} . the {here} has a {animal} .",
            )
        )
