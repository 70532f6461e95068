"""A setting is accepted where it is of its kind, and refused by its name, its value and what is allowed where it is not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovlm_v2drop.models.config import LlavaConfig, SiglipVisionConfig, TextConfig, VisionConfig, VLMConfig, read_json_object
from nanovlm_v2drop.models.config.settings import (
    FLAG,
    Either,
    ListOf,
    MapOf,
    OneOf,
    Real,
    Text,
    Whole,
    kinds_of,
    or_null,
    require,
)


def test_a_config_made_in_python_is_checked_like_a_file() -> None:
    with pytest.raises(ValueError, match="hidden_size = '48' is not supported; expected a whole number from 1"):
        TextConfig(hidden_size="48")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rms_norm_eps = nan is not supported; expected a number"):
        TextConfig(rms_norm_eps=float("nan"))
    with pytest.raises(ValueError, match="image_token_id = True is not supported"):
        LlavaConfig(image_token_id=True)
    with pytest.raises(ValueError, match=r"eos_token_ids = \(\) is not supported; expected a list of 1 to 64"):
        dataclasses.replace(LlavaConfig(), eos_token_ids=())


def test_every_field_of_every_config_has_a_kind() -> None:
    configs = [TextConfig, VisionConfig, SiglipVisionConfig, *set(VLMConfig.families().values())]
    for config in configs:
        without = {item.name for item in dataclasses.fields(config)} - set(kinds_of(config))
        assert without <= {"text_config", "vision_config"}, config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
KINDS = [
    (Whole(1, 9), lambda value: type(value) is int and value in range(1, 10)),
    (Real(0, 1), lambda value: type(value) in (int, float) and 0 <= value <= 1),
    (OneOf(True, "a"), lambda value: value is True or value == "a"),
    (Text("a+"), lambda value: isinstance(value, str) and value.strip("a") == "" and value != ""),
]


@pytest.mark.parametrize(("kind", "holds"), KINDS, ids=[str(kind) for kind, _ in KINDS])
@given(value=json_values | st.integers(0, 10) | st.sampled_from(["a", "aa", 0.5, 1.0, 2.0]))
def test_a_kind_accepts_its_own_values_and_no_others(kind: Any, holds: Any, value: Any) -> None:
    assert kind.accepts(value) == holds(value)
    if not kind.accepts(value):
        with pytest.raises(ValueError, match=r"(?s)^name = .* is not supported; expected ") as caught:
            require("name", value, kind)
        assert str(caught.value).endswith(f"expected {kind}")
        assert len(str(caught.value)) < 400


def test_lists_and_objects_are_checked_inside() -> None:
    pair = ListOf(Whole(1, 9), 2, 2)
    assert pair.accepts([1, 9])
    assert pair.accepts((1, 9))
    for value in ([1], [1, 2, 3], [1, 10], [1, True], [1, None], "12", 12, None, {"0": 1, "1": 2}):
        assert not pair.accepts(value)
    flags = MapOf(FLAG)
    assert flags.accepts({})
    assert flags.accepts({"a": True})
    for value in ({"a": 1}, {"a": None}, [True], True):
        assert not flags.accepts(value)
    assert or_null(pair).accepts(None)
    assert Either(pair, FLAG).accepts(False)
    assert str(Either(pair, FLAG)) == "a list of 2, each a whole number from 1 to 9, or one of False, True"


@given(content=st.dictionaries(st.text(), json_values, max_size=4))
def test_a_settings_file_is_read_as_json_reads_it(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "settings.json"
    text = json.dumps(content)
    file.write_text(text)
    assert repr(read_json_object(file)) == repr(json.loads(text))  # repr, because NaN is not equal to itself


def test_a_huge_settings_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as opened:
        opened.truncate(2**26 + 1)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match=r"config\.json has 67108865 bytes; a settings file has at most 67108864"):
        read_json_object(file)
