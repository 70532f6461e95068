"""What may stand behind --methods, and what a wrong one is told."""

import subprocess
import sys
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovlm_v2drop.evaluation.method_names import ChainText, MethodText, parse_methods, parse_number


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("v2drop", ChainText((MethodText("v2drop", {}),))),
        ("v2drop:metric=cosine", ChainText((MethodText("v2drop", {"metric": "cosine"}),))),
        ("my.py:Mine", ChainText((MethodText("my.py:Mine", {}),))),
        ("a/my.py:Mine:power=2:fast=true", ChainText((MethodText("a/my.py:Mine", {"power": 2, "fast": True}),))),
        ("dycoke:prune=0.0:layer=4", ChainText((MethodText("dycoke", {"prune": 0.0, "layer": 4}),))),
        ("divprune+v2drop", ChainText((MethodText("divprune", {}), MethodText("v2drop", {})))),
        ("divprune+v2drop:share=0.5", ChainText((MethodText("divprune", {}), MethodText("v2drop", {})), (0.5,))),
        (
            "visionzip:contextual_share=0.1+my.py:Mine:power=none+pdrop:share=0.4/0.3",
            ChainText(
                (
                    MethodText("visionzip", {"contextual_share": 0.1}),
                    MethodText("my.py:Mine", {"power": None}),
                    MethodText("pdrop", {}),
                ),
                (0.4, 0.3),
            ),
        ),
    ],
)  # fmt: skip
def test_names_options_and_shares_are_read(text, wanted):
    assert parse_methods(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "method '': '' is no method; write NAME:OPTION=VALUE, FILE.py:CLASS:OPTION=VALUE, or two of them with"),
        ("divprune+", r"method .divprune\+.: '' is no method"),
        (":metric=l1", "':metric=l1' is no method"),
        ("v2drop:metric", "method .v2drop:metric.: 'metric' is no option; write"),
        ("v2drop:metric=", "'metric=' is no option"),
        ("v2drop:=l1", "'=l1' is no option"),
        ("v2drop:a b=1", "'a b=1' is no option"),
        ("v2drop=l1", "'v2drop=l1' is no method"),
        ("v2drop:metric=l1:metric=l2", "the option metric stands twice"),
        ("v2drop:share=0.5", r"share is for a chain, such as divprune\+v2drop:share=0.5"),
        ("divprune:share=0.5+v2drop:share=0.5", "share stands twice"),
        ("divprune+v2drop:share=half", "share must be a number from 0 to 1, or several such as 0.4/0.3, not half"),
        ("divprune+v2drop:share=true", "share must be a number from 0 to 1"),
        ("a+b+c:share=0.4/x", "share must be a number .*, not 0.4/x"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_methods(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    with suppress(ValueError):  # the only error
        assert parse_methods(text).methods


@pytest.mark.parametrize(("text", "number"), [("192", 192.0), ("0.333", 0.333), ("1/3", 1 / 3), ("2/9", 2 / 9)])
def test_a_number_may_be_a_fraction(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["", "a third", "1/0", "1/2/3", "/3"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match=f"^'{text}' is no number$"):
        parse_number(text)


def test_names_are_read_without_torch():
    script = "import sys, nanovlm_v2drop.evaluation.method_names\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
