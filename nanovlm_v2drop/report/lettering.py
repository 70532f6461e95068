"""Text in drawn pictures: a font that has its characters, and lines that fit into a width."""

from collections.abc import Callable, Iterator
from functools import cache

from PIL import ImageFont

SIZE = 15  # pixels
LINE = 20  # pixels from one line to the next
# Pillow's own font has the letters of English only. Of these, which common systems install, the first suitable one is taken.
SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "wqy-microhei.ttc", "NotoSans-Regular.ttf"),
    *("Arial Unicode.ttf", "PingFang.ttc", "AppleGothic.ttf", "msyh.ttc", "malgun.ttf", "arial.ttf"),
)
NO_CHARACTER = "\uffff"  # is drawn as the box of a missing character in every font

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def font_for(text: str) -> Font:
    """The first font of this machine that has all characters of `text`, or else lacks the fewest of them."""
    characters = {character for character in text if not character.isspace()}
    best, lacking = ImageFont.load_default(SIZE), len(characters)
    for font in known_fonts():
        missing = sum(is_missing(font, character) for character in characters)
        if missing < lacking:
            best, lacking = font, missing
        if not missing:
            break
    return best


def known_fonts() -> Iterator[Font]:
    """Pillow's own font, then those of SYSTEM_FONTS that are installed, each looked for when it is needed."""
    yield ImageFont.load_default(SIZE)
    for name in SYSTEM_FONTS:
        if (font := system_font(name)) is not None:
            yield font


@cache
def system_font(name: str) -> Font | None:
    try:
        return ImageFont.truetype(name, SIZE)
    except OSError:
        return None


def is_missing(font: Font, character: str) -> bool:
    """Whether a font draws a character as it draws one that does not exist."""
    return bytes(font.getmask(character)) == bytes(font.getmask(NO_CHARACTER))


def lines_of(text: str, width: int) -> tuple[Font, list[str]]:
    """The font of a text, and its lines of at most `width` pixels, one at least; line breaks in it count as spaces."""
    font = font_for(text)
    return font, fitted(text, lambda line: font.getlength(line) <= width)


def fitted(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Lines that are broken between words, and inside a word that does not fit into a line by itself."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if fits(longer):
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for character in word:
            if lines[-1] and not fits(lines[-1] + character):
                lines.append("")
            lines[-1] += character
    return lines
