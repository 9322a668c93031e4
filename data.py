r"""Text: problems, prompts, the tokenizer, reasoning steps, and the one answer checker.

The one idea: all that reads the text of a solution is here, once. The same `is_correct` labels samples, scores Monte
Carlo rollouts and evaluates models; the same `split_steps` says what a step is. A checker that takes "10." for wrong
turns good steps into first pits, so a mistake here becomes training data without a sound.

Problems are JSON lines of any of three kinds, with an optional unique "id" (default: the line number, from 0):
    GSM8K  {"question": ..., "answer": "first line\nsecond line\n#### 18"}
    MATH   {"problem": ..., "solution": "... so it is $\\boxed{\\frac{3}{4}}$."}
    plain  {"prompt": ..., "answer": "18"}

Differences from the paper:
1. Calculator annotations <<16-3=13>> are removed: a model without a calculator need not learn them.
2. The paper does not say how solutions are cut into steps: these are Self-Explore's rules, applied to token ids.
3. The paper compares strings. Here 3/4, 0.75 and \frac34 are one number, and 1+x is x+1: a small calculator with
   bounded work reads both; what it cannot read is compared as normalised text. Percent signs and units are ignored.
"""

import cmath
import json
import math
import random
import re
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
import tokenizers

DEFAULT_PROMPT = "Question: {question}\nAnswer:"
MAX_LINE, MAX_TAIL, MAX_ANSWER = 1_000_000, 4_000, 300  # bytes of a line; characters searched; characters understood
USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]")
KINDS = {"question": "answer", "problem": "solution", "prompt": "answer"}


class DataError(ValueError):
    """One line: file and line, what is wrong and what was expected, how to mend it."""


@dataclass
class Problem:
    id: str
    question: str
    solution: str  # '' if only the answer is known
    answer: str  # the bare gold answer: '18', '\frac{3}{4}'; '' (matched by nothing) where a MATH box is empty
    style: str = "lines"  # how solutions are cut into steps: 'lines' or 'math'
    meta: dict | None = None


def read_problems(path, limit=None):
    """The problems of a JSON-lines file, at most `limit` of them; blank lines are skipped."""
    problems, lines = [], {}
    try:
        with open(path, "rb") as file:  # readline with a size: a file without newlines never fills the memory
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b"")):
                if limit is not None and len(problems) >= limit:
                    return problems
                if raw.strip():
                    problem = _parse_problem(raw, number)
                    if problem.id in lines:
                        raise DataError(f"id {problem.id!r} of line {lines[problem.id]}; expected unique ids; rename")
                    lines[problem.id] = number + 1
                    problems.append(problem)
    except DataError as error:
        raise DataError(f"{path}:{number + 1}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}:0: {error.strerror}; expected a JSON-lines file; check the path") from None
    if not problems:
        raise DataError(f"{path}:1: no problems; expected one JSON object per line; check how it was written")
    return problems


def _parse_problem(raw, number):
    if len(raw) > MAX_LINE:
        raise DataError(f"more than {MAX_LINE} bytes; expected one problem per line; split the line")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise DataError("byte order mark; expected plain UTF-8; save the file without it")
    try:
        row = json.loads(raw.decode())
        json.dumps(row, ensure_ascii=False).encode()  # a lone \ud800 would only fail in the tokenizer
    except (ValueError, RecursionError):
        raise DataError("not JSON in UTF-8; expected one object per line; rewrite the line") from None
    key = next((k for k in KINDS if isinstance(row, dict) and k in row and KINDS[k] in row), None)
    if key is None:
        raise DataError(f"unknown keys; expected {' or '.join(f'{k} + {v}' for k, v in KINDS.items())}; rename them")
    for name in (key, KINDS[key]):
        if not isinstance(row[name], str) or not row[name].strip() or "\0" in row[name]:
            raise DataError(f"bad {name!r}; expected nonempty text without NUL; correct the line")
    name = row.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int) or "\0" in str(name):
        raise DataError("bad 'id'; expected text or a whole number; correct it or leave it out")
    solution = "" if key == "prompt" else ANNOTATION.sub("", row[KINDS[key]])
    if key == "question" and "####" not in solution or key == "problem" and "\\boxed" not in solution:
        raise DataError(f"no final answer in {KINDS[key]!r}; expected '#### 18' (MATH: \\boxed{{18}}); add it")
    answer = (_final_answer(solution) or "") if solution else row["answer"].strip()
    return Problem(str(name), row[key], solution, answer, "math" if key == "problem" else "lines")


def format_prompt(prompt_format, question):
    """Puts the question in. Not str.format: questions and formats may hold other braces."""
    if "{question}" not in prompt_format:
        raise DataError(f"prompt format {prompt_format!r}; expected '{{question}}' in it; add it")
    return prompt_format.replace("{question}", question)


# --- Answers: find the final one, normalise it, read its value ---

ANNOTATION = re.compile(r"<<[^<>\n]*>>")
MARKER = re.compile(r"#{4,}|\\f?boxed\b\s*|\banswers?\b[^\n.:=\\#]{0,60}?(?:\bis\b|\bare\b|:|=)|^A:", re.I | re.M)
FORMULA = re.compile(r"\$\$?([^$\n]+)\$|\\\(([^\n]{1,300}?)\\\)|\\\[([^\n]{1,300}?)\\\]")
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\$-?)?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")
DIGITS = "0123456789."
PROSE = re.compile(r"(?<![\\A-Za-z])(?!or\b|and\b)[A-Za-z]{2,}")
SYMBOLS = {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt "}
SYMBOLS = str.maketrans(SYMBOLS)
TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf)\s*"
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"\\begin\{[a-z]?matrix\}", "["), (r"\\end\{[a-z]?matrix\}", "]"), (r"\\\\", ";"), ("&", ","),
    (r"<<[^<>\n]*>>|\\(?:left|right|[bB]igg?[lr]?|displaystyle|approx)(?![A-Za-z])|\\[!,;: ]", ""),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?|°|\\?%|\\?\$|\*\*|[€£~]", " "),
    (r"\\[dtc]frac", r"\\frac"), (r"\{,\}", ","), (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
    (TEXT + r"\{[\s,]*(?:or|and)\s*\}|(?<=[\d\s])(?:or|and)\s", ","),
    (r"(?<=[\d\s)}])" + TEXT + r"\{[^{}]*\}(?:\^\{?\d\}?)?[\s.]*$", ""),  # 15\text{ cm}^2 is 15, not 225
    (TEXT + r"\{([^{}]*)\}", r" \1 "),
    (r"(?<=[\d)}])(?:\s+[A-Za-z]{3,}|\s*(?:mm|cm|km|kg|ft|mph|hrs?|min|[ap]\.m)\b)[A-Za-z\s.]*(?:\^\{?[23]\}?)?$", ""),
    (r"(?<=\d)[eE]([-+]?\d{1,3})\b", r"*10^{\1}"), (r"(\d)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])", r"\\\1 "), (r"\\\{", "⦃"), (r"\\\}", "⦄"), (r"\\cup(?![a-z])", "∪"),
    (r"^\s*(?:\\?[A-Za-z]+(?:\([A-Za-z]\))?|\([A-Za-z, ]+\))\s*(?:=|\\in(?![A-Za-z]))", ""),  # x = 5 states 5
    (r"^[-\d\s+*/().=]*=", ""),  # and so does 2 + 3 = 5
]]


def extract_answer(text):
    """The answer behind the last '####', '\\boxed' or 'answer is' with something behind it; a short line without any
    such marker is its own answer; else None. Only the end of a long text is searched."""
    text = _tail(text)
    bare = 0 < len(text) <= MAX_ANSWER and "\n" not in text and not MARKER.search(text)
    return text if bare else _final_answer(text)


def _tail(text):
    return "" if text is None else ANNOTATION.sub("", str(text)[-MAX_TAIL:]).replace("**", "").strip()


def _final_answer(text):
    text, stack, closing, wordy = _tail(text), [], {}, None
    for i, char in enumerate(text):  # all braces at once: hostile text may open thousands of boxes
        if char == "{":
            stack.append(i)
        elif char == "}" and stack:
            closing[stack.pop()] = i
    for marker in reversed(list(MARKER.finditer(text))):
        start, kind = marker.end(), marker[0][0]
        line = text[start : start + MAX_ANSWER].split("\n")[0]
        if kind == "\\":
            answer = text[start + 1 : closing[start]] if start in closing else line[:1].strip("{")
        elif kind == "#":
            answer = "" if re.match(r"\s*(?:step\b|\d+[.)]\s+[A-Za-z])", line, re.I) else line  # a Markdown heading
        else:
            line = text[start : start + MAX_ANSWER].lstrip(" \n\t:*")
            formula = FORMULA.match(line)
            answer = formula[formula.lastindex] if formula else re.split(r"\.(?:\s|$)|\n", line, maxsplit=1)[0]
            if "\\boxed" in answer or len(answer) > 30 and not re.match(r"[-+−.\d$\\(\[{]", answer):
                answer = ""  # an empty box has been passed over; 'Answer: She first buys ...' opens a solution
        answer = answer.strip()
        if answer and (kind in "#\\" or not wordy and _value(_normalise(answer)) is not None):
            return answer
        wordy = wordy or answer  # 'the answer is correct' must not hide an earlier \boxed{18}
    return wordy or None


def is_correct(response, gold):
    """Whether a response (a solution or a bare answer) states the gold answer (bare, or a whole gold solution)."""
    text, gold = _tail(response), extract_answer(gold)
    answer, marked = extract_answer(response), _final_answer(response)
    if not gold or answer and answers_equal(answer, gold):
        return bool(gold)
    number = NUMBER.fullmatch(gold.strip("$. "))
    formula = None if marked else next(reversed(list(FORMULA.finditer(text))), None)
    if formula and (not number or "\\" in formula[0]) and answers_equal(formula[formula.lastindex], gold):
        return True  # without a marker, the last formula may be the answer
    if not number or answer and re.search(r"\d", answer) and not PROSE.search(answer):
        return False  # a formula, and not the gold number
    if marked and re.search(r"\d", marked):  # '#### 5 boxes of 12': the first number, behind '=' if there is one
        numbers = NUMBER.findall(marked.rpartition("=")[2].translate(SYMBOLS))[:1]
    else:  # 'So she makes $18 a day.': the last number of the last line with one
        line = next((line for line in reversed(text.split("\n")) if re.search(r"\d", line)), "")
        numbers = NUMBER.findall(line.translate(SYMBOLS))[-1:]
    return bool(numbers) and answers_equal(numbers[0], gold)


def answers_equal(a, b):
    r"""Whether two bare answers are one number, list or normalised text; never if one is empty.

    >>> answers_equal("$1,200.00", "1200"), answers_equal(r"\frac{3}{4}", ".75"), answers_equal("50%", "0.5")
    (True, True, False)
    """
    a, b = str(a).strip(), str(b).strip()
    if max(len(a), len(b)) > MAX_ANSWER:
        return a == b
    return _same(_normalise(a), _normalise(b))


def _normalise(answer):
    answer = answer.translate(SYMBOLS)
    for pattern, new in REWRITES:
        answer = pattern.sub(new, answer).strip().rstrip(".,:")
    if answer[:1] not in ("(", "[", "⦃"):  # in brackets a comma separates: (100,101) is a pair, 100,101 a number
        answer = re.sub(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), answer)
    return answer.lower()


def _elements(text):
    """(brackets, elements) of a list: ('(]', ['0', '1']); sets and bare lists have none, matrices a ';' a row."""
    brackets = text[:1] + text[-1:] if text[:1] in ("(", "[", "⦃") and text[-1:] in (")", "]", "⦄") else ""
    inside = text[1:-1] if brackets else text
    depths = list(accumulate((c in "([{⦃") - (c in ")]}⦄") for c in inside))
    if brackets and min(depths, default=0) < 0:  # (1,2)∪(3,4): the first bracket is not the last one's partner
        brackets, inside, depths = "", text, list(accumulate((c in "([{⦃") - (c in ")]}⦄") for c in text))
    cuts = [i for i, c in enumerate(inside) if depths[i] == 0 and c in ",;∪"]
    parts = [inside[i + 1 : j].strip() for i, j in zip([-1] + cuts, cuts + [len(inside)], strict=True)]
    parts = [part.replace("\\pm", s) for part in parts if part for s in ("+-" if "\\pm" in part else "+")]
    return brackets.replace("⦃⦄", "") + ";" * inside.count(";"), parts


def _same(a, b):
    """Equality of normalised answers."""
    x, y = _value(a), _value(b)
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    if x is not None or y is not None:
        return x is not None and y is not None and cmath.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12)
    (kind, left), (other, right) = _elements(a), _elements(b)
    if kind != other or len(left) != len(right) or len(left) > 40:
        return False
    if len(left) == 1:
        a, b = (re.sub(r"\{(\w)\}", r"\1", re.sub(r"[\s*]", "", part)) for part in left + right)
        return a == b != ""
    for part in left:  # sets and bare lists in any order, all others in theirs
        match = next((i for i, q in enumerate(right if not kind else right[:1]) if _same(part, q)), None)
        if match is None:
            return False
        del right[match]
    return bool(left)


def _value(text):
    """A Fraction while exact, else a complex number; None if `text` is not plain arithmetic.

    A letter stands for one fixed odd number, so that x + 1 equals 1 + x and nothing else by accident.
    """
    tokens = re.findall(r"\d+\.?\d*|\.\d+|\\[a-z]+|\S", text)[::-1]

    def peek(choices):
        return bool(tokens) and tokens[-1] in choices

    def total(closing=""):
        value = product()
        while peek("+-"):
            value += product()  # which reads the sign
        if closing and tokens.pop() != closing:
            raise ValueError
        return value

    def product():
        value = sign()
        while tokens and not peek("+-)}]⦄"):
            operator = tokens.pop() if peek("*/") else ""
            if not operator and tokens[-1][0] in DIGITS:
                raise ValueError  # '1 2' is neither 12 nor 2
            mixed = not operator and peek(["\\frac"])
            factor = sign()
            if mixed and isinstance(value, Fraction) and isinstance(factor, Fraction) and value.denominator == 1:
                value += factor if value > 0 else -factor  # 3\frac{1}{2}
            else:
                value = value / factor if operator == "/" else value * factor
        return value

    def sign():
        if peek("+-"):
            return -sign() if tokens.pop() == "-" else sign()
        base = atom()
        return raised(base, tokens.pop() and sign()) if peek("^") else base

    def raised(base, power):
        if isinstance(base, Fraction) and isinstance(power, Fraction) and power.denominator == 1:
            if abs(power) * max(base.numerator.bit_length(), base.denominator.bit_length()) <= 4096:
                return base ** int(power)
        return complex(base) ** complex(power)

    def atom(single=False):
        token = tokens.pop()
        if single and token[0].isdigit() and len(token) > 1:  # LaTeX takes one digit: \frac34
            tokens.append(token[1:])
            token = token[0]
        if token[0] in DIGITS:
            return Fraction(token)
        if token in "([{⦃":
            return total(")]}⦄"["([{⦃".index(token)])
        if token == "\\frac":
            return atom(True) / atom(True)
        if token == "\\sqrt":
            index = tokens.pop() and total("]") if peek("[") else Fraction(2)
            return raised(atom(True), 1 / index)
        if re.fullmatch(r"[a-z]|\\(?:pi|infty|theta|alpha|beta|gamma|lambda|omega|phi)", token):
            odd = sum(ord(c) * 7**i for i, c in enumerate(token))
            return {"i": 1j, "\\pi": complex(math.pi)}.get(token) or complex(math.sqrt(odd), math.log(odd))
        raise ValueError

    try:  # at most 80 tokens: that also bounds the recursion; words such as 'even' are no products
        value = None if len(tokens) > 80 or re.search(r"(?<![\\a-z])[a-z]{4,}", text) else total()
        return None if tokens or value is None or not cmath.isfinite(value) else value
    except (ValueError, ArithmeticError, IndexError):
        return None


# --- Steps, distances, equations ---


def split_steps(ids, tokenizer, style="lines"):
    """Token ids cut into steps; the steps joined are `ids` again. Styles: 'lines' (GSM8K), 'math' (MATH),
    'arrows' (star graph).

    A token across a boundary stays with the earlier step, the end of text with the last one.
    """
    ids = list(ids)
    body = len(ids) - (ids[-1:] == [tokenizer.eos_id])
    starts, text = _token_starts(ids[:body], tokenizer)
    bounds = list(accumulate(map(len, STEPS[style](text))))[:-1]
    steps = {}
    for token, start in zip(ids[:body], starts, strict=True):
        steps.setdefault(bisect_right(bounds, start), []).append(token)
    steps = list(steps.values())
    return steps[:-1] + [steps[-1] + ids[body:]] if steps else [ids] * bool(ids)


def _token_starts(ids, tokenizer):
    """The character at which each token starts, and the text. Decoding short windows keeps the time linear."""
    starts, text, window, done = [], "", 0, 0
    for i in range(len(ids)):
        starts.append(len(text))  # all parts of one UTF-8 character start where it does
        known, more = tokenizer.decode(ids[window:done]), tokenizer.decode(ids[window : i + 1])
        if not more.endswith("\ufffd") or i - done > 4 or i + 1 == len(ids):
            text += more[len(known) :]
            window, done = done, i + 1
    return starts, text


def _line_steps(text):
    lines = re.findall(r"[^\n]*\n+|[^\n]+", text)
    return _merge(lines, lambda lines: next((i for i, line in enumerate(lines) if not line.strip()), None))


def _merge(pieces, choose):
    """Joins the piece that `choose(pieces)` names to the one before it (the first: to the next) until it names none."""
    while len(pieces) > 1 and (i := choose(pieces)) is not None:
        i = max(i, 1)
        pieces[i - 1 : i + 1] = ["".join(pieces[i - 1 : i + 1])]
    return pieces


def _math_steps(text):
    """Sentences that end at a formula, none tiny, at most nine, and 'The answer is' on its own; see Self-Explore."""
    last = text.rfind("The answer is")
    body, answer = (text, "") if last < 0 else (text[:last], text[last:])
    pieces = [m[0] for m in re.finditer(r"(?s).+?(?:\n+|\.\$\s+|\$\.\s+|$)", body)]

    def under(limit):
        return next((i for i, piece in enumerate(pieces) if len(piece) < limit), None)

    _merge(pieces, lambda _: under(20))
    mean = len(body) / max(1, len(pieces))
    _merge(pieces, lambda _: under(0.3 * mean))
    _merge(pieces, lambda _: under(1 + min(map(len, pieces))) if len(pieces) + bool(answer) > 9 else None)
    if len(pieces) + bool(answer) <= 3:
        pieces = [half for piece in pieces for half in _bisect(piece)]
    return [piece for piece in [*pieces, answer] if piece]


def _bisect(piece):
    cuts = [m.start() for m in re.finditer(r"(?<=,\$)|(?=, which| so | = | and |Thus|=)", piece)]
    cuts = [cut for cut in cuts if 20 < cut < len(piece) - 20]
    cut = min(cuts, key=lambda cut: abs(2 * cut - len(piece)), default=0)
    return [piece[:cut], piece[cut:]]


STEPS = {"lines": _line_steps, "math": _math_steps, "arrows": lambda text: re.findall(r"[^>]*>|[^>]+$", text)}


def edit_distance(a, b):
    """Levenshtein distance of two sequences (token ids, strings), one row of the table at a time."""
    codes = {}
    a, b = (np.array([codes.setdefault(x, len(codes)) for x in seq], dtype=np.int64) for seq in (a, b))
    steps = np.arange(len(b) + 1)
    row = steps
    for i, x in enumerate(a):
        best = np.minimum(row[1:] + 1, row[:-1] + (b != x))  # delete x, or match it
        row = np.minimum.accumulate(np.concatenate(([i + 1], best)) - steps) + steps  # insertions: +1 to the right
    return int(row[-1])


def equation_key(text):
    """The equations of a solution, to tell rewordings from new solutions: 'He has 2 x 3 = $6.' is ('2*3=6',)."""
    text = ANNOTATION.sub("", text).translate(SYMBOLS)
    runs = (re.sub(r"[ ,$]", "", run).replace("x", "*").strip("*.") for run in re.findall(r"[-+*/()\d.,$%=x ]+", text))
    return tuple(run for run in runs if re.search(r"\d.*=.*\d", run))


class Tokenizer:
    """A Hugging Face tokenizer folder. `eos_id` ends a solution; nothing is added or dropped behind your back."""

    def __init__(self, tokenizer, eos_id, config=None):
        self.tokenizer, self.eos_id, self.config = tokenizer, eos_id, config or {}
        self.vocab_size = tokenizer.get_vocab_size()  # added tokens included

    @classmethod
    def from_pretrained(cls, folder):
        """Reads tokenizer.json. The end of text is the first that names a token of: eos_token_id in config.json, in
        generation_config.json, eos_token in tokenizer_config.json, then a usual name in the vocabulary."""
        folder = Path(folder)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{folder / 'tokenizer.json'}:1: {error}; expected a fast tokenizer; add one") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        configs = []
        for path in (folder / "config.json", folder / "generation_config.json", folder / "tokenizer_config.json"):
            try:
                configs.append(json.loads(path.read_text("utf-8")) if path.exists() else {})
            except ValueError:
                configs.append(None)
            if not isinstance(configs[-1], dict):
                raise DataError(f"{path}:1: not JSON; expected a JSON object; restore the file")
        names = [configs[2].get("eos_token"), *USUAL_EOS]
        names = [name.get("content") if isinstance(name, dict) else name for name in names]
        found = [config.get("eos_token_id") for config in configs[:2]]
        found = [i[0] if isinstance(i, list) and i else i for i in found]
        found += [tokenizer.token_to_id(name) for name in names if isinstance(name, str)]
        eos_id = next((i for i in found if isinstance(i, int) and tokenizer.id_to_token(i) is not None), None)
        if eos_id is None:
            raise DataError(f"{folder / 'tokenizer_config.json'}:1: no end-of-text token; expected eos_token; add it")
        return cls(tokenizer, eos_id, configs[2])

    def save(self, folder):
        """Writes tokenizer.json and a tokenizer_config.json, which transformers reads too."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(Path(folder) / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        config["eos_token"] = self.tokenizer.id_to_token(self.eos_id)
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens=False):
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


# --- The built-in tasks: word problems whose every step has a known truth, and the paper's star graph ---

NAMES = "Mia Ben Ava Leo Zoe Max Eva Sam Ida Tom Amy Jon Lia Kai Uma Roy".split()
THINGS = "shells coins pens stamps cards books beads eggs nuts caps keys rings toys maps bags cups".split()
VERBS = {  # what the verb does to the total; rare ones stand last
    1: "found bought got won earned received collected gained added made borrowed picked caught grew gathered inherited".split(),
    -1: "lost sold gave used ate dropped donated lent broke spent traded mailed burned threw wasted returned".split(),
    0: "saw counted wanted painted washed drew liked sorted cleaned named photographed admired hid described weighed dusted".split(),
}
LARGEST, OPERANDS, ZIPF = 30, 9, 1.2
SLIPS = 0.1  # share of the spurious steps that are slips in a sum


def zipf(rng, items):
    """One of `items`, the i-th with probability ~ i^-ZIPF: a heavy tail of rare skills, as in language."""
    return rng.choices(items, cum_weights=_TAIL[: len(items)])[0]


_TAIL = list(accumulate(i**-ZIPF for i in range(1, 100)))


def _split_of(question):
    """Each question belongs to one split for ever, whatever the seed: by its checksum."""
    return {8: "val", 9: "test"}.get(zlib.crc32(question.encode()) % 10, "train")


def arithmetic_problem(rng, split, steps, distractors):
    """'Mia had 5 cups, found 7, saw 4, lost 2. How many now?': `steps` numbers count, in any order, `distractors` do not."""
    while True:
        start = rng.randint(0, LARGEST)
        signs = [rng.choice((-1, 1)) for _ in range(steps)] + [0] * distractors
        events = [(sign, zipf(rng, range(1, OPERANDS + 1))) for sign in signs]
        low, high = (start + sum(s * n for s, n in events if s == sign) for sign in (-1, 1))
        if low < 0 or high > LARGEST or len({n for _, n in events}) < len(events):
            continue  # every order of the steps must stay in range, and a number must name its event
        rng.shuffle(events)
        told = ", ".join(f"{zipf(rng, VERBS[s])} {n}" for s, n in events)
        thing = zipf(rng, THINGS)
        question = f"{zipf(rng, NAMES)} had {start} {thing}, {told}. How many now?"
        if _split_of(question) == split:
            return Problem("", question, "", str(start + sum(s * n for s, n in events)), meta=dict(start=start, events=events))


def arithmetic_teacher(rng, problem, spurious):
    """A solution by the simulated teacher: the steps in random order, and before each, with probability `spurious`, one
    that is beside the point: a distractor added or taken away, or (now and then) a slip in the sum; either is then ignored."""
    total, events, lines = problem.meta["start"], [e for e in problem.meta["events"] if e[0]], []
    idle = [n for sign, n in problem.meta["events"] if not sign]
    for sign, n in rng.sample(events, len(events)):
        if rng.random() < spurious:
            s = rng.choice((-1, 1))
            if idle and rng.random() >= SLIPS:
                m = rng.choice(idle)
                s = s if 0 <= total + s * m <= LARGEST else -s
                lines.append((total, s, m, total + s * m))
            else:
                lines.append((total, sign, n, min(max(total + sign * n + s * rng.randint(1, 3), 0), LARGEST)))
        lines.append((total, sign, n, total + sign * n))
        total += sign * n
    return "".join(f"{a} {'+' if s > 0 else '-'} {n} = {c}\n" for a, s, n, c in lines) + f"#### {total}"


def judge_steps(problem, text):
    """The truth of each line of a solution to a built-in arithmetic problem: 'good', 'irrelevant' (a distractor is
    used), 'slip' (wrong sum), 'wrong' (an event used twice or with the wrong sign, a wrong total, no step at all)."""
    total, left, labels = problem.meta["start"], [tuple(e) for e in problem.meta["events"] if e[0]], []
    idle = [n for s, n in problem.meta["events"] if not s]
    for line in text.split("\n"):
        step, final = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", line), re.fullmatch(r"#### (\d+)", line)
        if not step:
            labels.append("good" if final and final[1] == problem.answer else "wrong")
            continue
        a, n, c = int(step[1]), int(step[3]), int(step[4])
        s = 1 if step[2] == "+" else -1
        if a + s * n != c:
            labels.append("slip")
        elif n in idle:
            labels.append("irrelevant")
        elif a == total and (s, n) in left:
            left.remove((s, n))
            total = c
            labels.append("good")
        else:
            labels.append("wrong")
    return labels


def star_problem(rng, split, degree=2, path=4, labels=21):
    """The paper's star graph (5.3): `degree` arms of `path` nodes from one centre, their edges shuffled. Which way to
    the goal? '8>3|3>10|14>13|10>1|17>14|8>17/8>13=' and '8>17>14>13': the second node is the only decision."""
    while True:
        centre, *nodes = rng.sample(range(labels), 1 + degree * (path - 1))
        arms = [[centre, *nodes[i * (path - 1) : (i + 1) * (path - 1)]] for i in range(degree)]
        edges = [f"{a}>{b}" for arm in arms for a, b in zip(arm, arm[1:], strict=False)]
        rng.shuffle(edges)
        arm = rng.choice(arms)
        question, answer = f"{'|'.join(edges)}/{centre}>{arm[-1]}=", ">".join(map(str, arm))
        if _split_of(question) == split:
            return Problem("", question, answer, answer, style="arrows")


def load_problems(data, split="train", limit=0, seed=0, spurious=0.2, steps=4, distractors=2):
    """Problems of a built-in task ('arithmetic', 'star': made from the seed) or of a JSONL file; limit 0: all of a file."""
    if data not in ("arithmetic", "star"):
        return read_problems(data, limit or None)
    problems = []
    for i in range(limit):  # each problem has a stream of its own: a longer list begins with the shorter one
        rng = random.Random(f"{seed} {split} {i}")
        if data == "star":
            problem = star_problem(rng, split)
        else:
            problem = arithmetic_problem(rng, split, steps, distractors)
            problem.solution = arithmetic_teacher(rng, problem, spurious)
        problem.id = f"{split}-{seed}-{i}"
        problems.append(problem)
    return problems


def builtin_tokenizer():
    """A token for each word, number and sign of the built-in tasks: 'had 5 cups' is three tokens."""
    words = ["<eos>", "\n", *"+ - = #### , . ? | / > had How many now".split(), *NAMES, *THINGS, *sum(VERBS.values(), [])]
    vocabulary = {word: i for i, word in enumerate(words + [str(n) for n in range(LARGEST + 1)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(" ", "removed"),
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\n,.?|/=>]"), "isolated")])
    tokenizer.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.WordPiece(prefix="@@"), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Replace(tokenizers.Regex(r" ?\n ?"), "\n")])
    return Tokenizer(tokenizer, 0)
