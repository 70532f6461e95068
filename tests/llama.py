"""A tiny LLaMA tokenizer in both formats: a sentencepiece model, and the tokenizer.json that LLaVA-1.5 ships."""

import io

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is shown in the picture? ASSISTANT: A red square  stands left of a blue circle.",
    "How many circles are there? Answer with one word. 0 1 2 3 4 5 6 7 8 9",
    "Über den Straßen: café, naïve, 東京の空, привет мир.",
] * 4
VOCAB_SIZE = 440
IMAGE_TOKEN_ID, PAD_TOKEN_ID = VOCAB_SIZE, VOCAB_SIZE + 1
SPECIAL_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE_TOKEN_ID, "<pad>": PAD_TOKEN_ID}


def train_sentencepiece() -> bytes:
    """A LLaMA-like model (the same trainer settings as LLaMA's own), deterministic and tiny."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def merges_of(processor: sentencepiece.SentencePieceProcessor, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first."""
    merges = []
    for piece, token_id in vocabulary.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        merges += [(-processor.get_score(token_id), vocabulary[left], left, right) for left, right in known]
    return [(left, right) for _, _, left, right in sorted(merges)]


def llama_tokenizer(model: bytes) -> Tokenizer:
    """The tokenizer.json that LLaVA-1.5 ships, made for our tiny vocabulary."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {processor.id_to_piece(token_id): token_id for token_id in range(VOCAB_SIZE)}
    merges = merges_of(processor, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer
