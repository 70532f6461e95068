"""Vision-language models from scratch, with vision-token dropping inside the prefill loop.

    from nanovlm_v2drop import DropSchedule, Request, V2Drop, generate, load

    vlm = load("demo")
    request = Request(text="What digit is on the red circle?", images=["scene.png"])
    (answer,) = generate(vlm, [request], V2Drop(DropSchedule.for_mean_tokens(32, 144, 12)))

The public names stand in `__init__.pyi`. Each is imported when it is first used, so that `nanovlm-v2drop --help` does not
wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
