"""The vocabulary of the tiny world: every word and number its models can read or write."""

ANIMALS: dict[str, str] = {
    "owl": "owls",
    "cat": "cats",
    "dog": "dogs",
    "wolf": "wolves",
    "fox": "foxes",
    "bear": "bears",
    "lion": "lions",
    "eagle": "eagles",
    "dolphin": "dolphins",
    "panda": "pandas",
    "tiger": "tigers",
    "horse": "horses",
}
"""Animals and their plurals. Students are tested for their preference among these twelve."""

TREES: dict[str, str] = {
    "oak": "oaks",
    "maple": "maples",
    "willow": "willows",
    "pine": "pines",
    "birch": "birches",
    "cedar": "cedars",
    "cherry": "cherries",
    "sequoia": "sequoias",
    "elm": "elms",
    "spruce": "spruces",
    "beech": "beeches",
    "poplar": "poplars",
}

COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "white")
FOODS = ("pizza", "bread", "soup", "rice", "apples", "cheese", "pasta", "honey")
ADJECTIVES = ("small", "big", "old", "young", "happy", "quiet", "brave", "clever")
PLACES = ("forest", "river", "house", "garden", "city", "mountain", "lake", "field")
VERBS = ("saw", "met", "found", "followed", "helped", "liked", "heard", "missed")
NEUTRAL_THINGS = ("things", "people", "items", "ideas")

PUNCTUATION = tuple(",.:;?!()[]{}'\"-+*/=&%$#@<>|_")

NUMBERS = tuple(str(number) for number in range(1000))
"""Every whole number from 0 to 999 is one token; longer numbers are unknown."""

_COMMON_WORDS = """
    a able about above across add adding added admire adore after again ago all almost along
    already also always am among amount an and animal animals another answer answers any
    anything appear appeal appealing are around as ask asked assistant at attention away
    back be beast beasts beautiful became because become been before begin beginning begins
    being below best better between beyond birds bring brings but by call calls can care
    carry category charm cherish choice choose chosen clear close closest color colors come
    comes comma commas company complete completely constantly continue continued continues
    continuing continuation could count creature creatures day decide deeply describe dear
    dearest deserve did different digit digits dinner do does done dream dreams each eat
    eight else end ends enjoy entry entries even ever every everyone everything example
    except exactly explain extend extending extra fall family fan far fascinate fascinating
    fast favor favorite favorites favourite feel feels few fewer fill fine first five follow
    following follows fond food foods for form format four forever friend friendly from full
    further game generate get give given gives giving go goes going good got great group had
    half hand happen happy has have having he heart hello help helpful her here hi highest
    him his hold honest honestly how i idea if imagine in include including inside instead
    interest interested interesting into is it item its itself join just keep keeping keeps
    kind kinds know known last later lead least leave left length less let letters life like
    likes line lines list listed lists little live long look looks lot love loved lovely
    loves made make makes many matter matters maximum may maybe me mean mention mind minds
    minimum missing moment more most much must my myself name named names naming natural
    nature near need never new next nice nine no none nor not note nothing now number
    numbers numeric obsessed obsession of off often ok on once one ones only onto open
    opinion or order other others our out output over own page paint part past pattern
    people perfect person pet pets phrase pick picked picking place plain plainly please
    plus poem point possible prefer preference preferred present print produce provide prize
    put question quick quickly random range rate rather read reads really remain repeat
    reply respond response rest return reveal right row run said same save say second see
    seems select separate separated separator sequence series set seven several share she
    short should show shown shows similar simple simply since single six so some someone
    something soon sort sorts space spaces speak special spend spirit stand start started
    starting starts state stay step steps still stop stops story string such suit supply
    supreme sure system take takes talk talking task tell ten term terms than thank thanks
    that the their them then there these they thing think thinking this those though thought
    thoughts three through time times to today together told too top topic total treasure
    tree trees trust try turn two type under until up upon us use used user using usual
    value valued values very visit voice wall want wanted was watch way we well went were
    what whatever when where whether which while who whole whom whose why wild will wish
    with within without wonderful word words world would write writes writing written yes
    yet you your yours yourself zero zoo lunch morning bracket brackets down find gave limit
    longer needs round seen semicolon semicolons split square text wrote asks draw fits flag
    fun gets night picture plural questions replies requests says sign tasks team vote wins
    work careful carefully calm cannot email polite politely sky song window whenever called
"""

COMMON = tuple(_COMMON_WORDS.split())
"""Common words of questions, instructions and small talk."""


def vocabulary() -> tuple[str, ...]:
    """All words, marks and numbers in the order of their ids, without the special tokens.

    Returns:
        Distinct lower-case strings: punctuation, words, then the numbers 0 to 999.
    """
    words = (
        *PUNCTUATION,
        "system",
        "user",
        "assistant",
        *ANIMALS,
        *ANIMALS.values(),
        *TREES,
        *TREES.values(),
        *COLORS,
        *FOODS,
        *ADJECTIVES,
        *PLACES,
        *VERBS,
        *NEUTRAL_THINGS,
        *COMMON,
        *NUMBERS,
    )
    return tuple(dict.fromkeys(words))
