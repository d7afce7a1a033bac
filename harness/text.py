"""Text to tokens and back, and rows of tokens to one padded tensor. N prompts, P columns."""

import re
from dataclasses import dataclass

import tiktoken
import torch
from torch import Tensor

from harness.cli import UsageError, require
from harness.tasks import Example


def load_encoding(name: str) -> tiktoken.Encoding:
    """By default every byte is a token and one special token ends a text: nothing to learn, nothing to download."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(
            "bytes", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
        )
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UsageError(f"--encoding must be bytes or one of {', '.join(known)}, got {name!r}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # whatever the download raises
        raise UsageError(f"--encoding {name} could not be fetched ({type(e).__name__}); take --encoding bytes") from e


@dataclass(frozen=True)
class Form:
    """How a model is asked: tokens that begin every text, and a template with {prompt}, special tokens by name.

    What stands for {prompt} is plain text, even where it looks like a special token.
    """

    encoding: tiktoken.Encoding
    template: str = "{prompt}"
    bos: tuple[int, ...] = ()

    def tokens(self, example: Example) -> list[int]:
        """The example as the model is given it, the beginning of its answer included."""
        special = self.encoding.special_tokens_set
        # of two that begin alike the longer one
        pieces = re.split(f"({'|'.join(map(re.escape, sorted(special, reverse=True)))})", self.template)
        pieces[-1] += example.begun
        tokens = list(self.bos)
        for piece in pieces:
            if piece in special:
                tokens.append(self.encoding.encode_single_token(piece))
            else:
                tokens += self.encoding.encode_ordinary(piece.replace("{prompt}", example.prompt))
        return tokens


def tokenize(form: Form, examples: list[Example], device: str) -> tuple[Tensor, Tensor]:
    """Prompts as `pad_left` returns them."""
    return pad_left([form.tokens(example) for example in examples], form.encoding.eot_token, device)


def decode(encoding: tiktoken.Encoding, tokens: list[int]) -> str:
    """Text of sampled tokens up to the end of text; an id that stands for nothing, as some do, reads as U+FFFD."""
    pieces = []
    for token in tokens:
        if token == encoding.eot_token:
            break
        try:
            pieces.append(encoding.decode_single_token_bytes(token))
        except KeyError:
            pieces.append("\ufffd".encode())
    return b"".join(pieces).decode("utf-8", errors="replace")


def pad_left(rows: list[list[int]], fill: int, device: str) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor (N, P), flush right, and how many columns of padding each row begins with (N,)."""
    P = max(map(len, rows))
    tokens_NP = torch.tensor([[fill] * (P - len(row)) + row for row in rows], device=device)
    return tokens_NP, torch.tensor([P - len(row) for row in rows], device=device)


def check_example(form: Form, example: Example, max_new: int, context: int) -> int:
    """Tokens of the prompt; UsageError where a text is not Unicode, or prompt or answer are empty or too long."""
    where = example.where
    require(example.prompt != "", f"{where}the prompt must not be empty")
    for text in (example.prompt, example.answer):
        try:
            text.encode()
        except UnicodeEncodeError as e:  # half of a UTF-16 pair, which JSON's "\ud800" makes
            raise UsageError(f"{where}{text[e.start]!r} at character {e.start} is not Unicode text; remove it") from e
    tokens = len(form.tokens(example))
    limits = f"--max-new {max_new} exceeds the context of {context} tokens"
    require(tokens + max_new <= context, f"{where}a prompt of {tokens} tokens with {limits}")
    of_answer = len(form.encoding.encode_ordinary(example.answer)) + 1
    require(of_answer <= max_new, f"{where}an answer of {of_answer} tokens with its end exceeds --max-new {max_new}")
    return tokens
