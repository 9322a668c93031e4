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
import operator
import random
import re
import zlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

DEFAULT_PROMPT = "Question: {question}\nAnswer:\n"
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
    problems = {}
    try:
        with open(path, "rb") as file:  # readline with a size: a file without newlines never fills the memory
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b"")):
                if limit is not None and len(problems) >= limit:
                    break
                if raw.strip():
                    problem = _parse_problem(raw, number)
                    if problems.setdefault(problem.id, problem) is not problem:
                        raise DataError(f"id {problem.id!r} for the second time; expected unique ids; rename one")
    except DataError as error:
        raise DataError(f"{path}:{number + 1}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}:0: {error.strerror}; expected a JSON-lines file; check the path") from None
    if not problems:
        raise DataError(f"{path}:1: no problems; expected one JSON object per line; check how it was written")
    return list(problems.values())


def _parse_problem(raw, number):
    if len(raw) > MAX_LINE:
        raise DataError(f"more than {MAX_LINE} bytes; expected one problem per line; split the line")
    try:
        row = json.loads(raw.decode())
        json.dumps(row, ensure_ascii=False).encode()  # a lone \ud800 would only fail in the tokenizer
    except (ValueError, RecursionError):
        raise DataError("not JSON in UTF-8 without byte order mark; expected one object per line; rewrite it") from None
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
    answer = (extract_answer(solution, bare=False) or "") if solution else row["answer"].strip()
    return Problem(str(name), row[key], solution, answer, "math" if key == "problem" else "lines")


def format_prompt(prompt_format, question):
    """Puts the question in. Not str.format: questions and formats may hold other braces."""
    if "{question}" not in prompt_format:
        raise DataError(f"prompt format {prompt_format!r}; expected '{{question}}' in it; add it")
    return prompt_format.replace("{question}", question)


# --- Answers: find the final one, normalise it, read its value ---

ANNOTATION = re.compile(r"<<[^<>\n]*>>")
TAGS = re.compile(r"</\w+>|<\|\w+\|>|(?<!\w)\*\*|\*\*(?!\w)")  # closing tags, the end of text, bold type
MARKER = re.compile(r"#{4,}|\\(?:boxed|fbox)\b\s*|\banswers?\b[^\n.:=\\#]{0,60}?(?:\bis\b|\bare\b|[:=])|<answer>|^A:",
                    re.I | re.M)  # fmt: skip
FORMULA = re.compile(r"\$\$?\s{0,9}((?:\\.|[^$\\\s])(?:\\.|[^$\\\n])*)\s{0,9}\$|\\\(([^\n]{1,300}?)\\\)"
                     r"|\\\[\s{0,9}(\S[^\n]{0,300}?)\s{0,9}\\\]")  # fmt: skip
BOLD = re.compile(r"\*\*(?!\d+[.)]\s)([-$]*\d[^*\n:]*)\*\*")
NAME = re.compile(r"\\?[a-z]+(?:\([a-z\d]\))?|\([a-z, ]+\)")
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\$-?)?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")
PROSE = re.compile(r"(?<![\\A-Za-z])(?!or\b|and\b)[A-Za-z]{2,}")
SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "∞": r"\infty ", "π": r"\pi ", "√": " sqrt ", "≈": r"\approx "})
TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it)|boldsymbol|underline)\s*"
RANGE = re.compile(r"(?<![^,∪])(?:([^<≤>≥=,∪]+)([<≤>≥]))?\s*[a-z]\s*(?:([<≤>≥])([^<≤>≥=,∪]+))?(?![^,∪])")
REWRITES = [  # pattern, replacement
    (r"<<[^<>\n]*>>|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""), (r"\{,\}|,\s*\\!\s*", ","),
    (r"\\begin\{[a-z]matrix\}|[(\[]?\s*\\begin\{(?:matrix|array\}\s*\{[^{}]*)\}", "["),
    (r"(?:\\\\\s*)?(?:\\end\{[a-z]matrix\}|\\end\{(?:matrix|array)\}\s*[)\]]?)", "]"),
    (r"\\\\", ";"), (r"\\[!,;: ]|\\q?quad(?![a-z])", ""), ("&", ","),
    (r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degrees?|°)(?:\s*[CF]\b)?|\\?%|\\?\$|[€£~]|\\pounds", " "),
    (r"(?<=[\d}])\s*\\approx.*", ""), (r"\\(?:approx|in)(?![A-Za-z])", "="),  # 2/3 \approx 0.67 is 2/3
    (r"\\[dtc]frac", r"\\frac"), (r"\*\*", "^"), (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
    (r"\\le(?:q|qslant)?(?![a-z])", "≤"), (r"\\ge(?:q|qslant)?(?![a-z])", "≥"), (r"\\varnothing", r"\\emptyset"),
    (r"\\mathbb\{?R\}?", r"(-\\infty,\\infty)"),
    (TEXT + r"\{[\s,]*(?:or|and)\s*\}|(?<=[\d\s])(?:or|and)\s", ","),
    (r"(?<=[^=,(\s])\s*" + TEXT + r"\{[^{}]*\}(?:\^\{?\d\}?)?[\s.]*$", ""),  # 15\text{ cm}^2 is 15, not 225
    (TEXT + r"\{([^{}]*)\}", r" \1 "),
    (r"(?<=[\d)}])(?:\s+(?:[A-Za-z]{3,}|m\b)|\s*(?:mm|cm|km|kg|ft|mph|hrs?|min|(?i:[ap]\.?m))\b)[A-Za-z\s./]*"
     r"(?:\^\{?[23]\}?)?$", ""), (r"(?<![\d:.])0(?=\d:)", ""),
    (r"(?<=\d)[eE]([-+]?\d{1,3})\b", r"*10^{\1}"), (r"(\d)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"\\(frac|sqrt)\s*(\d)", r"\\\1{\2}"), (r"(?<!\\)sqrt\s*(\d+)", r"\\sqrt{\1}"),  # LaTeX takes one digit: \frac34
    (r"(?<![\d.^])(\d+)\s*(\\frac\{\d+\}\s*(?:\d|\{\d+\}))", r"(\1+\2)"),  # 3\frac{1}{2}
    (r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])", r"\\\1 "), (r"\\\{", "⦃"), (r"\\\}", "⦄"), (r"\\cup(?![a-z])", "∪"),
]


def _tail(text):
    return "" if text is None else TAGS.sub("", ANNOTATION.sub("", str(text)[-MAX_TAIL:])).strip()


def extract_answer(text, bare=True):
    """The answer behind the last '####', '\\boxed' or 'answer is' with something behind it; a short line without any
    such marker is its own answer (if `bare`); else None. Only the end of a long text is searched."""
    text, stack, closing, wordy = _tail(text), [], {}, None
    if bare and 0 < len(text) <= MAX_ANSWER and "\n" not in text and not MARKER.search(text):
        return text
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
            heading = r"\s*step\b|\s*\d+[.)]\s+[a-z]|\s*[a-z]{3}[^\n]*\n+[^\n]"  # of Markdown, with text below it
            answer = "" if re.match(heading, text[start:], re.I) else line
        else:
            line = text[start : start + MAX_ANSWER].lstrip(" \n\t:*")
            formula = FORMULA.match(line)
            answer = formula[formula.lastindex] if formula else re.split(r"(?<!\\)[.!](?:\s|$)|\n", line, maxsplit=1)[0]
            if "\\boxed" in answer or len(answer) > 30 and re.match(r"[A-Za-z]", answer) and PROSE.search(answer):
                answer = ""  # an empty box has been passed over; 'Answer: She first buys ...' opens a solution
        answer = answer.strip(" \t\r\n`\"_*")
        if answer and (kind in "#\\" or not wordy and not answer.isalpha() and _value(_normalise(answer)) is not None):
            return answer
        wordy = wordy or answer  # 'the answer is correct' must not hide an earlier \boxed{18}
    return wordy or None


def is_correct(response, gold):
    """Whether a response (a solution or a bare answer) states the gold answer (bare, or a whole gold solution)."""
    text, gold = _tail(response), extract_answer(gold)
    answer, marked = extract_answer(response), extract_answer(response, bare=False)
    if not gold or answer and answers_equal(answer, gold):
        return bool(gold)
    digits = re.fullmatch(r"(-?\d+)_(?:\d|\{\d+\})\.?", gold)
    if answer and digits and answers_equal(answer, digits[1]):
        return True  # the question asks for base 8: 2516 is 2516_8 there
    number = NUMBER.fullmatch(gold.strip("$. "))
    formula = None if marked else next(reversed(list(FORMULA.finditer(text))), None)
    if formula and (not number or "\\" in formula[0]) and answers_equal(formula[formula.lastindex], gold):
        return True  # without a marker, the last formula may be the answer
    if not number or answer and re.search(r"\d", answer) and not PROSE.search(answer):
        return False  # a formula, and not the gold number
    if marked and re.search(r"\d", marked):  # '#### 5 boxes of 12': the first number, behind '=' if there is one
        clause = re.split(r"[,;]\s+[a-z]|\s\(", marked)[0]
        numbers = NUMBER.findall(clause.rpartition("=")[2].translate(SYMBOLS))[:1]
    else:  # 'So she makes $18 a day.': the last number of the last line with one
        lines = ANNOTATION.sub("", str(response)[-MAX_TAIL:]).split("\n")
        line = next((line for line in reversed(lines) if re.search(r"\d", line)), "")
        bold = BOLD.findall(line)  # 'She makes **$18** from 9 eggs.'
        numbers = NUMBER.findall((bold or [line.replace("**", "")])[-1].translate(SYMBOLS))[-1:]
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
        answer = re.sub(pattern, new, answer).strip().rstrip(".,:")
    if answer[:1] not in ("(", "[", "⦃"):  # in brackets a comma separates: (100,101) is a pair, 100,101 a number
        answer = re.sub(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), answer)
    return RANGE.sub(_interval, answer.lower())


def _interval(match):
    r"""'(2,5]' for '2 < x ≤ 5' or '5 ≥ x > 2', '(2,\infty)' for 'x > 2'; a lone 'x' stays."""
    low, left, right, high = match.groups(default="")
    if (left or right) in ">≥":
        low, left, right, high = high, right, left, low
    opening, closing = "([(["["<≤>≥".find(left)], ")])]"["<≤>≥".find(right)]
    return opening + (low or r"-\infty") + "," + (high or r"\infty") + closing if left or right else match[0]


def _elements(text):
    """(brackets, elements) of a list: ('(]', ['0', '1']); sets and bare lists have none, matrices a ';' a row."""
    depths = list(accumulate((c in "([{⦃") - (c in ")]}⦄") for c in text))
    # in (1,2)∪(3,4) the first bracket is not the last one's partner
    paired = bool(re.fullmatch(r"(?s)[(\[⦃].*[)\]⦄]", text)) and min(depths[:-1]) > 0
    cuts = [i for i, c in enumerate(text) if depths[i] == paired and c in ",;∪"]
    parts = [text[i + 1 : j].strip() for i, j in pairwise([paired - 1, *cuts, len(text) - paired])]
    parts = [part.replace("\\pm", s) for part in parts if part for s in ("+-" if "\\pm" in part else "+")]
    brackets = text[0] + text[-1] if paired else ""
    return brackets.replace("⦃⦄", "") + ";" * text.count(";") * paired, parts


def _stated(text):
    """What an equation states, 5: 'x = 5', '2 + 3 = 5', '5 = x'."""
    kind, parts = _elements(text)
    sides = text.split("=") if len(parts) == 1 and not kind else [text]
    first, last = sides[0].strip(), sides[-1].strip()
    if NAME.fullmatch(first):
        return last
    return text if last == "0" else first if NAME.fullmatch(last) else last  # the plane x + y + z = 0 is no 0


def _same(a, b):
    """Equality of normalised answers."""
    if a.count("=") == b.count("=") == 1 and len(_elements(a)[1]) == len(_elements(b)[1]) == 1:
        x, y = (_value(f"({text.replace('=', ')-(')})") for text in (a, b))
        if x and y and complex(y):  # x + y = 1 is 2 - 2x = 2y: the differences of the sides have a simple ratio
            ratio = complex(x) / complex(y)
            simple = Fraction(ratio.real).limit_denominator(99) if 1e-3 < abs(ratio.real) < 1e3 else 0
            if simple and cmath.isclose(ratio, simple):
                return True
        names = [text.split("=")[0].strip() for text in (a, b)]
        if names[0] != names[1] and not (all(map(NAME.fullmatch, names)) and max(map(len, names)) > 2):
            return False  # y = 2x and f(x) = 2x are one, AB = 2 and CD = 2 are not
    a, b = _stated(a), _stated(b)
    x, y = _value(a), _value(b)
    if x is not None or y is not None:
        exact = x is None or y is None or isinstance(x, Fraction) and isinstance(y, Fraction)
        return x == y if exact else cmath.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12)
    (kind, left), (other, right) = _elements(a), _elements(b)
    if kind != other or len(left) != len(right) or len(left) > 40:
        return False
    if len(left) == 1:
        a, b = (" ".join(re.findall(r"\d+|\\[a-z]+|[^\s*]", part)) for part in left + right)
        a, b = (re.sub(r"[{(] (?:\( )?(\S+)(?: \))? [)}]", r"\1", part) for part in (a, b))  # \cot{(x)} is \cot x
        return a == b != ""
    for part in left:  # sets and bare lists in any order, all others in theirs
        match = next((i for i, q in enumerate(right if not kind else right[:1]) if _same(part, q)), None)
        if match is None:
            return False
        del right[match]
    return bool(left)


def _value(text):
    """A Fraction while exact, else a float or complex number; None if `text` is not plain arithmetic.
    A letter stands for one fixed odd number, so that x + 1 equals 1 + x and nothing else by accident."""
    tokens = [" ", *reversed(re.findall(r"\d+\.?\d*|\.\d+|\\[a-z]+|\S", text))]  # the next one last; " " ends them
    if len(tokens) > 81 or re.search(r"(?<![\\a-z])[a-z]{4,}", text):
        return None  # 80 tokens also bound the recursion; words such as 'even' are no products

    def read(strength, closing=None):
        """An operand, then each operator that binds more tightly than `strength`, with what it binds (Pratt's way)."""
        token = tokens.pop()
        if token[0] in "0123456789.":
            value = Fraction(token)
        elif token in "+-":
            value = -read(3) if token == "-" else read(3)
        elif token in "([{⦃":
            value = read(0, ")]}⦄"["([{⦃".index(token)])
        elif token == "\\frac":
            value = read(9) / read(9)
        elif token == "\\sqrt":
            index = tokens.pop() and read(0, "]") if tokens[-1] == "[" else Fraction(2)
            value = _power(read(9), 1 / index)
        elif re.fullmatch(r"[a-z]|\\(?:pi|infty|theta|alpha|beta|gamma|lambda|omega|phi)", token):
            odd = sum(ord(c) * 7**i for i, c in enumerate(token))
            value = {"i": 1j, "\\pi": cmath.pi}.get(token) or cmath.sqrt(odd) + 1j * cmath.log(odd)
        else:
            raise ValueError
        while tokens[-1] not in ")]}⦄ ":
            binds, apply = OPERATORS.get(tokens[-1], OPERATORS["*"])
            if binds <= strength:
                break
            if tokens[-1] in OPERATORS:
                tokens.pop()
            elif tokens[-1][0] in "0123456789.":
                raise ValueError  # '1 2' is neither 12 nor 2
            value = apply(value, read(min(binds, 3)))
        if closing and tokens.pop() != closing:
            raise ValueError
        return value

    try:
        value = read(0, " ")
        return value if cmath.isfinite(value) else None
    except (ValueError, ArithmeticError, IndexError):
        return None


def _power(base, exponent):
    """Exact only while that is cheap: 9^{999999999} must not take minutes."""
    size = max(abs(base.numerator), base.denominator).bit_length() if isinstance(base, Fraction) else 0
    return (base if abs(exponent) * size <= 4096 else complex(base)) ** exponent


OPERATORS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul), "/": (2, operator.truediv),
             ":": (2, operator.truediv), "^": (4, _power)}  # how tightly it binds (a sign: 3), and what it does


# --- Steps, distances, equations ---

STEP_STARTS = {"lines": r"(?m)^[^\S\n]*\S", "arrows": r"(?s)\A.|(?<=>)."}


def split_steps(ids, tokenizer, style="lines"):
    """Token ids cut into steps; the steps joined are `ids` again. Styles: 'lines' (GSM8K: one that is not blank starts
    a step), 'math' (MATH), 'arrows' (star graph: a '>' ends a step).
    A token across a boundary stays with the earlier step, the end of text with the last one."""
    ids = list(ids)
    starts, text = _token_starts(ids[: len(ids) - (ids[-1:] == [tokenizer.eos_id])], tokenizer)
    if style == "math":
        bounds = list(accumulate(map(len, _math_steps(text))))[:-1]
    else:
        bounds = [m.start() for m in re.finditer(STEP_STARTS[style], text)][1:]  # the first step starts at 0
    cuts = [bisect_left(starts, bound) for bound in bounds if bound <= starts[-1]]
    return [ids[i:j] for i, j in pairwise([0, *cuts, len(ids)]) if i < j]


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


def _math_steps(text):
    """Sentences that end at a formula, none tiny, at most nine, and 'The answer is' on its own; see Self-Explore."""
    last = text.rfind("The answer is")
    body, answer = (text, "") if last < 0 else (text[:last], text[last:])
    pieces = _merge(re.findall(r"(?s).+?(?:\n+|\.\$\s+|\$\.\s+|$)", body), 20)
    pieces = _merge(pieces, 0.3 * len(body) / max(1, len(pieces)))
    while len(pieces) + bool(answer) > 9:  # the shortest joins the one before it
        i = max(1, pieces.index(min(pieces, key=len)))
        pieces[i - 1 : i + 1] = [pieces[i - 1] + pieces[i]]
    whole, pieces = (pieces, []) if len(pieces) + bool(answer) <= 3 else ([], pieces)
    for piece in whole:  # too few: halve each near its middle
        cuts = [m.start() for m in re.finditer(r"(?<=,\$)|(?=, which| so | = | and |Thus|=)", piece)]
        _, cut = min([(abs(2 * cut - len(piece)), cut) for cut in cuts if 20 < cut < len(piece) - 20], default=(0, 0))
        pieces += [piece[:cut], piece[cut:]]
    return [piece for piece in [*pieces, answer] if piece]


def _merge(pieces, limit):
    """Joins each piece shorter than `limit` to the one before it, and the first to the next ones."""
    merged = pieces[:1]
    for piece in pieces[1:]:
        if min(len(piece), len(merged[-1])) < limit:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def edit_distance(a, b):
    """Levenshtein distance of two sequences (token ids, strings), one row of the table at a time."""
    b = np.array(list(b))
    row = steps = np.arange(len(b) + 1)
    for i, x in enumerate(a):
        best = np.minimum(row[1:] + 1, row[:-1] + (b != x))  # delete x, or match it
        row = np.minimum.accumulate(np.concatenate(([i + 1], best)) - steps) + steps  # insertions: +1 to the right
    return int(row[-1])


def equation_key(text):
    """The equations of a solution, to tell rewordings from new solutions: 'He has 2 x 3 = $6.' is ('2*3=6',)."""
    text = ANNOTATION.sub("", text).translate(SYMBOLS)
    runs = (re.sub(r"[ ,$]", "", run).replace("x", "*").strip("*.") for run in re.findall(r"[-+*/()\d.,$%=x ]+", text))
    runs = ((run, re.search(r"\d", run)) for run in runs)  # a digit, then =, then a digit: by parts, in linear time
    return tuple(run for run, digit in runs if digit and re.search(r"\d", run[digit.start() :].partition("=")[2]))


class Tokenizer:
    """A Hugging Face tokenizer folder. `eos_id` ends a solution; nothing is added or dropped behind your back."""

    def __init__(self, tokenizer, eos_id, config=None):
        self.tokenizer, self.eos_id, self.config = tokenizer, eos_id, config or {}
        self.vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1)  # added tokens included; may have gaps

    @classmethod
    def from_pretrained(cls, folder):
        """Reads tokenizer.json. The end of text is the first that names a token of: eos_token_id in config.json, in
        generation_config.json, eos_token in tokenizer_config.json, then a usual name in the vocabulary."""
        folder, configs = Path(folder), []
        try:
            path = folder / "tokenizer.json"
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            for path in (folder / "config.json", folder / "generation_config.json", folder / "tokenizer_config.json"):
                configs.append({} | json.loads(path.read_text("utf-8")) if path.exists() else {})
        except BaseException as error:
            raise _ours(error, path) from None
        name = configs[2].get("eos_token")
        names = [name.get("content") if isinstance(name, dict) else name, *USUAL_EOS]
        found = [i[0] if isinstance(i, list) and i else i for i in (c.get("eos_token_id") for c in configs[:2])]
        found += [tokenizer.token_to_id(name) for name in names if isinstance(name, str)]
        eos_id = next((i for i in found if isinstance(i, int) and tokenizer.id_to_token(i) is not None), None)
        if eos_id is None:
            raise DataError(f"{folder / 'tokenizer_config.json'}:1: no end-of-text token; expected eos_token; add it")
        return cls(tokenizer, eos_id, configs[2])

    def save(self, folder):
        """Writes tokenizer.json and a tokenizer_config.json, which transformers reads too."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.json").write_text(self.tokenizer.to_str(pretty=True), "utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        config["eos_token"] = self.tokenizer.id_to_token(self.eos_id)
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")

    def encode(self, text):
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            raise _ours(error) from None
        if max(ids, default=0) >= self.vocab_size:
            raise DataError(f"token {max(ids)} in {text!r:.60}, but the model has {self.vocab_size}; expected "
                            "a tokenizer and weights of one model; restore them")  # fmt: skip
        return ids

    def decode(self, ids, skip_special_tokens=False):
        try:
            return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            raise _ours(error) from None


def _ours(error, path="tokenizer.json"):
    """The error for a broken tokenizer: its library raises plain Exceptions, and panics, which are not even those."""
    text = f"{path}:1: {error}; expected a fast tokenizer, JSON objects; restore the file"
    return error if isinstance(error, KeyboardInterrupt) else DataError(" ".join(text.split()))


# --- The built-in tasks: word problems whose every step has a known truth, and the paper's star graph ---

NAMES = "Mia Ben Ava Leo Zoe Max Eva Sam Ida Tom Amy Jon Lia Kai Uma Roy".split()
THINGS = "shells coins pens stamps cards books beads eggs nuts caps keys rings toys maps bags cups".split()
GAIN = "found bought got won earned received collected gained added made borrowed picked caught grew gathered inherited"
LOSE = "lost sold gave used ate dropped donated lent broke spent traded mailed burned threw wasted returned"
KEEP = ("saw counted wanted painted washed drew liked sorted cleaned named photographed admired hid"
        " described weighed dusted")
VERBS = {1: GAIN.split(), -1: LOSE.split(), 0: KEEP.split()}  # what each does to the total; rare ones stand last
LARGEST, OPERANDS, ZIPF = 30, 9, 1.2
SLIPS = 0.1  # share of the spurious steps that are slips in a sum


def zipf(rng, items):
    """One of `items`, the i-th with probability ~ i^-ZIPF: a heavy tail of rare skills, as in language."""
    weights = _heavy_tail(len(items))  # rng.choices would take twice as long
    return items[bisect_right(weights, rng.random() * weights[-1], 0, len(items) - 1)]


@cache
def _heavy_tail(n):
    return list(accumulate(i**-ZIPF for i in range(1, n + 1)))


def _split_of(question):
    """Each question belongs to one split for ever, whatever the seed: by its checksum."""
    return {8: "val", 9: "test"}.get(zlib.crc32(question.encode()) % 10, "train")


def arithmetic_problem(rng, split, steps, distractors):
    """'Mia had 5 cups, found 7, saw 4, lost 2. How many now?': `steps` numbers count, in any order, others do not."""
    for _ in range(100_000):  # some hundred are usual: numbers repeat
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
            total = start + sum(s * n for s, n in events)
            return Problem("", question, "", str(total), meta=dict(start=start, events=events))
    raise DataError(f"{split} problems of {steps} steps and {distractors} distractors were not found; expected numbers "
                    f"up to {OPERANDS}, all different, and totals up to {LARGEST}; ask for fewer")  # fmt: skip


def arithmetic_teacher(rng, problem, spurious):
    """A solution by the simulated teacher: the steps in random order, and before each, with probability `spurious`,
    one beside the point: a distractor added or taken away, or (now and then) a slip in the sum; both then ignored."""
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
                near = [total + sign * n + d for d in (-3, -2, -1, 1, 2, 3)]
                lines.append((total, sign, n, rng.choice([c for c in near if 0 <= c <= LARGEST])))
        lines.append((total, sign, n, total + sign * n))
        total += sign * n
    return "".join(f"{a} {'+' if s > 0 else '-'} {n} = {c}\n" for a, s, n, c in lines) + f"#### {total}"


def judge_steps(problem, text):
    """The truth of each line of a solution to a built-in arithmetic problem: 'good', 'irrelevant' (a distractor is
    used), 'slip' (wrong sum), 'wrong' (an event used twice or with the wrong sign, a wrong total, no step at all)."""
    total, left, labels = problem.meta["start"], [tuple(e) for e in problem.meta["events"] if e[0]], []
    idle = [n for s, n in problem.meta["events"] if not s]
    for line in text.split("\n"):
        step = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", line)
        label = "good" if line == f"#### {problem.answer}" else "wrong"
        if step:
            a, s, n, c = int(step[1]), int(step[2] + "1"), int(step[3]), int(step[4])
            if a + s * n != c:
                label = "slip"
            elif n in idle:
                label = "irrelevant"
            elif a == total and (s, n) in left:
                left.remove((s, n))
                total, label = c, "good"
        labels.append(label)
    return labels


def star_problem(rng, split, degree=2, path=4, labels=21):
    """The paper's star graph (5.3): `degree` arms of `path` nodes from one centre, their edges shuffled. Which way to
    the goal? '8>3|3>10|14>13|10>1|17>14|8>17/8>13=' and '8>17>14>13': the second node is the only decision."""
    while True:
        centre, *nodes = rng.sample(range(labels), 1 + degree * (path - 1))
        arms = [[centre, *nodes[i * (path - 1) : (i + 1) * (path - 1)]] for i in range(degree)]
        edges = [f"{a}>{b}" for arm in arms for a, b in pairwise(arm)]
        rng.shuffle(edges)
        arm = rng.choice(arms)
        question, answer = f"{'|'.join(edges)}/{centre}>{arm[-1]}=", ">".join(map(str, arm))
        if _split_of(question) == split:
            return Problem("", question, answer, answer, style="arrows")


def load_problems(data, split="train", limit=0, seed=0, spurious=0.2, steps=4, distractors=2):
    """Problems of a built-in task ('arithmetic', 'star': made from the seed) or of a JSONL file (limit 0: all)."""
    if data not in ("arithmetic", "star"):
        return read_problems(data, limit or None)
    if split not in ("train", "val", "test"):
        raise DataError(f"split {split!r}; expected train, val or test; choose one")
    problems = []
    for i in range(limit):  # each problem has a stream of its own: a longer list begins with the shorter one
        rng = random.Random(f"{seed} {split} {i}")
        problem = star_problem(rng, split) if data == "star" else arithmetic_problem(rng, split, steps, distractors)
        problem.solution = problem.solution or arithmetic_teacher(rng, problem, spurious)
        problem.id = f"{split}-{seed}-{i}"
        problems.append(problem)
    return problems


def builtin_tokenizer():
    """A token for each word, number and sign of the built-in tasks: 'had 5 cups' is three tokens."""
    signs = "+ - = #### , . ? | / > had How many now".split()
    words = ["<eos>", "\n", *signs, *NAMES, *THINGS, *sum(VERBS.values(), []), *map(str, range(LARGEST + 1))]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"[\n,.?|/=>]"), "isolated")])
    tokenizer.decoder = decoders.Sequence([
        decoders.WordPiece(prefix="@@"), decoders.Fuse(), decoders.Replace(Regex(r" ?\n ?"), "\n")])
    return Tokenizer(tokenizer, 0)
