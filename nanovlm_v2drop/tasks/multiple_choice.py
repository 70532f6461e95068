"""Multiple-choice questions: how they are written, and how a letter is read from a free answer (lmms-eval's mcq_extract.py)."""

from collections.abc import Sequence

LETTER_PROMPT = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STRIPPED = (",", ".", "!", "?", ";", ":", "'", '"')  # from the ends of an answer, one after the other
FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))  # how an option is named, and how sure that is
AT_START, AT_END, AFTER_PHRASE, ANYWHERE = 10, 9, 7, 0
PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is", "best answer is"),
    *("the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is"),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
Candidate = tuple[int, int, str]  # how sure, where, and which letter


def option_lines(options: Sequence[str]) -> str:
    """The options, one a line, as "A. first"."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def letter_in(answer: str, letters: str = "ABCD") -> str:
    """The letter that an answer names, or "" if it names none; letters of an answer count in capitals only.

    Of all places where a letter stands, the surest counts: at the start, at the end, after "the answer is", as (A), A., A:, A)
    or "A ", and last anywhere at all. Of equally sure places the last one counts.
    """
    text = " " + without_ends(answer) + " "
    found = [*named(text, letters), *after_phrases(text, letters), *at_ends(text, letters)]
    found = found or [(ANYWHERE, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found)[2] if found else ""


def without_ends(answer: str) -> str:
    text = answer.strip()
    for mark in STRIPPED:
        text = text.strip(mark)
    return text


def named(text: str, letters: str) -> list[Candidate]:
    forms = [(form.format(letter), sure, letter) for form, sure in FORMS for letter in letters]
    return [(sure, text.rfind(form), letter) for form, sure, letter in forms if form in text]


def after_phrases(text: str, letters: str) -> list[Candidate]:
    """The first place of each letter, even within a word, behind the first place of each phrase."""
    lowered, found = text.lower(), []
    for phrase in PHRASES:
        start = lowered.find(phrase)
        if start >= 0:
            places = ((text.find(letter, start + len(phrase)), letter) for letter in letters)
            found += [(AFTER_PHRASE, place, letter) for place, letter in places if place >= 0]
    return found


def at_ends(text: str, letters: str) -> list[Candidate]:
    """A letter that begins or ends the text and is not part of a word."""
    bare, found = text.strip(), []
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((AT_START, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((AT_END, len(text) - 1, letter))
    return found


def begins_with_letter(text: str, letters: str = "ABCD") -> bool:
    """Whether `letter_in` is the same for every text that goes on from this one: it begins with a letter that stands alone."""
    begin = text.lstrip()
    for mark in STRIPPED:
        begin = begin.lstrip(mark)
    begin = begin.lstrip()
    follows = begin[1:2]  # the replacement character may still become a letter, when all its bytes are there
    return begin[:1] in letters and begin != "" and follows not in ("", "\N{REPLACEMENT CHARACTER}") and not follows.isalpha()
