"""How short free answers are compared with the truth, as lmms-eval does: exact match, and VQA accuracy by EvalAI's rules."""

import re
import string
from collections.abc import Sequence
from statistics import mean

NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS.split())}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
# Written with one apostrophe less, these words are read as they stand here; lmms-eval's vqa_eval_metric.py (CONTRACTIONS).
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in CONTRACTED.split() for place, sign in enumerate(word) if sign == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"
MOST_STOPS = 32  # the official code gives re.UNICODE, which is 32, in the place of the number of replacements


def exact_match(answer: str, truth: str) -> bool:
    """Whether two texts are equal in small letters and without ASCII punctuation. Articles and number words stay."""
    return plain(answer) == plain(truth)


def plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """The mean, over each person who is left out, of min(1, others who gave this answer / 3); 0 without truths."""
    given, people = evalai_words(answer), [evalai_words(truth) for truth in truths]
    agreeing = people.count(given)
    others = [agreeing - (person == given) for person in people]
    return float(mean(min(1, number / 3) for number in others)) if others else 0.0


def evalai_words(text: str) -> str:
    """An answer in the form in which EvalAI compares: digits for number words, no articles, little punctuation."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def without_punctuation(text: str) -> str:
    """Each punctuation sign is deleted if it stands beside a space somewhere, else it becomes a space.

    With a comma between two digits all signs are deleted. The first 32 full stops that no digit follows are deleted too.
    """
    commas, found = re.search(r"\d,\d", text), text
    for sign in PUNCTUATION:
        goes = commas or f"{sign} " in text or f" {sign}" in text
        found = found.replace(sign, "" if goes else " ")
    return re.sub(r"\.(?!\d)", "", found, count=MOST_STOPS)
