"""Text to tokens and back, and rows of tokens as one padded tensor. N prompts, P columns."""

from collections.abc import Sequence
from functools import partial
from itertools import takewhile

import tiktoken
import torch
from torch import Tensor

from harness.cli import UsageError, require
from harness.tasks import Example


class Form:
    """How the tiny model is asked: in plain text. Every byte is a token, and one special token ends a text."""

    def __init__(self):
        ranks = {bytes([i]): i for i in range(256)}
        end = {"<|endoftext|>": 256}
        self.encoding = tiktoken.Encoding("bytes", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens=end)
        self.text_of = self.encoding.decode
        self.ends: Sequence[int] = (256,)  # each of these tokens ends a response

    def encode(self, text: str) -> list[int]:
        """A text as part of a prompt or a response."""
        return self.encoding.encode_ordinary(text)

    def tokens(self, example: Example) -> list[int]:
        """The prompt as the model is given it, with the beginning of the answer."""
        return self.encode(example.prompt + example.begun)

    def tokenize(self, examples: list[Example], device: str) -> tuple[Tensor, Tensor]:
        """Prompts as one left-padded tensor (N, P), and the columns of padding before each (N,)."""
        return pad_left([self.tokens(example) for example in examples], self.ends[0], device)

    def decode(self, tokens: list[int]) -> str:
        """The text of a response, up to the token that ends it."""
        return self.text_of(list(takewhile(lambda token: token not in self.ends, tokens)))


class Chat(Form):
    """How a pretrained model is asked: by the chat template of its tokenizer, or in a text with {prompt}.

    A prompt is plain text, even where it looks like a special token.
    """

    def __init__(self, tokenizer, template: str | None, ends: int | list[int] | None):
        """ends: the tokens that end a text according to the model's config."""
        self.tokenizer = tokenizer
        self.text_of = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = special - {tokenizer.unk_token_id}
        ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        if template is None and tokenizer.chat_template:
            self.template = None
            turns = [dict(role="user", content="{prompt}"), dict(role="assistant", content="{answer}")]
            after_answer = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("{answer}")[2]
            # the token that ends the turn of an answer, whatever the config says
            ends = self.special_in(self.with_special(after_answer))[:1] + ends
        else:
            self.template = "{prompt}" if template in (None, "plain") else template
            has_place = "{prompt}" in self.template
            require(has_place, f"--template must be plain or a text with {{prompt}}, got {template!r}")
            check_unicode(self.template, "--template")
            plain = self.encode("a")
            adds_end = tokenizer.encode("a")[-len(plain) :] != plain
            require(not adds_end, "its tokenizer adds tokens at the end of a text")
        self.before, _, self.after = self.asked("{prompt}").partition("{prompt}")
        self.ends = tuple(dict.fromkeys(token for token in ends if token is not None))
        require(bool(self.ends), "neither its config nor its tokenizer has a token that ends a text")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def with_special(self, text: str, begins: bool = False) -> list[int]:
        """Tokens of a text in which the names of special tokens stand for these tokens.

        begins: the text is the beginning of a prompt; a chat template writes the first token itself.
        """
        return self.tokenizer.encode(text, add_special_tokens=begins and self.template is not None)

    def special_in(self, tokens: list[int]) -> list[int]:
        return [token for token in tokens if token in self.special]

    def asked(self, prompt: str) -> str:
        """The text around a prompt, up to the beginning of the answer."""
        if self.template is not None:
            return self.template.replace("{prompt}", prompt)
        turns = [dict(role="user", content=prompt)]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def tokens(self, example: Example) -> list[int]:
        prompt, text = example.prompt, self.asked(example.prompt)
        begin, end = self.with_special(self.before, begins=True), self.with_special(self.after + example.begun)
        whole = self.with_special(text + example.begun, begins=True)
        if self.special_in(whole) == self.special_in(begin + end):
            return whole
        # the prompt names a special token, alone or with the text around it: it is encoded by itself, as plain text
        plain = self.encode(prompt)
        fits = self.before + prompt + self.after == text and not self.special_in(plain)
        require(fits, f"{example.where}the special tokens in {prompt[:40]!r} cannot stay plain text here; remove them")
        return begin + plain + end


def pad_left(rows: list[list[int]], fill: int, device: str) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one left-padded tensor (N, P), and the columns of padding before each row (N,)."""
    P = max(map(len, rows))
    tokens_NP = torch.tensor([[fill] * (P - len(row)) + row for row in rows], device=device)
    return tokens_NP, torch.tensor([P - len(row) for row in rows], device=device)


def check_unicode(text: str, name: str) -> None:
    """UsageError for a text with half of a UTF-16 pair, such as JSON's "\\ud800"."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UsageError(f"{name} must be Unicode text; remove {e.object[e.start]!r}") from e


def check_example(form: Form, example: Example, max_new: int, context: int) -> int:
    """Tokens of the prompt; UsageError where a text is not Unicode, or prompt or answer are empty or too long."""
    where = example.where
    require(example.prompt != "", f"{where}the prompt must not be empty")
    check_unicode(example.prompt + example.answer, f"{where}prompt and answer")
    tokens, of_answer = len(form.tokens(example)), len(form.encode(example.answer)) + 1
    limits = f"--max-new {max_new} exceeds the context of {context} tokens"
    require(tokens + max_new <= context, f"{where}a prompt of {tokens} tokens with {limits}")
    require(of_answer <= max_new, f"{where}an answer of {of_answer} tokens with its end exceeds --max-new {max_new}")
    return tokens
