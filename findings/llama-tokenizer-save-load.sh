#!/usr/bin/env bash
#
# Library: transformers 5.23.0 (with tokenizers 0.23.3 and sentencepiece 0.2.3), on Linux and Python 3.11. Seen on 2026-11-28.
# Version 5.24.0 of transformers does the same.
#
# One expects: a tokenizer that is saved with `save_pretrained` and loaded with `from_pretrained` gives the same tokens.
#
# What happens: a LLaMA tokenizer is loaded from a folder with `tokenizer.model` and `"legacy": true`. It puts a space mark
# before the text after a special token, as `legacy` asks. `save_pretrained` writes a `tokenizer.json` that does the same
# (`prepend_scheme` is "always"), but it does not write `legacy`. `from_pretrained` reads that folder, builds the class with
# its default `legacy=False`, and replaces the rule of the file by "first". The tokens after `<image>` change without a
# warning. The `tokenizers` library reads the same `tokenizer.json` and keeps the tokens.
#
# Why it matters: in a LLaVA prompt, "<image>\n" is followed by the question. After one save and load, a fine-tuned
# checkpoint gets other tokens there than in training. `from_pretrained(folder, legacy=True)` avoids this.
#
# Output seen ("_" stands for the space mark U+2581):
#
#   transformers 5.23.0 tokenizers 0.23.3
#   before saving:                    ['<image>', '_', '<0x0A>', 't', 'he', '_cat']
#   saved prepend_scheme:             always
#   saved `legacy`:                   False
#   tokenizers on the saved file:     ['<image>', '_', '<0x0A>', 't', 'he', '_cat']
#   transformers on the saved folder: ['<image>', '<0x0A>', 't', 'he', '_cat']
#   the same with legacy=True:        ['<image>', '_', '<0x0A>', 't', 'he', '_cat']
#   as described

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2

HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import itertools
import json
import sys
from pathlib import Path

import sentencepiece
import tokenizers
import transformers

PROMPT = "<image>\nthe cat"
original, saved = Path(sys.argv[1], "original"), Path(sys.argv[1], "saved")

# A small SentencePiece model with the settings of LLaMA: BPE, byte fallback, no normalisation.
original.mkdir()
subjects, verbs, places = ["the cat", "a dog", "the bird"], ["sits", "sleeps", "waits"], ["here", "on the mat", "in the tree"]
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([" ".join(words) for words in itertools.product(subjects, verbs, places)] * 20),
    model_prefix=str(original / "tokenizer"),
    model_type="bpe",
    vocab_size=320,
    hard_vocab_limit=False,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    minloglevel=2,
)
names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": False, **names}
(original / "tokenizer_config.json").write_text(json.dumps(settings))


def shown(tokens):
    return [token.replace("\u2581", "_") for token in tokens]


tokenizer = transformers.AutoTokenizer.from_pretrained(original)
tokenizer.add_tokens(["<image>"], special_tokens=True)
before = shown(tokenizer.tokenize(PROMPT))
tokenizer.save_pretrained(saved)

scheme = json.loads((saved / "tokenizer.json").read_text())["pre_tokenizer"]["prepend_scheme"]
keeps_legacy = "legacy" in json.loads((saved / "tokenizer_config.json").read_text())
in_file = shown(tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json")).encode(PROMPT).tokens)
loaded = transformers.AutoTokenizer.from_pretrained(saved)
after = shown(loaded.tokenize(PROMPT))
with_legacy = shown(transformers.AutoTokenizer.from_pretrained(saved, legacy=True).tokenize(PROMPT))

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("before saving:                   ", before)
print("saved prepend_scheme:            ", scheme)
print("saved `legacy`:                  ", keeps_legacy)
print("tokenizers on the saved file:    ", in_file)
print("transformers on the saved folder:", after)
print("the same with legacy=True:       ", with_legacy)
as_described = before == in_file == with_legacy != after and scheme == "always" and not keeps_legacy
print("as described" if as_described else "the behaviour has changed")
sys.exit(not as_described)
PYTHON
