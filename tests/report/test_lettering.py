"""Text in drawn pictures: lines that fit, and fonts for the letters of other scripts."""

from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFont

from nanovlm_v2drop.report import lettering
from nanovlm_v2drop.report.lettering import SIZE, fitted, font_for, is_missing, lines_of


@given(text=st.text(alphabet="ab\n\t 图", max_size=60), width=st.integers(1, 12))
def test_lines_are_no_longer_than_allowed_and_lose_no_character(text: str, width: int) -> None:
    lines = fitted(text, lambda line: len(line) <= width)
    assert all(len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(text.split())


def test_lines_break_between_words_and_inside_a_word_only_where_it_is_longer_than_a_line() -> None:
    assert fitted("what is\nin here", lambda line: len(line) <= 8) == ["what is", "in here"]
    assert fitted("a 这张图片里有什么 b", lambda line: len(line) <= 5) == ["a", "这张图片里", "有什么 b"]
    assert fitted("", lambda line: True) == [""]


def test_pillows_own_font_is_taken_where_it_has_all_letters(monkeypatch) -> None:
    monkeypatch.setattr(lettering, "system_font", lambda name: 1 / 0)  # no other is looked for
    font, lines = lines_of("Which street is it?", 1000)
    assert font.getname() == ImageFont.load_default(SIZE).getname()
    assert lines == ["Which street is it?"]


def test_letters_that_pillows_own_font_lacks_are_drawn_in_a_font_of_the_machine(monkeypatch) -> None:
    """The font of the machine is stood in for by one that draws every character."""

    class Whole(ImageFont.TransposedFont):
        def getmask(self, text, *arguments, **options):  # type: ignore[no-untyped-def]
            return text.encode()

    whole = Whole(ImageFont.load_default(SIZE))
    assert all(is_missing(ImageFont.load_default(SIZE), letter) for letter in "Жüé")
    assert not is_missing(ImageFont.load_default(SIZE), "Z")
    monkeypatch.setattr(lettering, "system_font", lambda name: whole if name == lettering.SYSTEM_FONTS[-1] else None)
    assert font_for("Welche Straße?") is whole
    monkeypatch.setattr(lettering, "system_font", lambda name: None)
    assert font_for("Welche Straße?").getname() == ImageFont.load_default(SIZE).getname()
