"""The last number of a text, for --reward number: exact, and None where the last digit belongs to something else."""

import re
from fractions import Fraction

PLAIN = str.maketrans("−–－", "---") | {ord("\u00a0"): " ", ord("\u202f"): " "}
NUMBER = re.compile(
    r"(?<![A-Za-z\d_.,:/^√{)}-])(?<!\d )"  # not part of a time, a date, a range, a list or a formula
    r"([-+]?)[$€£¥]?"
    r"(\d{1,30}/[1-9]\d{0,29}|(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d{0,30})(?:\.\d{1,30})?(?:[eE][-+]?\d{1,3})?)"
    r"(?!\w|\s*[\^√π/\\])"
)


def last_number(text: str) -> Fraction | None:
    """-$1,234.50, 1e3, 3/4 and \\boxed{7} are numbers; 12:30, 1,5, 3√2, 10^6 and 3 1/2 are not."""
    text = text.translate(PLAIN).replace(r"\boxed{", " ")
    digits, numbers = list(re.finditer(r"\d", text)), list(NUMBER.finditer(text))
    if not numbers or numbers[-1].end() < digits[-1].end():
        return None
    sign, number = numbers[-1].groups()
    value = Fraction(number.replace(",", ""))
    return -value if sign == "-" else value
