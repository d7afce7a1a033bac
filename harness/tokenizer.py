"""The tokenizer of a pretrained model, as tiktoken runs it: byte-level BPE, read from and written as tokenizer.json.

tiktoken merges the pair whose token has the lowest id, and knows no list of merges. So the ids must rise in the order
of the merges, or the file is refused; so is what splits text in another way than those in SPLITS.
"""

import unicodedata
from typing import NamedTuple

import tiktoken

from harness.cli import UsageError, require


class Split(NamedTuple):
    """How text is cut before the merges: in the words of tokenizer.json, and as one pattern for tiktoken."""

    pre_tokenizers: list[dict]
    pattern: str
    normalizer: dict | None = None


BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)


def split_by(pattern: str) -> list[dict]:
    """The pre-tokenizers of Llama 3 and Qwen2."""
    by_pattern = dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)
    return [by_pattern, dict(BYTE_LEVEL, use_regex=False)]


DIGITS = dict(type="Digits", individual_digits=True)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# text ends at every digit, so that blanks before one stay together
SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = WORDS + r"\p{N}{1,3}" + REST
QWEN2 = WORDS + r"\p{N}" + REST
# by their names in GGUF files
SPLITS = {
    "gpt-2": Split([BYTE_LEVEL], GPT2),
    "smollm": Split([DIGITS, BYTE_LEVEL], SMOLLM),
    "llama-bpe": Split(split_by(LLAMA3), LLAMA3),
    "qwen2": Split(split_by(QWEN2), QWEN2, normalizer=dict(type="NFC")),
}


def byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes each byte as one letter: a printable one as itself, the others from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class FileEncoding(tiktoken.Encoding):
    """An encoding that a file describes. `bos` are the ids that begin every text."""

    def __init__(self, name: str, split: Split, ranks: dict[bytes, int], special: dict[str, int], end: str, bos: list):
        super().__init__(name, pat_str=split.pattern, mergeable_ranks=ranks, special_tokens=special)
        self.split = split
        self.end = special[end]
        self.bos = bos
        self.known = {token[0] for token in ranks if len(token) == 1}

    @property
    def eot_token(self) -> int:
        return self.end

    def encode_ordinary(self, text: str) -> list[int]:
        """UsageError where a byte of the text has no token."""
        if self.split.normalizer:
            text = unicodedata.normalize("NFC", text)
        unknown = set(text.encode("utf-8", errors="replace")) - self.known
        for letter in text if unknown else "":
            for byte in unknown.intersection(letter.encode("utf-8", errors="replace")):
                raise UsageError(f"{letter!r} cannot be written: the tokenizer has no token for byte {byte:#x}")
        return super().encode_ordinary(text)


def split_of(tokenizer: dict) -> Split | None:
    """Which of SPLITS a tokenizer.json describes."""

    def essence(step: dict) -> dict:
        # use_regex is True where it is not written; trim_offsets concerns no ids
        kept = {name: value for name, value in step.items() if name != "trim_offsets"}
        return dict(use_regex=True) | kept if step.get("type") == "ByteLevel" else kept

    given = tokenizer.get("pre_tokenizer") or {}
    steps = [essence(step) for step in given.get("pretokenizers", [given])]
    normalizer = tokenizer.get("normalizer")
    for split in SPLITS.values():
        if steps == list(map(essence, split.pre_tokenizers)) and normalizer == split.normalizer:
            return split
    return None


def first_tokens(tokenizer: dict) -> list[int]:
    """Ids that tokenizer.json puts before every text; UsageError where it puts some behind it."""
    step = tokenizer.get("post_processor") or {}
    ids = []
    for processor in step.get("processors", [step]):
        if processor.get("type", "ByteLevel") == "ByteLevel":
            continue
        single = processor.get("single", [])
        require(processor["type"] == "TemplateProcessing", f"its post-processor {processor['type']} is not known here")
        require(single and "Sequence" in single[-1], "it puts tokens behind a text, which is not known here")
        for token in single[:-1]:
            ids += processor["special_tokens"][token["SpecialToken"]["id"]]["ids"]
    return ids


def encoding_of(tokenizer: dict, end: str | int, name: str) -> FileEncoding:
    """The encoding that a tokenizer.json describes, whose texts end with `end`, a token or its id.

    UsageError where tiktoken cannot express it.
    """
    model = tokenizer["model"]
    require(model.get("type") == "BPE", f"its model is {model.get('type')}, not BPE")
    for option in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        require(not model.get(option), f"its {option} is not byte-level BPE")
    split = split_of(tokenizer)
    require(split is not None, "it splits or normalizes text in a way that is not known here")

    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    letters = byte_of_letter()
    ranks = {}
    for token, rank in model["vocab"].items():
        if token in special:
            continue
        require(all(letter in letters for letter in token), f"its token {token!r} is not byte-level")
        ranks[bytes(letters[letter] for letter in token)] = rank
    merged = []
    for merge in model["merges"]:
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        require(token in model["vocab"], f"its merge {token!r} has no token")
        merged.append(model["vocab"][token])
    require(merged == sorted(merged), "its ids do not rise in the order of its merges, which tiktoken goes by")
    reached = len(set(merged)) + sum(len(token) == 1 for token in ranks)
    require(reached == len(ranks), f"{len(ranks) - reached} of its tokens come from no merge")

    by_id = {id: token for token, id in special.items()}
    require(not isinstance(end, list), f"its texts end with any of {end}, and one is what is known here")
    end = by_id.get(end, end)
    require(end in special, f"its end of text {end!r} is none of its special tokens")
    return FileEncoding(name, split, ranks, special, end, first_tokens(tokenizer))


def tokenizer_json(tokens: list[str], kinds: list[int], merges: list[str], split: str, bos: str | None) -> dict:
    """What tokenizer.json says, from the tables of a GGUF file. Kinds: 1 is of the BPE, 5 unused, others special."""
    require(split in SPLITS, f"its pre-tokenizer {split} is not among {', '.join(SPLITS)}")
    vocab = {token: id for id, token in enumerate(tokens) if kinds[id] != 5}
    added = [dict(id=id, content=token, special=True) for token, id in vocab.items() if kinds[id] != 1]
    for token in added:
        token |= dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    post = None
    if bos is not None:
        of_text = dict(Sequence=dict(id="A", type_id=0))
        first = dict(SpecialToken=dict(id=bos, type_id=0))
        post = dict(type="TemplateProcessing", single=[first, of_text], pair=[first, of_text])
        post["special_tokens"] = {bos: dict(id=bos, ids=[vocab[bos]], tokens=[bos])}
    model = dict(type="BPE", vocab=vocab, merges=[merge.split(" ") for merge in merges], ignore_merges=False)
    return dict(
        version="1.0",
        added_tokens=added,
        normalizer=SPLITS[split].normalizer,
        pre_tokenizer=dict(type="Sequence", pretokenizers=SPLITS[split].pre_tokenizers),
        post_processor=post,
        decoder=BYTE_LEVEL,
        model=model,
    )
