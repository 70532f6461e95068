"""The video demo: clips, questions, tokenizer, training rows, the start from demo's weights, and the shipped files."""

import json
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch

from nanovlm_v2drop.demo import clips, scenes, steps
from nanovlm_v2drop.demo.data import CLIPS, PATCH_WORDS, QWEN2_SPLIT, qwen2_tokenizer, video_corpus
from nanovlm_v2drop.demo.export import export_onevision
from nanovlm_v2drop.demo.recipe import Recipe
from nanovlm_v2drop.demo.steps import answer_loss, initialise, masked_layer, turn_bias
from nanovlm_v2drop.demo.train import DEMOS
from nanovlm_v2drop.demo.train_video import clip_features
from nanovlm_v2drop.demo.warm_start import warm_start
from nanovlm_v2drop.inference import generate, prefill
from nanovlm_v2drop.loading.zoo import MODELS, load
from nanovlm_v2drop.processing.prompts import Request
from nanovlm_v2drop.processing.tokenizer import load_tokenizer
from nanovlm_v2drop.tasks.demo_video import DemoVideo, chance, held_out

DEMO = DEMOS["demo-video"]


def many_clips(count: int) -> list[clips.Clip]:
    rng = Random(1)
    return [clips.any_clip(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return qwen2_tokenizer(video_corpus())


def actor(action: str, frame: int = 0, direction: str = "", **thing: object) -> clips.Actor:
    values = {"color": "red", "shape": "circle", "digit": 3, "x": 40, "y": 40, "size": 28} | thing
    return clips.Actor(scenes.Thing(**values), action, frame, direction, 8 if direction else 0)


def test_a_clip_is_drawn_the_same_every_time():
    clip = clips.any_clip(Random(4))
    first, second = clips.draw_clip(clip), clips.draw_clip(clip)
    assert [(frame.size, frame.mode) for frame in first] == [((144, 144), "RGB")] * 8
    assert all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))


def test_the_background_stands_still_and_only_acting_things_change_pixels():
    for clip in many_clips(30):
        frames = np.stack([np.asarray(frame) for frame in clips.draw_clip(clip)]).astype(int)
        changed = np.ptp(frames, axis=0).any(-1)
        for one in clip.actors:
            left, top, right, bottom = one.path
            inside = changed[top - 2 : bottom + 2, left - 2 : right + 2]
            assert inside.any() == (one.action != "stay")
            changed[top - 2 : bottom + 2, left - 2 : right + 2] = False
        assert not changed.any()


def test_things_appear_and_vanish_at_their_event_and_move_in_a_straight_line():
    shown = [actor("appear", 5).at(frame) is not None for frame in range(8)]
    assert shown == [False] * 5 + [True] * 3
    shown = [actor("vanish", 2).at(frame) is not None for frame in range(8)]
    assert shown == [True] * 2 + [False] * 6
    for direction, step in {"left": (-8, 0), "right": (8, 0), "up": (0, -8), "down": (0, 8)}.items():
        places = [actor("move", direction=direction).at(frame) for frame in range(8)]
        assert [(place.x - 40, place.y - 40) for place in places] == [(step[0] * n, step[1] * n) for n in range(8)]


def test_paths_do_not_touch_and_stay_inside_the_picture():
    for clip in many_clips(100):
        assert len({one.thing.name for one in clip.actors}) == len(clip.actors)
        for index, one in enumerate(clip.actors):
            left, top, right, bottom = one.path
            assert min(left, top) > 0
            assert max(right, bottom) < scenes.IMAGE_SIZE
            for other in clip.actors[:index]:
                assert other.path[0] > right or other.path[2] < left or other.path[1] > bottom or other.path[3] < top


def test_every_answer_can_be_read_off_what_the_frames_show():
    rng = Random(2)
    asked = Counter()
    for clip in many_clips(300):
        seen = sightings(clip)
        for kind in clips.KINDS:
            question = clips.ask(clip, kind, rng)
            if question is not None:
                asked[kind] += 1
                assert question.answer in clips.ANSWERS[kind]
                assert question.answer == true_answer(question.text.rstrip("?").split(), kind, seen), question
    assert min(asked[kind] for kind in clips.KINDS) > 50


def sightings(clip: clips.Clip) -> dict[str, dict[int, scenes.Thing]]:
    """The place of each thing in each frame: what a viewer sees, without the clip's own words for it."""
    seen: dict[str, dict[int, scenes.Thing]] = {}
    for frame in range(clips.FRAMES):
        for thing in clip.things(frame):
            seen.setdefault(thing.name, {})[frame] = thing
    return seen


def deed(places: dict[int, scenes.Thing]) -> str:
    if 0 not in places:
        return "appear"
    if clips.FRAMES - 1 not in places:
        return "vanish"
    return "stay" if places[0] == places[clips.FRAMES - 1] else "move"


def true_answer(words: list[str], kind: str, seen: dict[str, dict[int, scenes.Thing]]) -> str | None:
    """The true answer, found from the words of the question and the sightings alone; None if it is ambiguous."""
    event = {name: min(places) if 0 not in places else max(places) + 1 for name, places in seen.items()}
    if kind == "existence":
        return "yes" if " ".join(words[3:5]) in seen else "no"
    if kind == "digit":
        digits = {str(thing.digit) for thing in seen[" ".join(words[-2:])].values()}
        return digits.pop() if len(digits) == 1 else None
    if kind == "count":
        there = [places for places in seen.values() if "whole" in words or clips.FRAMES - 1 in places]
        return str(len(there))
    if kind == "color":
        matches = [name for name, places in seen.items() if clips.ACTIONS[deed(places)] == words[-1]]
        return matches[0].split()[0] if len(matches) == 1 else None
    if kind == "action":
        return deed(seen[" ".join(words[3:5])])
    if kind == "direction":
        places = seen[" ".join(words[5:7])]
        right, down = places[7].x - places[0].x, places[7].y - places[0].y
        return ("left" if right < 0 else "right") if down == 0 else ("up" if down < 0 else "down")
    first = " ".join(words[2:4])
    if deed(seen[first]) != words[4]:
        return None
    if kind == "half":
        return {-1: "first", 1: "second"}.get(int(np.sign(event[first] - 4)))
    second = " ".join(words[-2:])
    if deed(seen[second]) != words[4] or abs(event[first] - event[second]) < 2:
        return None
    return "before" if event[first] < event[second] else "after"


def test_the_end_may_show_fewer_things_than_the_whole_video():
    clip = clips.Clip((actor("vanish", 3), actor("stay", color="blue", x=100)), 0)
    answers = {question.text: question.answer for question in (clips.ask(clip, "count", Random(seed)) for seed in range(20))}
    whole, end = "How many objects are in the whole video?", "How many objects are there at the end of the video?"
    assert answers == {whole: "2", end: "1"}


def test_ambiguous_questions_are_not_asked():
    twice = clips.Clip((actor("appear", 4), actor("appear", 5, color="blue", x=100)), 0)
    assert clips.ask(twice, "color", Random(0)) is None
    assert clips.ask(twice, "order", Random(0)) is None
    assert clips.ask(clips.Clip(twice.actors[:1], 0), "half", Random(0)) is None
    assert clips.ask(twice, "direction", Random(0)) is None


def test_a_description_tells_every_deed():
    clip = clips.Clip((actor("vanish", 3, y=90), actor("move", direction="down", color="blue", digit=7)), 0)
    assert clips.describe(clip).answer == "blue circle 7 move down, red circle 3 vanish 3"


def test_held_out_samples_are_the_same_in_every_run_and_take_kinds_and_answers_in_turn():
    first, second = (list(DemoVideo().samples(80)) for _ in range(2))
    assert [sample.kind for sample in first] == [*clips.KINDS] * 10
    assert [(s.sample_id, s.text, s.answer) for s in first] == [(s.sample_id, s.text, s.answer) for s in second]
    assert np.array_equal(np.stack(first[0].video), np.stack(second[0].video))
    for kind, answers in clips.ANSWERS.items():
        given = Counter(sample.answer for sample in first if sample.kind == kind)
        assert max(given.values()) - min(given[answer] for answer in answers) <= 1


def test_the_default_run_asks_every_answer_of_a_kind_equally_often():
    assert all(DemoVideo.default_samples // len(clips.KINDS) % len(answers) == 0 for answers in clips.ANSWERS.values())
    assert [chance(kind) for kind in ("existence", "digit", "direction")] == [50, 10, 25]


def test_summary_scores_each_kind_by_hand():
    task, sample = DemoVideo(), held_out(0)
    assert (task.correct(f" {sample.answer.title()} ", sample), task.correct("purple", sample)) == (1.0, 0.0)
    records = [{"kind": "order", "correct": 1.0}, {"kind": "order", "correct": 0.0}, {"kind": "half", "correct": 1.0}]
    assert task.summary(records) == pytest.approx({"score": 200 / 3, "order": 50.0, "half": 100.0})
    with pytest.raises(ValueError, match="no record to score"):
        task.summary([])


def test_the_tokenizer_splits_as_the_official_qwen2_one(tokenizer):
    official = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    assert official.PRETOKENIZE_REGEX == QWEN2_SPLIT
    model = json.loads(tokenizer.to_str())["model"]
    other = official.Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    for text in ("What does it do?\n\n  It's 1234 times  é e\u0301\t<>!", "Does the red circle\r\nvanish?", "日本語"):
        ids = tokenizer.encode(text).ids
        assert ids == other.encode(text)
        assert tokenizer.decode(ids) == text.replace("e\u0301", "é")


def test_every_word_that_a_prompt_or_an_answer_holds_is_one_token(tokenizer):
    for words in (*PATCH_WORDS, *clips.ANSWERS.values()):
        assert all(len(tokenizer.encode(word).ids) == 1 for word in words)
    tokens = tokenizer.encode(CLIPS.prompt("Does the pink diamond vanish in the first or the second half of the video?")).tokens
    system = "<|im_start|> system Ċ You Ġare Ġa Ġhelpful Ġassistant . <|im_end|> Ċ <|im_start|> user Ċ <video> Ċ "
    question = "Does Ġthe Ġpink Ġdiamond Ġvanish Ġin Ġthe Ġfirst Ġor Ġthe Ġsecond Ġhalf Ġof Ġthe Ġvideo ? "
    assert " ".join(tokens) == system + question + "<|im_end|> Ċ <|im_start|> assistant Ċ"


def test_training_rows_ask_exactly_what_will_be_asked(tokenizer):
    batches = DEMO.instruct_batches(tokenizer, Recipe(instruct_batch=2), seed=0)
    prompt, answer = batches.turn_ids(scenes.Question("action", "What does the red circle do?", "stay"))
    template = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<video>\n"
    template += "What does the red circle do?<|im_end|>\n<|im_start|>assistant\n"
    video = tokenizer.token_to_id("<video>")
    assert [*batches.prefix, video, *prompt] == tokenizer.encode(template).ids
    assert answer == [*tokenizer.encode("stay").ids, tokenizer.token_to_id("<|im_end|>")]


def test_a_row_holds_the_clip_once_and_each_answer_behind_its_own_question(tokenizer):
    frames, ids, turns, positions, labels = next(iter(DEMO.instruct_batches(tokenizer, Recipe(instruct_batch=2), seed=0)))
    assert frames.shape == (2, 8, 144, 144, 3)
    video, end = tokenizer.token_to_id("<video>"), tokenizer.token_to_id("<|im_end|>")
    assert (ids == video).sum(1).tolist() == [289, 289]  # 8 frames of 6 x 6 and a newline
    start = 14 + 289
    for turn in range(1, int(turns[0].max()) + 1):
        row = turns[0] == turn
        assert positions[0][row].tolist() == list(range(start, start + int(row.sum())))
        assert labels[0][row][-1] == ids[0][row][-1] == end
        assert labels[0][row][0] == -100


def test_causal_blocks_give_what_one_attention_over_all_keys_gives():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2 * 20, 1, 4)
    bias = turn_bias(torch.tensor([[0] * 8 + [1] * 7 + [2] * 5, [0] * 8 + [1] * 12])).float()
    blocked = masked_layer._torchdynamo_orig_callable(Reads(q, k, v), torch.empty(40, 4), None, bias)
    heads = [part.view(2, 20, 1, 4).transpose(1, 2) for part in (q, k, v)]
    whole = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=bias)
    torch.testing.assert_close(blocked, whole.transpose(1, 2).flatten(0, 1))


class Reads(torch.nn.Module):
    """A layer that consists of its attention only."""

    def __init__(self, *heads: torch.Tensor) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, hidden_states, rotary, attend):
        return attend(*self.heads)


@pytest.fixture(scope="module")
def started(tokenizer):
    """A demo-video model before its first step: (model, values before the warm start)."""
    torch.manual_seed(0)
    model = DEMO.make_model(DEMO.make_config(tokenizer))
    initialise(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    warm_start(model, tokenizer)
    return model, before


def test_a_warm_start_copies_the_demos_decoder_with_zero_biases(started):
    model, before = started
    demo = load("demo").model.state_dict()
    after = model.state_dict()
    for name in (
        "language_model.layers.7.mlp.up_proj.weight",
        "language_model.norm.weight",
        "multi_modal_projector.linear_2.bias",
    ):
        assert torch.equal(after[name], demo[name])
    biases = [value for name, value in after.items() if name.endswith(("q_proj.bias", "v_proj.bias")) and "layers" in name]
    assert not any(bias.any() for bias in biases if len(bias) == 192)
    assert torch.equal(after["image_newline"], before["image_newline"])


def test_a_warm_start_gives_every_known_word_its_old_vectors(started, tokenizer):
    model, before = started
    demo = load("demo")
    old_id = demo.tokenizer.token_to_id
    same = {"red": "▁red", "Ġred": "▁red", "7": "▁7", "<|im_end|>": "</s>", "Ċ": "<0x0A>", "What": "What"}
    for table in ("language_model.embed_tokens.weight", "language_model.lm_head.weight"):
        new, old = model.state_dict()[table], demo.model.state_dict()[table]
        for token, known in same.items():
            assert torch.equal(new[tokenizer.token_to_id(token)], old[old_id(known)])
        unknown = tokenizer.token_to_id("vanish")
        assert torch.equal(new[unknown], before[table][unknown])


def test_a_warm_start_shows_the_tower_the_same_pixels_as_demos(started):
    model, _ = started
    demo = load("demo").model
    pictures = torch.from_numpy(np.stack(clips.draw_clip(clips.any_clip(Random(0)))))
    new = model.vision_tower.embeddings(DEMO.pixel_values(pictures))
    old = demo.vision_tower.embeddings(DEMOS["demo"].pixel_values(pictures))
    torch.testing.assert_close(new, old[:, 1:], atol=1e-4, rtol=0)


def test_a_clip_becomes_pooled_frames_in_order_and_one_newline(started):
    model, _ = started
    seen = torch.randn(2 * 8, 144, 128)
    features = clip_features(model, seen)
    assert features.shape == (2, DEMO.vision_tokens, 192)
    assert torch.equal(features[1, -1], model.image_newline)
    patches = model.multi_modal_projector(seen[8 + 3]).view(12, 12, 192)  # frame 3 of the second clip
    wanted = patches[4:6, 2:4].mean((0, 1))
    torch.testing.assert_close(features[1, 3 * 36 + 2 * 6 + 1], wanted)


def test_transformers_loads_what_is_exported_and_gives_the_logits_that_are_trained(started, tokenizer, tmp_path, monkeypatch):
    """The whole training path with several questions in a row, compared with the official model and one question."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(steps, "masked_layer", masked_layer._torchdynamo_orig_callable)  # compiling takes longer than the test
    model, _ = started
    export_onevision(model, tokenizer, tmp_path)
    official, report = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pictures, *rows = next(iter(DEMO.instruct_batches(tokenizer, Recipe(instruct_batch=1), seed=0)))
    ids, turns, _, labels = (part[0] for part in rows)
    pixel_values = DEMO.pixel_values(pictures)
    asked_alone = ids[(turns == 0) | (turns == 2)][None]  # the second question, as if it were the only one
    wanted = official(input_ids=asked_alone, pixel_values_videos=pixel_values[None]).logits[0]
    answered = labels[(turns == 0) | (turns == 2)][1:]
    second_only = labels.masked_fill(turns != 2, -100)[None]
    features = clip_features(model, model.vision_tower(pixel_values))
    loss, _ = answer_loss(model, features, 14, [ids[None], turns[None], rows[2], second_only])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(wanted[:-1], answered), atol=0.03, rtol=0)


def test_the_shipped_weights_are_small_and_in_the_official_layout():
    files = {file.name: file.stat().st_size for file in MODELS["demo-video"].folder.iterdir()}
    assert sum(files.values()) < 25e6
    assert {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"} <= files.keys()


def test_the_shipped_tokenizer_is_the_one_that_the_code_makes(tokenizer):
    shipped = load_tokenizer(MODELS["demo-video"].folder)
    text = "<|im_start|>What color is the object that vanishes?<|im_end|>\n<video>\nDescribe the image."
    assert shipped.encode(text) == tokenizer.encode(text).ids
    assert len(shipped) == tokenizer.get_vocab_size()


def test_transformers_loads_the_shipped_weights_and_gives_the_same_logits():
    transformers = pytest.importorskip("transformers")
    official, report = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        MODELS["demo-video"].folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    clip = clips.Clip((actor("move", direction="down", digit=8), actor("vanish", 6, color="blue", x=100, y=100)), 3)
    frames = clips.draw_clip(clip)
    vlm = load("demo-video")
    packed = vlm.prepare([Request(text="What digit is on the red circle?", video=frames)])
    logits = prefill(vlm.model.language_model, packed).logits[0]
    prompt = CLIPS.prompt("What digit is on the red circle?").replace("<video>", "<video>" * 289)
    pixel_values = DEMO.pixel_values(torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])))
    wanted = official(input_ids=torch.tensor([vlm.tokenizer.encode(prompt)]), pixel_values_videos=pixel_values[None]).logits
    torch.testing.assert_close(logits, wanted[0, -1], atol=1e-3, rtol=0)
    assert vlm.tokenizer.decode([int(logits.argmax())]) == "8"


def test_the_shipped_model_answers_most_held_out_questions():
    samples = list(DemoVideo().samples(24))
    answers = generate(load("demo-video"), [sample.request for sample in samples], max_new_tokens=8)
    right = [DemoVideo().correct(answer.text, sample) for answer, sample in zip(answers, samples, strict=True)]
    assert sum(right) >= 20


def test_the_shipped_model_sees_a_reversed_clip_move_the_other_way():
    samples = [sample for sample in DemoVideo().samples(64) if sample.kind == "direction"]
    requests = [Request(text=sample.text, video=sample.video[::-1]) for sample in samples]
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    answers = [answer.text for answer in generate(load("demo-video"), requests, max_new_tokens=8)]
    assert answers == [opposite[sample.answer] for sample in samples]
