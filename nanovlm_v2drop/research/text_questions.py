"""Questions about texts, made of sentences: a pass key, prices, places, and prose to continue.

Every question has a number, and the same number always gives the same question. The text of a question is one droppable
span. A paraphrased question has no noun or verb of the text: synonyms stand for things and occupations. How the answer opens
is the same for both, since it is fed after all tokens were dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from random import Random as Dice

ITEMS = {  # thing in the text -> another word for it
    "sofa": "couch",
    "bicycle": "bike",
    "stove": "cooker",
    "rug": "carpet",
    "mug": "cup",
    "automobile": "car",
    "photograph": "picture",
    "cellphone": "mobile phone",
    "necktie": "tie",
    "armchair": "easy chair",
    "sack": "bag",
    "refrigerator": "fridge",
    "television": "TV set",
    "wardrobe": "closet",
    "sneaker": "sports shoe",
    "infant bed": "crib",
    "lantern": "lamp",
    "novel": "book",
    "coat": "jacket",
    "vessel": "boat",
}
JOBS = {  # occupation in the text -> another word for it
    "lawyer": "attorney",
    "doctor": "physician",
    "teacher": "instructor",
    "writer": "author",
    "cook": "chef",
    "barber": "hairdresser",
    "pilot": "aviator",
    "actor": "performer",
    "sailor": "seaman",
    "policeman": "cop",
    "farmer": "grower of crops",
    "painter": "artist",
    "scientist": "researcher",
    "musician": "violinist",
    "salesman": "seller",
    "banker": "financier",
    "reporter": "journalist",
    "athlete": "sportsman",
    "priest": "clergyman",
    "soldier": "warrior",
}
NAMES = (
    *("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Liam", "Maria"),
    *("Nathan", "Olivia", "Peter", "Rachel", "Simon", "Teresa", "Victor"),
)
CITIES = (
    *("Rome", "Paris", "London", "Berlin", "Madrid", "Tokyo", "Cairo", "Oslo", "Vienna", "Dublin", "Lisbon", "Athens"),
    *("Moscow", "Delhi", "Boston", "Chicago", "Seattle", "Denver", "Houston", "Miami"),
)
FILLER = (
    "The {colour} bird sat on the {place} and sang for a while.",
    "In the {time}, the wind came from the {side} and moved the leaves.",
    "A {colour} train crossed the bridge near the {place}.",
    "Children played with a {colour} ball behind the {place}.",
    "The {time} was quiet, and nobody walked along the {place}.",
    "Clouds gathered in the {side}, but it did not rain in the {time}.",
    "Somebody had painted the door of the {place} {colour}.",
    "A dog slept in front of the {place} until the {time}.",
    "The road to the {side} was closed because of the {colour} flood.",
    "Old trees grew around the {place}, and their leaves were {colour}.",
)
WORDS = {
    "colour": ("red", "blue", "green", "yellow", "white", "black", "brown", "grey"),
    "place": ("river", "church", "market", "school", "station", "park", "mill", "harbour", "library", "garden"),
    "time": ("morning", "evening", "afternoon", "night", "summer", "winter", "autumn", "spring"),
    "side": ("north", "south", "east", "west"),
}
FACTS = 6  # prices or places in a text, of which one is asked for
CONTINUED = 400  # characters of prose behind the text, of which a model continues the first tokens


@dataclass(frozen=True)
class TextQuestion:
    """A text, the question behind it, how the answer opens, and the answer itself.

    The opening is fed to the model, so that an answer is right or wrong by its own tokens. Before a number it ends with the
    space, which is a token of its own in SmolLM2: "The pass key is a ..." would be a good answer too. `evidence` is the part
    of the text that holds the answer; prose has none.
    """

    kind: str
    number: int
    text: str
    question: str
    opening: str
    answer: str
    evidence: str = ""


def filler(dice: Dice) -> str:
    """A sentence that answers nothing."""
    return dice.choice(FILLER).format(**{name: dice.choice(words) for name, words in WORDS.items()})


def mixed(facts: Sequence[str], sentences: int, dice: Dice) -> str:
    """The facts among fillers, in random order, `sentences` in all."""
    lines = [*facts, *(filler(dice) for _ in range(sentences - len(facts)))]
    dice.shuffle(lines)
    return " ".join(lines)


def pass_key(number: int, sentences: int, paraphrased: bool, dice: Dice) -> TextQuestion:
    key = str(dice.randrange(10_000, 100_000))
    fact = f"The pass key is {key}. Remember it."
    question = "Which secret code should one not forget?" if paraphrased else "What is the pass key?"
    return TextQuestion("pass key", number, mixed([fact], sentences, dice), question, "The pass key is ", key, fact)


def price(number: int, sentences: int, paraphrased: bool, dice: Dice) -> TextQuestion:
    items = dice.sample(sorted(ITEMS), FACTS)
    prices = dict(zip(items, dice.sample(range(10, 100), FACTS), strict=True))
    facts = {item: f"The price of the {item} is {value} dollars." for item, value in prices.items()}
    text = mixed(list(facts.values()), sentences, dice)
    asked = dice.choice(items)
    question = f"How much does one pay for the {ITEMS[asked]}?" if paraphrased else f"What is the price of the {asked}?"
    return TextQuestion("price", number, text, question, f"The price of the {asked} is ", str(prices[asked]), facts[asked])


def place(number: int, sentences: int, paraphrased: bool, dice: Dice) -> TextQuestion:
    people = list(zip(*(dice.sample(group, FACTS) for group in (NAMES, sorted(JOBS), CITIES)), strict=True))
    facts = [f"{name} the {job} lives in {city}." for name, job, city in people]
    text = mixed(facts, sentences, dice)
    asked = dice.randrange(FACTS)
    name, job, city = people[asked]
    question = f"In which town is the home of the {JOBS[job]}?" if paraphrased else f"Where does {name} live?"
    return TextQuestion("place", number, text, question, f"{name} lives in", f" {city}", facts[asked])


RETRIEVAL: dict[str, Callable[[int, int, bool, Dice], TextQuestion]] = {"pass key": pass_key, "price": price, "place": place}


def retrieval(first: int, count: int, paraphrased: bool = False, shortest: int = 20, longest: int = 60) -> list[TextQuestion]:
    """The questions `first`, `first` + 1, ..., the three kinds in turn, on texts of `shortest` to `longest` sentences."""
    kinds, questions = list(RETRIEVAL), []
    for number in range(first, first + count):
        dice = Dice(f"text {number}")
        kind = kinds[number % len(kinds)]
        questions.append(RETRIEVAL[kind](number, dice.randint(shortest, longest), paraphrased, dice))
    return questions


def paraphrased(first: int, count: int) -> list[TextQuestion]:
    return retrieval(first, count, paraphrased=True)


def long_texts(first: int, count: int) -> list[TextQuestion]:
    return retrieval(first, count, shortest=150, longest=200)


def prose(first: int, count: int) -> list[TextQuestion]:
    """Passages of Python's language reference, as the interpreter ships it, and how each goes on."""
    chapters, questions = [" ".join(topics[name].split()) for name in sorted(topics)], []
    for number in range(first, first + count):
        dice = Dice(f"prose {number}")
        size = dice.randint(1400, 4000)
        chapter = dice.choice([chapter for chapter in chapters if len(chapter) > size + CONTINUED])
        start = chapter.index(" ", dice.randrange(len(chapter) - size - CONTINUED)) + 1
        end = chapter.rindex(" ", start, start + size)
        answer = chapter[end : end + CONTINUED]
        questions.append(TextQuestion("prose", number, chapter[start:end], "Continue the text.", "", answer))
    return questions


TEXTS: dict[str, Callable[[int, int], list[TextQuestion]]] = {
    "retrieval": retrieval,
    "paraphrased": paraphrased,
    "long": long_texts,
    "prose": prose,
}
