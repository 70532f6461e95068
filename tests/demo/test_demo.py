"""The demo's scenes and questions, its training data, and the shipped weights, which transformers loads too."""

import hashlib
import json
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm_v2drop.demo import scenes
from nanovlm_v2drop.demo.data import PATCH_WORDS, corpus, llama_tokenizer, patch_labels, word_tokens
from nanovlm_v2drop.demo.recipe import Recipe
from nanovlm_v2drop.demo.steps import initialise, train_instruct, train_tower, turn_bias
from nanovlm_v2drop.demo.train import DEMOS
from nanovlm_v2drop.inference import prefill
from nanovlm_v2drop.loading.zoo import MODELS, load
from nanovlm_v2drop.processing.prompts import Request
from nanovlm_v2drop.processing.tokenizer import load_tokenizer
from nanovlm_v2drop.tasks import load_task

THINGS = (scenes.Thing("red", "circle", 3, 40, 40, 28), scenes.Thing("blue", "star", 8, 100, 110, 30))
SCENE = scenes.Scene(THINGS, background_seed=5)


def many_scenes(count: int) -> list[scenes.Scene]:
    rng = Random(1)
    return [scenes.sample_scene(rng, rng.randint(1, scenes.MAX_THINGS)) for _ in range(count)]


def test_a_scene_is_drawn_the_same_every_time():
    first, second = scenes.draw_scene(SCENE), scenes.draw_scene(SCENE)
    assert first.size == (144, 144)
    assert first.mode == "RGB"
    assert np.array_equal(first, second)


def test_scenes_are_mostly_background():
    empty, covered = [], []
    for scene in many_scenes(200):
        labels = patch_labels(scene)
        empty.append((labels[:, 0] == len(PATCH_WORDS[0]) - 1).mean())
        covered.append(len(scene.things))
    assert np.mean(empty) > 0.75
    assert set(covered) == {1, 2, 3, 4, 5}


def test_things_do_not_touch_and_no_two_share_colour_and_shape():
    for scene in many_scenes(100):
        assert len({thing.name for thing in scene.things}) == len(scene.things)
        for index, one in enumerate(scene.things):
            for other in scene.things[:index]:
                left, top, right, bottom = one.box
                assert other.box[0] > right or other.box[2] < left or other.box[1] > bottom or other.box[3] < top


def test_every_answer_can_be_read_off_the_scene():
    rng = Random(2)
    for scene in many_scenes(300):
        named = {thing.name: thing for thing in scene.things}
        for kind in scenes.KINDS:
            question = scenes.ask(scene, kind, rng)
            if question is not None:
                words = question.text.rstrip("?").split()
                assert question.answer in true_answers(words, kind, named, scene), question


def true_answers(words: list[str], kind: str, named: dict, scene: scenes.Scene) -> set[str]:
    """All true answers, found from the words of the question alone; an ambiguous question has none or several."""
    if kind == "count":
        return {str(len(scene.things))}
    if kind == "existence":
        return {"yes" if " ".join(words[3:5]) in named else "no"}
    if kind == "digit":
        return {str(named[" ".join(words[-2:])].digit)}
    if kind == "color":
        matches = [thing.color for thing in scene.things if thing.shape == words[-1]]
        return set(matches) if len(matches) == 1 else set()
    if kind == "shape":
        matches = [thing.shape for thing in scene.things if thing.color == words[-2]]
        return set(matches) if len(matches) == 1 else set()
    one, other = named[" ".join(words[2:4])], named[" ".join(words[-2:])]
    if "left" in words:
        return {"left" if one.x < other.x else "right"}
    return {"above" if one.y < other.y else "below"}


def test_yes_and_no_are_equally_often_the_right_answer_of_the_held_out_questions():
    answers = [sample.answer for sample in load_task("demo").samples(360) if sample.kind == "existence"]
    assert (answers.count("yes"), answers.count("no")) == (30, 30)


def test_held_out_samples_are_the_same_in_every_run_and_take_kinds_in_turn():
    first, second = (list(load_task("demo").samples(12)) for _ in range(2))
    assert [sample.kind for sample in first] == [*scenes.KINDS] * 2
    assert [(s.sample_id, s.text, s.answer) for s in first] == [(s.sample_id, s.text, s.answer) for s in second]
    assert all(np.array_equal(one.images[0], two.images[0]) for one, two in zip(first, second, strict=True))


def test_demo_summary_scores_each_kind_by_hand():
    task = load_task("demo")
    sample = next(task.samples())
    assert task.correct(" Yes ", sample) == 1.0
    assert task.correct("no", sample) == 0.0
    records = [{"kind": "digit", "correct": 1.0}, {"kind": "digit", "correct": 0.0}, {"kind": "color", "correct": 1.0}]
    assert task.summary(records) == pytest.approx({"score": 200 / 3, "color": 100.0, "digit": 50.0})
    with pytest.raises(ValueError, match="no record to score"):
        task.summary([])


def test_patch_labels_name_what_stands_there():
    labels = patch_labels(SCENE).reshape(12, 12, 3)
    color, shape, digit = labels[3, 3]  # pixels 36 to 47: the middle of the red circle
    assert (PATCH_WORDS[0][color], PATCH_WORDS[1][shape], PATCH_WORDS[2][digit]) == ("red", "circle", "3")
    assert [PATCH_WORDS[group][labels[0, 11, group]] for group in range(3)] == ["background"] * 3


def test_training_rows_ask_exactly_what_will_be_asked():
    tokenizer = llama_tokenizer(corpus())
    batches = DEMOS["demo"].instruct_batches(tokenizer, Recipe(instruct_batch=2), seed=0)
    question = scenes.Question("digit", "What digit is on the red circle?", "3")
    prompt, answer = batches.turn_ids(question)
    image = tokenizer.token_to_id("<image>")
    template = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    template += "and polite answers to the user's questions. USER: <image>\nWhat digit is on the red circle? ASSISTANT:"
    assert [*batches.prefix, image, *prompt] == tokenizer.encode(template).ids
    assert answer == [*word_tokens(tokenizer, ("3",)).tolist(), 2]


def test_a_seed_gives_the_rows_that_the_shipped_demo_was_trained_on():
    """The digests come from the code that trained weights/demo. Rows hold no pixels, which depend on Pillow's release."""
    tokenizer = llama_tokenizer(corpus())
    assert digest(tokenizer.to_str().encode()) == "d017ce63dfaace62"
    batches = iter(DEMOS["demo"].instruct_batches(tokenizer, Recipe(instruct_batch=4), seed=3))
    first, second = next(batches)[1:], next(batches)[1:]
    wanted = ["fb1e9900765a4357", "921476f85a951596", "4f3ef906a26e3341", "85e018095944b0f3"]
    assert [digest(part.contiguous().numpy().tobytes()) for part in first] == wanted
    assert digest(second[0].contiguous().numpy().tobytes()) == "393b57000b4f5a18"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def test_a_question_sees_the_picture_and_itself_only():
    visible = turn_bias(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0] == 0
    assert visible.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_a_short_training_lowers_both_losses_and_goes_on_from_its_checkpoint(name, tmp_path):
    demo = DEMOS[name]
    tokenizer = demo.make_tokenizer()
    recipe = Recipe(tower_steps=50, tower_batch=4, instruct_steps=50, instruct_batch=2)
    torch.manual_seed(0)
    model = demo.make_model(demo.make_config(tokenizer))
    initialise(model)
    train_tower(demo, model, tokenizer, recipe, tmp_path)
    train_instruct(demo, model, tokenizer, recipe, tmp_path)
    for step in ("tower", "instruct"):
        losses = [json.loads(line)["loss"] for line in (tmp_path / f"{step}.jsonl").read_text().splitlines()]
        assert losses[1] < losses[0]
    lines = (tmp_path / "instruct.jsonl").read_text()
    train_instruct(demo, model, tokenizer, recipe, tmp_path)  # finished: nothing is trained again
    assert (tmp_path / "instruct.jsonl").read_text() == lines


def test_the_shipped_weights_are_small_and_in_the_official_layout():
    folder = MODELS["demo"].folder
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= {
        file.name for file in folder.iterdir()
    }


def test_every_word_of_the_demo_is_one_token_of_the_shipped_tokenizer():
    tokenizer = load_tokenizer(MODELS["demo"].folder)
    for words in PATCH_WORDS:
        assert all(len(tokenizer.encode(word)) == 2 for word in words)  # with the beginning-of-sequence token


def test_transformers_loads_the_shipped_weights_and_gives_the_same_logits():
    transformers = pytest.importorskip("transformers")
    folder = MODELS["demo"].folder
    official, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    picture = scenes.draw_scene(SCENE)
    vlm = load("demo")
    prompt = vlm.token_ids(Request(text="What digit is on the blue star?", images=[picture]))
    pixel_values = vlm.image_processor([picture])
    wanted = official(input_ids=torch.tensor([prompt]), pixel_values=pixel_values).logits[0, -1]
    packed = vlm.prepare([Request(text="What digit is on the blue star?", images=[picture])])
    logits = prefill(vlm.model.language_model, packed).logits[0]
    torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=0)
    assert vlm.tokenizer.decode([int(logits.argmax())]).strip() == "8"


def test_pictures_of_the_demo_size_pass_the_preprocessing_unchanged():
    vlm = load("demo")
    picture = scenes.draw_scene(SCENE)
    assert np.array_equal(vlm.image_processor.to_square(picture), picture)
    assert isinstance(picture, Image.Image)
