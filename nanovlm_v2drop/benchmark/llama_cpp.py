"""llama.cpp as a contender: npm's prebuilt node-llama-cpp on a GGUF file of noise with our decoder's layer shapes.

The library is installed once, into the user's cache folder. Each quantisation runs in a process of its own, which answers one
request at a time. The times of its rows include the way there and back, about 0.1 ms.

It reads token ids instead of embeddings, and its cache is in float16. Its threads wait actively, so other work on the same
cores slows it down more than us: measure on a quiet machine.
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .contenders import Contender
from .gguf_file import FILE_TYPES, write_gguf
from .workload import Workload

VERSION = "3.22.1"
BUILDS = {  # npm's packages by the machine
    ("Linux", "x86_64"): "linux-x64",
    ("Linux", "aarch64"): "linux-arm64",
    ("Darwin", "arm64"): "mac-arm64-metal",
    ("Darwin", "x86_64"): "mac-x64",
}
QUANTISATIONS = tuple(FILE_TYPES)
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
INSTALL_SECONDS = 300


class PeerUnavailable(RuntimeError):
    """A program that we compare with cannot run here; the message says why."""


class LlamaCpp:
    """A process that holds one GGUF file. Raises PeerUnavailable if it ends."""

    def __init__(self, installed: Path, model: Path, prompt_tokens: int, decode_steps: int) -> None:
        sizes = map(str, (prompt_tokens, decode_steps, torch.get_num_threads()))
        self.log = (model.parent / f"{model.stem}.log").open("w+", encoding="utf-8")
        command = ["node", str(SCRIPT), str(installed), str(model), *sizes]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True)
        system = self.answer()["system"]
        self.about = f"node-llama-cpp {VERSION} with{system.partition(':')[2].replace(' = 1', '').replace(' |', '').rstrip()}"

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise PeerUnavailable(f"its process ended: {(self.log.read().strip().splitlines() or ['no message'])[-1]}")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended; `answer` tells why
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


def check_available(workload: Workload) -> None:
    """Raise PeerUnavailable if llama.cpp cannot run this prompt here, before anything is written."""
    config = workload.decoder.config
    if missing := [program for program in ("node", "npm") if shutil.which(program) is None]:
        raise PeerUnavailable(f"{missing[0]} is not installed")
    if importlib.util.find_spec("gguf") is None:
        raise PeerUnavailable("gguf is not installed: pip install 'nanovlm-v2drop[gguf]'")
    if workload.device.type != "cpu":
        raise PeerUnavailable(f"it runs on the CPU here, not on {workload.device.type}")
    if config.hidden_size % 32 or config.intermediate_size % 32 or config.vocab_size < 300:
        raise PeerUnavailable("its quantisations need widths that are multiples of 32, and a vocabulary of at least 300")


def install() -> Path:
    """The folder with node_modules, which is made by npm on the first call. Raises PeerUnavailable."""
    machine = (platform.system(), platform.machine())
    if machine not in BUILDS:
        raise PeerUnavailable(f"node-llama-cpp has no build for {' '.join(machine)}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "nanovlm-v2drop" / f"node-llama-cpp-{VERSION}"
    if (folder / "complete").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # The builds for GPUs are optional packages of 700 MB. The one for this CPU is named instead.
    packages = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{BUILDS[machine]}@{VERSION}"]
    options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--prefix", str(folder)]
    try:
        run = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=INSTALL_SECONDS, cwd=folder)
        run(["npm", "install", *options, *packages])
    except (subprocess.SubprocessError, OSError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise PeerUnavailable(f"npm could not install node-llama-cpp {VERSION}: {lines[0]}") from error
    (folder / "complete").touch()
    return folder


@contextmanager
def llama_cpp_contenders(workload: Workload, quantisations: Sequence[str]) -> Iterator[dict[Contender, LlamaCpp]]:
    """A contender for each quantisation, with its process. Raises PeerUnavailable if they cannot run here."""
    check_available(workload)
    installed, running = install(), dict[Contender, LlamaCpp]()
    with TemporaryDirectory(prefix="nanovlm-gguf-") as folder:
        try:
            for quantisation in quantisations:
                file = Path(folder) / f"{quantisation}.gguf"
                weight_bytes = write_gguf(file, workload.decoder.config, quantisation)
                process = LlamaCpp(installed, file, len(workload.packed.inputs_embeds), workload.decode_steps)
                running[contender(workload, quantisation, process, weight_bytes)] = process
            yield running
        finally:
            for process in running.values():
                process.close()


def contender(workload: Workload, quantisation: str, process: LlamaCpp, weight_bytes: int) -> Contender:
    decode = partial(process.ask, action="decode", steps=workload.decode_steps)
    prefill = partial(process.ask, action="prefill")
    return Contender(f"llama.cpp {quantisation}", workload, prefill, lambda _: decode, weight_bytes)
