"""Train the models of weights/demo and weights/demo-video on the scenes of scenes.py and the clips of clips.py.

    python -m nanovlm_v2drop.demo.train --model demo --output weights/demo --work runs/demo
    python -m nanovlm_v2drop.demo.train --model demo-video --output weights/demo-video --work runs/demo-video

There are three steps, in the order of LLaVA's own recipe. They take one to two hours on two CPU cores.

1. tower: every patch learns to name the colour, shape and digit that it shows, in the decoder's own word embeddings. This
   step trains tower, projector and embeddings together and takes the place of CLIP's pre-training. Without it, training
   end to end stays for very long at answers that ignore the picture.
2. instruct: the tower is frozen, as in LLaVA-1.5, and projector and decoder learn to answer. All questions about one picture
   or clip share one pass, but no question sees another one, so each is trained as it will be asked. Late in this step
   weight decay is raised, as in the training of large models. Without it the layers keep writing large updates into
   background tokens that no other token reads, and the size of an update says little about the worth of a token.
3. export: safetensors in the official layout (export.py).

train_image.py and train_video.py hold the two recipes. Both training steps save checkpoints in --work and continue from them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from . import train_image, train_video
from .steps import initialise, train_instruct, train_tower
from .warm_start import warm_start

DEMOS = {"demo": train_image.DEMO, "demo-video": train_video.DEMO_VIDEO}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(DEMOS), default="demo", help="which recipe (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint in the official layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for training checkpoints and logs")
    for name in ("tower_steps", "instruct_steps", "late_step", "stop_step", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: as in the recipe")
    arguments = vars(parser.parse_args())
    demo, output, work = DEMOS[arguments.pop("model")], arguments.pop("output"), arguments.pop("work")
    work.mkdir(parents=True, exist_ok=True)
    recipe = replace(demo.recipe, **{name: value for name, value in arguments.items() if value is not None})
    torch.manual_seed(recipe.seed)
    tokenizer = demo.make_tokenizer()
    model = demo.make_model(demo.make_config(tokenizer))
    initialise(model)
    if demo.warm:
        warm_start(model, tokenizer)
    tower = work / "tower.pt"
    if not tower.is_file():
        train_tower(demo, model, tokenizer, recipe, work)
    model.load_state_dict(torch.load(tower, weights_only=True))
    train_instruct(demo, model, tokenizer, recipe, work)
    demo.export(model, tokenizer, output)


if __name__ == "__main__":
    main()
