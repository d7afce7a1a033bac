"""Text to tokens and back, and rows of tokens to one padded tensor. N prompts, P columns."""

from dataclasses import dataclass

import tiktoken
import torch
from torch import Tensor

from harness.cli import UsageError, require
from harness.tasks import Example


def load_encoding() -> tiktoken.Encoding:
    """Every byte is a token and one special token ends a text: nothing to learn, nothing to download."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})


@dataclass(frozen=True)
class Form:
    """How the toy is asked: in plain text, as tiktoken encodes it."""

    encoding: tiktoken.Encoding

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.encoding.eot_token,)

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def tokens(self, example: Example) -> list[int]:
        """The example as the model is given it, the beginning of its answer included."""
        return self.encode(example.prompt + example.begun)

    def decode(self, tokens: list[int]) -> str:
        """Text of sampled tokens up to the end; an id that stands for nothing, as some do, reads as U+FFFD."""
        pieces = []
        for token in tokens:
            if token in self.ends:
                break
            try:
                pieces.append(self.encoding.decode_single_token_bytes(token))
            except KeyError:
                pieces.append("\ufffd".encode())
        return b"".join(pieces).decode("utf-8", errors="replace")


class Chat:
    """How a pretrained model is asked: by the chat template of its tokenizer, or in a text with {prompt}.

    A prompt is plain text, even where it looks like a special token.
    """

    def __init__(self, tokenizer, template: str | None, ends: int | list[int] | None):
        """ends: of its config. UsageError for a template without {prompt}, and where no token ends a text."""
        self.tokenizer = tokenizer
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = special - {tokenizer.unk_token_id}
        ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        chat = template is None and tokenizer.chat_template
        self.template = None if chat else "{prompt}" if template in (None, "plain") else template
        fits = self.template is None or "{prompt}" in self.template
        require(fits, f"--template must be plain or a text with {{prompt}}, got {template!r}")
        if self.template is None:
            turns = [dict(role="user", content="{prompt}"), dict(role="assistant", content="{answer}")]
            behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("{answer}")[2]
            # an answer ends with what ends its turn, too, whatever the config says
            ends = [token for token in self.encode(behind, special=True) if token in self.special][:1] + ends
        else:
            behind = tokenizer.encode("a")[-len(self.encode("a")) :] == self.encode("a")
            require(behind, "its tokenizer puts tokens behind a text")
        self.ends = tuple(dict.fromkeys(token for token in ends if token is not None))
        require(bool(self.ends), "neither its config nor its tokenizer has a token that ends a text")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """special: what looks like a special token is one."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)

    def begin(self, text: str) -> list[int]:
        """The beginning of what a model is given: a chat template says itself what it begins with."""
        return self.tokenizer.encode(text, add_special_tokens=self.template is not None)

    def text(self, prompt: str) -> str:
        if self.template is not None:
            return self.template.replace("{prompt}", prompt)
        turns = [dict(role="user", content=prompt)]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def tokens(self, example: Example) -> list[int]:
        """The example as the model is given it, the beginning of its answer included."""
        prompt, text = example.prompt, self.text(example.prompt)
        if not self.special.intersection(self.encode(prompt, special=True)):
            return self.begin(text + example.begun)
        before, _, after = self.text("{prompt}").partition("{prompt}")
        plain = self.encode(prompt)
        fits = before + prompt + after == text and not self.special.intersection(plain)
        require(fits, f"{example.where}what looks like special tokens in {prompt[:40]!r} cannot stay plain text here")
        return self.begin(before) + plain + self.encode(after + example.begun, special=True)

    def decode(self, tokens: list[int]) -> str:
        """Text of sampled tokens up to the first that ends it."""
        end = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return self.tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)


def tokenize(form: Form | Chat, examples: list[Example], device: str) -> tuple[Tensor, Tensor]:
    """Prompts as `pad_left` returns them."""
    return pad_left([form.tokens(example) for example in examples], form.ends[0], device)


def pad_left(rows: list[list[int]], fill: int, device: str) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor (N, P), flush right, and how many columns of padding each row begins with (N,)."""
    P = max(map(len, rows))
    tokens_NP = torch.tensor([[fill] * (P - len(row)) + row for row in rows], device=device)
    return tokens_NP, torch.tensor([P - len(row) for row in rows], device=device)


def check_example(form: Form | Chat, example: Example, max_new: int, context: int) -> int:
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
    of_answer = len(form.encode(example.answer)) + 1
    require(of_answer <= max_new, f"{where}an answer of {of_answer} tokens with its end exceeds --max-new {max_new}")
    return tokens
