r"""Text: problems, run folders, reasoning steps, the one answer checker, the tokenizer.

Everything that reads the text of a solution is here, once. The same `split_steps` says what a step
is, and the same `is_correct` filters samples, scores Monte Carlo rollouts and evaluates models. A
mistake here becomes wrong training data without any error: a checker that takes "10." for wrong
turns good steps into first pits.

Differences from the paper:
1. Calculator annotations <<16-3=13>> are removed: a model without a calculator need not learn them.
2. The paper does not say how solutions are cut into steps. GSM8K: lines. MATH: what the text itself
   numbers or sets in paragraphs, else sentences by the rules of Self-Explore (Hwang et al. 2024).
3. The paper compares answers as strings. Here 3/4, 0.75 and \frac34 are one number.
"""

import argparse
import ast
import cmath
import hashlib
import json
import operator
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import unicodedata
import zlib
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from functools import cache, wraps
from importlib.metadata import version
from itertools import accumulate, chain, pairwise
from math import inf
from pathlib import Path

import numpy as np
import tokenizers
from filelock import FileLock, Timeout

DEFAULT_PROMPT = "Question: {question}\nAnswer:\n"
RANK = int(os.environ.get("RANK", 0))  # number of this process under torchrun


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what is wrong, and where."""


# --- Problems ------------------------------------------------------------------------------------

# A problem is a question, perhaps a teacher's solution, and the gold answer. They come from a
# JSON-lines file under the names that are in use. What is left out, or not imitated, is counted.

QUESTION_KEYS = ("question", "problem", "prompt", "query")
SOLUTION_KEYS = ("solution", "response", "output")
ANNOTATION = re.compile(r"<<[^<>\n]*>>")
NO_ANSWER = re.compile("(?:proof|notfound|nan|inf|none|null|na|unknown|invalid|tbd)?", re.I)
NOT_A_WORD = re.compile(r"\\text|[\W_]")
MARKS = re.compile(r"\\boxed|[#${}\s]")
EMPTY_BOX = re.compile(r"\\boxed\s*\{\s*\}")


@dataclass
class Problem:
    id: str
    question: str
    solution: str  # "" if only the answer is known
    answer: str  # the bare gold answer: "18", "\frac{3}{4}"
    style: str = "lines"  # how its solutions are cut into steps, a key of STEP_STARTS
    meta: dict | None = None  # of the built-in task: {"start": 5, "events": [[sign, number], ...]}


def read_problems(path, limit: int | None = None) -> list[Problem]:
    r"""The problems of a JSON-lines file, at most `limit` of them.

    A line holds a question, perhaps a solution, and a gold answer, under the names in use:

        {"question": "...", "answer": "16 - 3 = <<16-3=13>>13 ...\n#### 18"}         GSM8K
        {"problem": "...", "solution": "... so $x = \\boxed{\\frac{3}{4}}$."}        MATH
        {"prompt": "...", "solution": "...", "answer": "18"}      or a number: "answer": 18

    An `answer` that marks its final answer (####, \boxed) is a solution, any other the gold answer.
    Without a gold answer it is the last that the solution marks. Of several texts that may be the
    solution, the first that marks the gold answer is taken. `id` is optional (else the line number,
    from 0); repeated ids are numbered: "7", "7-2", "7-3". `style` and `meta` are kept, so that a
    run's own files are read back as they were.

    A line that cannot be read is a UserError. Notes on stderr count the lines whose answer is none
    ("proof", "NaN"), which are left out, and the solutions that state another answer than their
    gold one, which nobody should imitate.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    problems = []
    no_answer = []
    no_solution = []
    numbers = {}  # of ids, for unused_id
    for number, line in enumerate(lines):
        if limit is not None and len(problems) >= limit:
            break
        if not line.strip():
            continue
        problem = parse_problem(line, number, f"{path}:{number + 1}")
        if is_none(problem.answer):
            no_answer.append(number + 1)
            continue
        if contradicts(problem.solution, problem.answer):
            problem.solution = ""
            no_solution.append(number + 1)
        problem.id = unused_id(problem.id, numbers)
        problems.append(problem)
    note_left_out(path, no_answer, "problems", "their answer is none")
    note_left_out(path, no_solution, "solutions", "they state another answer than their row")
    if not problems:
        raise UserError(f"{path}: no problems in this file")
    return problems


def note_left_out(path, lines: list[int], what: str, why: str):
    if lines:
        note(f"{path}: {len(lines)} {what} left out, the first in line {lines[0]}: {why}")


def parse_problem(line: bytes, number: int, where: str) -> Problem:
    """A line of a problem file, read as read_problems says. "none" stands for no answer."""
    row = parse_object(line, where)
    questions = texts_of(row, QUESTION_KEYS)
    solution, gold = solution_and_gold(row)
    answer_keys = f"an answer is looked for under {', '.join(('answer', *SOLUTION_KEYS))}"
    if not questions:
        keys = ", ".join(QUESTION_KEYS)
        raise UserError(f"{where}: no question, a text under {keys}; {answer_keys}")
    if not is_correct(gold, gold):
        raise UserError(f"{where}: no gold answer that a solution could match; {answer_keys}")
    style = row.get("style")
    if style not in list(STEP_STARTS):
        style = "math" if "\\boxed" in solution else "lines"
    name = text_of(row.get("id")) or str(number)
    question = questions[0].strip()
    return Problem(
        name, question, ANNOTATION.sub("", solution), gold, style, parse_meta(row.get("meta"))
    )


def solution_and_gold(row: dict) -> tuple[str, str | None]:
    """The solution of a row, "" if it has none, and its gold answer."""
    solutions = texts_of(row, SOLUTION_KEYS)
    answer = text_of(row.get("answer"))
    gold = extract_answer(answer)
    alone = MARKS.sub("", answer) == MARKS.sub("", gold or "")  # "#### 18" is no solution
    for text in solutions if alone else [*solutions, answer]:
        marked = extract_answer(text, bare=False)
        if marked and (not gold or is_correct(marked, gold)):
            return text, gold or marked
    solution = next(iter(solutions), "")
    if not gold and EMPTY_BOX.search(solution + answer):
        gold = "none"
    return solution, gold


def contradicts(solution: str, gold: str) -> bool:
    """Whether a solution states another answer. What one without a marker states is a guess, so it
    must not hold the gold answer anywhere."""
    if extract_answer(solution, bare=False) is None and gold in solution:
        return False
    return stated_answer(solution) != "" and not is_correct(solution, gold)


def is_none(answer: str) -> bool:
    """Whether an answer says that there is none, "proof", "N/A", or says nothing: "\\text{}"."""
    return NO_ANSWER.fullmatch(NOT_A_WORD.sub("", answer)) is not None


def parse_meta(meta) -> dict | None:
    """`meta` of a problem of the built-in task; None for anything else."""
    try:
        events = [[int(sign), int(n)] for sign, n in meta["events"]]
        return dict(start=int(meta["start"]), events=events)
    except (TypeError, KeyError, ValueError, OverflowError):
        return None


def parse_object(line: bytes, where: str) -> dict:
    """The JSON object of a line; a UserError for anything else."""
    if line.lstrip().startswith(b"["):
        raise UserError(f"{where}: a JSON array; write one object per line (jq -c '.[]' does)")
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half an emoji would fail in the tokenizer
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON in UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    return row


def texts_of(row: dict, keys) -> list[str]:
    """The values of these keys that are texts with something in them."""
    values = [row.get(key) for key in keys]
    return [value for value in values if isinstance(value, str) and value.strip()]


def text_of(value) -> str:
    """A text, or a number as text; "" for anything else."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value).strip()
    return ""


def unused_id(name: str, numbers: dict[str, int]) -> str:
    """`name`, or `name` with the first number that makes it new.

    numbers: {each id that is used: the last number that was tried behind it}.
    """
    candidate = name
    while candidate in numbers:
        numbers[name] += 1
        candidate = f"{name}-{numbers[name]}"
    numbers[candidate] = 1
    return candidate


def format_prompt(prompt_format: str, question: str) -> str:
    """Put the question in. Not str.format, because LaTeX is full of other braces."""
    if "{question}" not in prompt_format:
        raise UserError(f"the prompt format {prompt_format!r} does not contain {{question}}")
    return prompt_format.replace("{question}", question)


@cache
def note(message: str):
    """Print a note on stderr, each only once."""
    if RANK == 0:
        print(f"note: {printable(message)}", file=sys.stderr)


def printable(text: str) -> str:
    """The text with what a terminal would obey or hide as Python writes it: \\x1b, \\u202e."""
    shown = (c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return "".join(shown)


# --- Run folders: files that survive a crash -----------------------------------------------------

# Rows are appended to JSONL files, and what is there is never made again. Other files are written
# under a temporary name and renamed. Under torchrun all processes read and rank 0 writes.


def rank_zero_only(function):
    """Run on rank 0 only: all processes of torchrun call `function`, one of them writes."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        if RANK == 0:
            function(*args, **kwargs)

    return wrapper


def read_rows(path, keys: dict[str, type] | None = None) -> list[dict]:
    """The rows of a JSONL file that append_rows wrote; none if there is no file yet.

    keys: {name: type} that each row must have, {"id": str} if not given. A last line that a crash
    cut short is taken off the file; any other broken line is a UserError.
    """
    path = Path(path)
    keys = keys or {"id": str}
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")  # not splitlines, which also splits at \r
    whole = parse_json(last) is not None  # then only its newline is missing
    if whole:
        lines.append(last)
    rows = [parse_json(line) for line in lines]
    for number, row in enumerate(rows, 1):
        found = row if isinstance(row, dict) else {}
        if not all(isinstance(found.get(key), kind) for key, kind in keys.items()):
            raise UserError(f"{path}:{number}: not a JSON object with {', '.join(keys)}")
    if last and RANK == 0:
        if whole:
            with open(path, "ab") as file:
                file.write(b"\n")
        else:
            os.truncate(path, path.stat().st_size - len(last))
    return rows


def parse_json(text):
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@rank_zero_only
def append_rows(path, rows):
    """Append rows in one write, so that a crash can only cut the last of them short."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@rank_zero_only
def write_rows(path, rows):
    """Write a whole JSONL file, under a temporary name that is then renamed: never half a file."""
    Path(f"{path}.tmp").unlink(missing_ok=True)
    append_rows(f"{path}.tmp", rows)
    os.replace(f"{path}.tmp", path)


@rank_zero_only
def write_json(path, value):
    """Write a JSON file for people to read, in the same way."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def read_json(path) -> dict:
    """The object in a JSON file; {} if there is no file."""
    if not Path(path).exists():
        return {}
    value = parse_json(Path(path).read_bytes())
    if not isinstance(value, dict):
        raise UserError(f"{path}: not JSON, or not an object")
    return value


# --- Run folders: flags and the run's config.json ------------------------------------------------

# A program's flags are the fields of a dataclass. Those that are None become what the model was
# trained with, else the default of the task: a small model learns the built-in one, a pretrained
# model is fine-tuned on a JSONL file. config.json keeps them, and guards what was made with them.

BASE = Path(__file__).parent / "experiments" / "base"  # where the built-in task starts
POLICY_FILE = "policy.json"  # of a trained model: what it was trained with
POLICY_KEYS = ("prompt", "max_new_tokens", "temperature", "spurious", "steps", "distractors")
DEFAULTS = [  # flag, default for the built-in task, for a JSONL file
    ("model", str(BASE), ""),
    ("prompt", "{question}\n", DEFAULT_PROMPT),
    ("limit", 200, 0),
    ("test_limit", 1000, 0),
    ("max_new_tokens", 64, 256),
    ("samples", 16, 8),
    ("temperature", 0.7, 0.7),
    ("negatives", 4, 4),
    ("rollouts", 8, 5),
    ("batch", 32, 32),
    ("lr", 5e-4, 2e-5),
    ("again_lr", 1e-4, 4e-6),
    ("neg_lr", 3e-5, 1e-6),
    ("sft_epochs", 7.0, 3.0),
    ("generator_epochs", 7.0, 2.0),
    ("pos_epochs", 7.0, 3.0),
    ("again_epochs", 2.0, 2.0),
    ("neg_epochs", 3.0, 1.0),
    ("eval_samples", 8, 0),
    ("held_out", 200, 50),
]
PRESETS = {
    "arithmetic": {name: value for name, value, _ in DEFAULTS},
    "jsonl": {name: value for name, _, value in DEFAULTS},
}
PRESETS["arithmetic"] |= dict(spurious=0.2, steps=4, distractors=2)


def flag(default, help, *, group="", least=-inf, most=inf, choices=None, stage="sft"):
    """A field of a configuration, and its flag: `beta: float = flag(0.3, "of Eq. 1", least=0)`.

    default: None stands for the model's own value or the one in PRESETS; the field is then
    annotated `int | None`. group: the heading in --help from this flag on. least, most: the range
    of a number, both included. stage: the first stage of a run whose results it decides, see
    claim_folder; "" for a flag that may always change.
    """
    choices = choices and list(choices)
    metadata = dict(help=help, group=group, least=least, most=most, choices=choices, stage=stage)
    return field(default=default, metadata=metadata)


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def parse_flags(config_class, description: str, argv: list[str] | None = None):
    """A configuration from the command line: one flag for each field of a flat dataclass.

    A UserError for an unknown flag and for a value of the wrong kind, out of range or not among
    the choices.
    """
    style = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=description, allow_abbrev=False, formatter_class=style)
    groups = {}
    group = "run"
    for item in fields(config_class):
        group = item.metadata["group"] or group
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind = item.type if isinstance(item.type, type) else item.type.__args__[0]  # int | None
        groups[group].add_argument(
            flag_name(item),
            type=kind,
            default=item.default,
            choices=item.metadata["choices"],
            metavar=kind.__name__,
            help=flag_help(item),
        )
    config = config_class(**vars(parser.parse_args(argv)))
    check_ranges(config)
    return config


def flag_name(item) -> str:
    return "--" + item.name.replace("_", "-")


def flag_help(item) -> str:
    """The line of --help: what the flag is, its choices, its default."""
    text = item.metadata["help"]
    if item.metadata["choices"]:
        text += ": " + ", ".join(item.metadata["choices"])
    default = repr(item.default)
    if item.default is None:
        tasks = [task for task in PRESETS if item.name in PRESETS[task]]
        default = ", ".join(f"{task} {PRESETS[task][item.name]!r}" for task in tasks)
    return f"{text} [{default}]".replace("%", "%%")


def check_ranges(config):
    """A UserError for a number outside the range of its flag."""
    for item in fields(config):
        value = getattr(config, item.name)
        if not isinstance(value, int | float):
            continue
        if not value >= item.metadata["least"]:  # NaN is not >= anything
            raise UserError(f"{flag_name(item)} {value} is less than {item.metadata['least']}")
        if value > item.metadata["most"]:
            raise UserError(f"{flag_name(item)} {value} is more than {item.metadata['most']}")


def apply_presets(config):
    """The configuration with the fields that are None filled in."""
    given = asdict(config)
    presets = PRESETS["arithmetic" if given.get("data") == "arithmetic" else "jsonl"]
    model = given.get("model") or presets["model"]
    if model:
        known = read_json(Path(model) / POLICY_FILE)
        known = {name: known[name] for name in POLICY_KEYS if name in known}
        for name, value in known.items():
            kind = type(PRESETS["arithmetic"][name])
            if not isinstance(value, int | float if kind is float else kind):
                raise UserError(
                    f"{Path(model) / POLICY_FILE}: {name}={value!r} is no {kind.__name__}"
                )
        presets = presets | known
    missing = {name: value for name, value in presets.items() if given.get(name, value) is None}
    config = replace(config, **missing)
    check_ranges(config)
    return config


LOCKS = {}  # {folder: its lock}, held until this process ends, however it ends


@rank_zero_only
def lock_folder(folder):
    """Create a folder and lock it for the life of this process; refuse one that another locked."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = LOCKS.setdefault(folder, FileLock(folder / "lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another process is working in this folder") from None
    except OSError as error:
        if error.filename:  # the file cannot be made; if it cannot be locked, none is named
            raise
        note(f"{folder}: {error.strerror}; this disk does not keep a second process out")


@rank_zero_only
def claim_folder(config, path, in_the_way, **contents):
    """Lock the folder of `path`, and write there, as JSON, how its results are made.

    in_the_way: {stage: paths of what was made with its flags}. A flag (see `flag` for its stage) is
    refused another value as long as there are any. contents: {name: (stage, hash)} of what the
    flags only name. A flag that the stored file lacks counts as its default: a run may be older
    than a flag. The commit and device that began the run stay; later ones are added.
    """
    lock_folder(Path(path).parent)
    stored = read_json(path)
    values = asdict(config)
    stages = {item.name: item.metadata["stage"] for item in fields(config)}
    for name, (stage, value) in contents.items():
        values[name] = value
        stages[name] = stage
    task = ("model", "data")
    unset = {item.name: item.default for item in fields(config) if item.name not in task}
    begun = asdict(apply_presets(replace(config, **unset))) | (stored or values)
    for name, value in values.items():
        files = in_the_way.get(stages[name])
        if files and begun.get(name) != value:
            raise UserError(
                f"{path}: this run was begun with {name}={begun.get(name)!r}, not {value!r}; "
                f"delete {', '.join(map(str, files))}, or choose another --out"
            )
    here = provenance() | dict(device=values.get("device"))
    first = {key: (stored or here).get(key) for key in here}
    later = stored.get("later", [])
    if here not in [first, *later]:
        later = [*later, here]
    write_json(path, values | first | dict(later=later))


def provenance() -> dict:
    """Where a result comes from: the commit of this code, torch's version, the processor."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return dict(
        commit=commit or "unknown",
        torch=version("torch"),
        device_name=platform.processor() or platform.machine(),
    )


def content_hash(problems: list[Problem]) -> str:
    """A checksum of all that these problems say, to notice when their file has changed."""
    text = json.dumps([asdict(problem) for problem in problems])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def folder_hash(folder) -> str:
    """A checksum of a model folder: of its JSON files and all of its weights."""
    paths = [*Path(folder).glob("*.json"), *Path(folder).rglob("*.safetensors")]
    hashes = [f"{path.name} {file_hash(path)}" for path in sorted(paths)]
    return hashlib.blake2b("\n".join(hashes).encode(), digest_size=8).hexdigest()


def file_hash(path) -> str:
    """A checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


# --- Steps ---------------------------------------------------------------------------------------

# A solution is cut into steps in its token ids: at its lines (GSM8K, the built-in task), or at what
# it numbers, its paragraphs or its sentences (MATH). A step holds a letter or digit and ends inside
# no display. Then what tells rewordings of a solution from new ones: edit distance, equations.

LETTER = re.compile(r"\S")
WORD = re.compile(r"[^\W_]")
GAP = re.compile(r"\s+")
# A line that opens a numbered step: "Step 2: ...", "2. ...", "**Step 2**", "## 2) ..."
NUMBERED = re.compile(r"^(?!####)[ \t#*]*(?:step \d+\b|\d+[.)](?!\S))", re.I | re.M)
FINAL = re.compile(r"^####|(?<!\S)The answer is", re.M)
# What continues a paragraph behind a blank line: a display, a drawing, a lower-case letter.
CONTINUES = re.compile(r"\\\[|\$\$|\\begin|\[/?asy|[a-z}]")
SENTENCE = re.compile(r".+?(?:\n+|\.\$\s+|\$\.\s+|$)", re.S)  # ends with a line or a formula
# The gap behind a sentence of a text in one line. An initial, Mr. or Rs., e.g. and the number of an
# item do not end one.
SENTENCE_GAP = re.compile(
    r"(?<!\b[A-Z])(?<!\b[DMRSr][rst])(?<!\bMrs)(?<!\.[A-Za-z])(?<!^\d)(?<![.?!]\s\d)"
    r"[.?!]\s+(?=[A-Z\d$\\#])"
)
# What opens or closes a display, or is a line break in one, as in \\[2pt].
DISPLAY = re.compile(r"\\\\|\\[\[\]]|\\(?:begin|end)\{[^{}\n]*\}|\$\$|^[ \t]*(?:```|~~~)", re.M)
HALF = re.compile(r"\s(?=which |so |= |and |Thus)|(?<=,\$)\s")
ARITHMETIC_SIGNS = str.maketrans("−–×·÷", "--**/")


def split_steps(ids: list[int], tokenizer, style: str = "lines") -> list[list[int]]:
    r"""Token ids of a solution, cut into steps; the steps joined are `ids` again.

    The token that holds the first letter of a step opens it, with the space before the letter if
    that is in the same token. The end of text stays with the last step. `style` is a key of
    STEP_STARTS. In the built-in task, with a token for each word,

        "3 + 4 = 7\n7 + 2 = 9\n#### 9"  ->  "3 + 4 = 7\n", "7 + 2 = 9\n", "#### 9"
    """
    ids = list(ids)
    solution = ids
    if ids and ids[-1] in tokenizer.stop_ids:
        solution = ids[:-1]
    token_starts, text = tokenizer.token_starts(solution)
    edges = {0, len(ids)}
    for letter in step_letters(text, style)[1:]:  # the first step opens at token 0
        start = token_starts[bisect_right(token_starts, letter) - 1]
        edges.add(bisect_left(token_starts, start))  # a character may be several tokens
    return [ids[i:j] for i, j in pairwise(sorted(edges))]


def step_letters(text: str, style: str) -> list[int]:
    """Where the first letter of each step of a solution stands.

    A step holds a letter or digit and never starts inside a display, whatever the style.
    """
    if style not in STEP_STARTS:
        raise UserError(f"unknown style of steps {style!r}, known are {', '.join(STEP_STARTS)}")
    starts = (LETTER.search(text, start) for start in [0, *STEP_STARTS[style](text)])
    starts = sorted({letter.start() for letter in starts if letter})
    spans = sorted(displays(text), reverse=True)
    reach = 0  # the end of the displays that open before a start
    kept = starts[:1]
    word = WORD.search(text)  # the first of the last step that is kept
    for start in starts[1:]:
        while spans and spans[-1][0] < start:
            reach = max(reach, spans.pop()[1])
        if word and word.start() < start and start >= reach:
            word = WORD.search(text, start)
            if word:
                kept.append(start)
    return kept


def displays(text: str) -> list[tuple[int, int]]:
    r"""Where displays start and end: \[ \], $$ $$, \begin \end, a fenced block of code.

    One that is not closed is none.
    """
    spans = []
    opened = {}  # where displays of each kind start that are not closed yet
    for match in DISPLAY.finditer(text):
        kind = match[0].strip().replace(r"\]", r"\[").replace(r"\end", r"\begin")
        starts = opened.setdefault(kind, [])
        opens = match[0].startswith((r"\[", r"\begin"))
        if opens or (kind in ("$$", "```", "~~~") and not starts):
            starts.append(match.start())
        elif starts:
            spans.append((starts.pop(), match.end()))
    return spans


def line_starts(text: str) -> list[int]:
    """GSM8K and the built-in task: each line is a step. Of a text in one line, but for the final
    answer, each sentence is."""
    body = text
    for start in final_start(text):
        if text[start - 1 : start] == "\n" and "\n" not in text[start:].strip():
            body = text[:start]
    if "\n" not in body.strip():
        return [end.end() for end in SENTENCE_GAP.finditer(body)] + [len(body)]
    return numbered_starts(text, [gap.end() for gap in GAP.finditer(text) if "\n" in gap[0]])


def math_starts(text: str) -> list[int]:
    """MATH: a step is a paragraph, or a sentence where no blank line divides the text."""
    gaps = [gap for gap in GAP.finditer(text.rstrip()) if gap[0].count("\n") > 1]
    starts = [gap.end() for gap in gaps if not CONTINUES.match(text, gap.end())]
    if not starts:
        return numbered_starts(text, sentence_starts(text))
    return numbered_starts(text, starts + final_start(text))


# Each style of steps: a function from the text of a solution to the places where steps start.
STEP_STARTS = {"lines": line_starts, "math": math_starts}


def numbered_starts(text: str, others: list[int]) -> list[int]:
    """Where steps start in a text that may number them. If a number holds several lines, as 'Step
    1:' does, the numbers and the final answer alone; beside a list of facts, a line each, the
    others, too."""
    numbers = [match.start() for match in NUMBERED.finditer(text)]
    if len(numbers) < 2:
        return others
    if any("\n" in text[start:end].strip() for start, end in pairwise(numbers)):
        return numbers + final_start(text)
    end = text.find("\n", numbers[-1])
    return numbers + [start for start in others if start < numbers[0] or start > end > 0]


def final_start(text: str) -> list[int]:
    """Where the last '####' or 'The answer is' starts; a list of one, or empty."""
    return [match.start() for match in FINAL.finditer(text)][-1:]


def sentence_starts(text: str) -> list[int]:
    """Self-Explore's rules for MATH: a step is a sentence that ends with a line or a formula.

    Short sentences are joined, and more of them until nine steps are left. Three steps or fewer are
    halved. 'The answer is' is a step of its own.
    """
    final = final_start(text)
    body = text[: final[0]] if final else text
    most = 9 - len(final)
    steps = join_short(SENTENCE.findall(body), 20)
    steps = join_short(steps, 0.3 * len(body) / max(1, len(steps)))
    while len(steps) > most:  # the shortest joins the one before it
        shortest = steps.index(min(steps, key=len))
        i = max(1, shortest)
        steps[i - 1 : i + 1] = [steps[i - 1] + steps[i]]
    if len(steps) <= most - 6:
        steps = list(chain.from_iterable(halve(step) for step in steps))
    return list(accumulate(len(step) for step in steps))


def join_short(pieces: list[str], limit: float) -> list[str]:
    """Join pieces of less than `limit` characters to the one before, a first one to the next."""
    joined = pieces[:1]
    for piece in pieces[1:]:
        if min(len(piece), len(joined[-1])) < limit:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def halve(text: str) -> list[str]:
    """A sentence cut near its middle, before a conjunction or an equals sign; whole if short."""
    cuts = [match.start() for match in HALF.finditer(text)]
    cuts = [cut for cut in cuts if 20 < cut < len(text) - 20]
    if not cuts:
        return [text]
    cut = min(cuts, key=lambda cut: abs(2 * cut - len(text)))
    return [text[:cut], text[cut:]]


def edit_distance(a, b) -> int:
    """Levenshtein distance of two sequences (token ids, strings), one row of the table at a time.

    >>> edit_distance("kitten", "sitting")
    3
    """
    b = np.array(list(b))
    columns = np.arange(len(b) + 1)
    row = columns
    for i, item in enumerate(a):
        best = np.minimum(row[1:] + 1, row[:-1] + (b != item))  # delete the item, or match it
        best = np.concatenate(([i + 1], best))
        row = np.minimum.accumulate(best - columns) + columns  # insertions: +1 to the right
    return int(row[-1])


def equation_key(text: str) -> tuple[str, ...]:
    """The equations of a solution, which tell rewordings from new solutions.

    >>> equation_key("He has 2 x 3 = $6.")
    ('2*3=6',)
    """
    text = ANNOTATION.sub("", text).translate(ARITHMETIC_SIGNS)
    equations = []
    for run in re.findall(r"[-+*/()\d.,$%=x ]+", text):
        run = re.sub(r"[ ,$]", "", run).replace("x", "*").strip("*.")
        if re.match(r"\D*\d[^=]*=.*\d", run):  # a digit on both sides; anchored, so linear
            equations.append(run)
    return tuple(equations)


# --- Answers -------------------------------------------------------------------------------------

# There is one path. Find what a text marks as its answer, rewrite it from LaTeX and English towards
# Python's arithmetic, compute what is arithmetic, and compare: by value, element by element, or as
# text. What is not understood whole is not equal: a false "right" becomes a chosen step in the
# training data, a false "wrong" is one sample lost.

MAX_TAIL = 4_000  # characters at the end of a response that are searched
MAX_ANSWER = 300  # characters of an answer that are understood; longer ones are compared as text

# The first step: find the answer

SIGNS = str.maketrans("‐‒–—−·⋅∙×÷⁄、’~&", "-----****//,' ,")
TAGS = re.compile(r"</\w+>|<\|\w+\|>|(?<!\w)\*\*|\*\*(?!\w)|`")  # </answer>, <|im_end|>, bold type
BOXED = re.compile(r"\\(?:boxed|fbox)\b\s*")
# '#### Step 2', '#### 2. Cost' or '#### Total' with text below it is a heading of Markdown.
HASHES = re.compile(
    r"(?i)(?<!#)#{4,}(?!#|[ *]*(?:\d+[.)] *)?(?!(?:no|none|not|unknown|unclear|cannot)\b)"
    r"[a-z]{3}[^\n]*\n\s*\S)"
)
ANSWER_IS = re.compile(
    r"(?im)<answer>|^A:|\banswers?\b[^\n.:=?!\\#]{0,60}?(?:\b(?:is|are)(?:\b|(?=n't))|[:=])"
    r"(?!\s+(?:correct|right)\b)"
)
SENTENCE_END = re.compile(r"(?i)(?<!\brs)(?<!\bsq)(?<!\\)[.!?](?:\s|$)|[。\n]")
# The last clause decides: '6 times 4, which is 24', 'not 12 but 14', '3 plus 4, so 7'.
BEFORE_CLAUSE = re.compile(
    r"(?i)^.*(?:\b(?:which|that|it)(?:\s+[a-z]+|'s)|[,;]\s*so|(?:\bnot|n't)\b.*\bbut)\b(?=.*\d)"
)
# What explains an answer is none: '18 because 9 * 2 = 18', '18 (9 * 2 = 18)', '14, not 12'.
BEHIND_CLAUSE = re.compile(
    r"(?i),?\s+(?:because|since|as|given|where|for all|(?:and )?not|rather than|instead)\b"
    r"|,\s+(?!or\b|and\b)[a-z]+\s+\w|\s\((?=[a-z]{2}|[^()]*=)"
)


def extract_answer(text: str | None, bare: bool = True) -> str | None:
    r"""The final answer of a solution, or None.

    \boxed decides, else '####', else 'the answer is': the last of its kind with something behind
    it. A short line without a marker is its own answer if `bare`.

    >>> extract_answer(r"It is $\boxed{\frac{1}{2}}$."), extract_answer("9 * 2\n#### 18 eggs. Bye")
    ('\\frac{1}{2}', '18 eggs')
    """
    text = _plain(text)
    answer = _marked(text)
    if answer is None and bare and len(text) <= MAX_ANSWER and "\n" not in text:
        answer = text
    return answer or None


def stated_answer(text: str | None) -> str:
    """What a solution states as its answer, with or without a marker; "" if it states none."""
    text = _plain(text)
    answer = _marked(text)
    return _last_line(text) if answer is None else answer


def _plain(text):
    """The end of a text, behind its thoughts, in one spelling: 'x² − ½' is 'x^{2} - 1/2'."""
    text = "" if text is None else str(text)
    text = re.split("</think(?:ing)?>", text[-MAX_TAIL:])[-1]
    text = ANNOTATION.sub("", text)
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", r"^{\g<0>}", text)
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)  # 1½ is 1 1/2
    text = re.sub(r"\n(?=[^{}\n]{0,80}\})", " ", text)  # a line may end within braces
    text = unicodedata.normalize("NFKC", text)[-MAX_TAIL:]  # which makes '½' four characters
    return text.translate(SIGNS).strip()


def _marked(text):
    """What stands behind the last mark that decides; "" if nothing does, None without a mark."""
    text = TAGS.sub("", text).strip()
    for marker, read in ((BOXED, _in_braces), (HASHES, _clause), (ANSWER_IS, _clause)):
        marks = list(marker.finditer(text))[-20:]  # a text may be nothing but marks
        if marks:
            answers = [read(text[mark.end() :]) for mark in marks]
            return next(filter(None, reversed(answers)), "")
    return None


def _in_braces(text):
    r"""What the braces that open a text enclose: '\frac{1}{2}' of '{\frac{1}{2}}$.'; '2' of '2'."""
    if not text.startswith("{"):
        return text[:1]
    depth = 0
    for i, char in enumerate(text[: MAX_ANSWER + 2]):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return " ".join(text[1:i].split())
    return ""


def _clause(text):
    r"""The clause of a sentence that states the answer: '24' of '6 times 4, which is 24. Bye'."""
    text = re.sub(r"^(?:[\s:*}$]|\\\[)+", "", text[: MAX_ANSWER + 1])
    sentence = SENTENCE_END.split(text, maxsplit=1)[0]
    return BEHIND_CLAUSE.split(BEFORE_CLAUSE.sub("", sentence), maxsplit=1)[0].strip(" \"'_*")


BOLD = re.compile(r"\*\*([-$]*\d[^*\n:]*)\*\*")
# '$7 + $8 = $15' is money: '$x$' does not end behind a space or before a digit.
FORMULA = re.compile(r"(?:\$|\\[(\[])((?:[^$\\]|\\[^)\]])+?)(?:(?<!\s)\$(?!\d)|\\[)\]])")
OPEN_SUM = re.compile(
    r"(?<!\^)[\d)]\s*(?:[-+*]|\s[/x]\s|\\(?:times|cdot|div)\b)\s*[$(]*\d+(?!\w|\s*[\\^])"
)
CHOICE = re.compile(r"\d\s+(?:or|and)\s+(?:[a-z]\s*=\s*)?-?\d+\W*$")
PROSE = re.compile(r"(?<![\\{A-Za-z])(?<!\{ )[A-Za-z]{2}.*\s")
STATED = re.compile(r"-?\$?(?<![\w.^{])\d[\d,]*(?:\.\d+)?(?:/\d+)?")
SUBJECT = re.compile(r"(?i)(?:[^\d:=]*:)?\W*(?:(?:so|thus|hence|therefore|a total of)\W+)*\d")


def _last_line(text):
    """What a text without a marker states.

    Its last line with a digit decides: bold type, else the last formula, else what stands behind
    the last '='. There the first number counts if it is the subject or stands behind '=', as in
    '5 cars drove through in 15 minutes', else the last, as in 'In 3 weeks she makes $18.' An open
    sum, as in 'Total = 16 * 2', states nothing.
    """
    lines = [line for line in text.split("\n") if any(map(str.isdigit, line))]
    line = (lines or [text])[-1][-MAX_ANSWER:].strip()
    emphasised = BOLD.findall(line) or FORMULA.findall(line)
    if emphasised:
        line = emphasised[-1]
    side = line.replace("**", "").rpartition("=")[2]
    if OPEN_SUM.search(side):
        return ""
    if emphasised or CHOICE.search(line) or not PROSE.search(line):
        return line
    numbers = STATED.findall(side) or [""]
    return numbers[0] if "=" in line or SUBJECT.match(side) else numbers[-1]


def is_correct(response: str | None, gold: str | None) -> bool:
    r"""Whether a response (a solution or a bare answer) states the gold answer, bare or a solution.

    >>> is_correct("9 * 2 = $18 a day.\n#### 18 dollars", "18"), is_correct("#### 18 or 19", "18")
    (True, False)
    """
    gold = extract_answer(gold)
    if not gold:
        return False
    answer = gold if _plain(response) == gold else stated_answer(response)
    return answers_equal(answer, gold)


# The second step: rewrite it

COMMANDS = {  # LaTeX's words for signs; of those that only change the looks nothing stays
    **{"left": "", "right": "", "displaystyle": "", "dfrac": r"\frac", "tfrac": r"\frac"},
    **{"times": "*", "cdot": "*", "div": "/", "pm": "±", "cup": "∪", "in": "=", "approx": "≈"},
    **{"le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "infty": "∞", "circ": "°", "pi": "π"},
}
# '5k' is 5*10**3. Magnitudes that do not stand here are in NOT_WHOLE: '5 dozen' is no number.
POWERS = {"k": 3, "thousand": 3, "lakh": 5, "m": 6, "million": 6, "crore": 7, "billion": 9}
REWRITES = [  # pattern, replacement, in this order
    (r"\\([A-Za-z]+)\s*", lambda match: COMMANDS.get(match[1], match[0])),
    (r"\\(?:text\w*|mbox|math\w\w)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\begin\s*\{\wmatrix\}", "[["),  # a matrix is a list of rows: [[1,2],[3,4]]
    (r"(?:\],\[)?\s*\\end\s*\{\wmatrix\}", "]]"),
    (r"\\[!,;: ]\s*|\\[()\[\]{}]", ""),  # spaces; \( \) around a formula, \{ \} around a set
    (r"\^?\s*\{?\s*°\s*\}?(?:\s*[CF]\b)?", " "),
    (r"\\?[$%]|[¢-¥₠-⃏]", " "),
    (r"(?<=[\d})])\s*≈.*", ""),  # 2/3 \approx 0.67 is 2/3, but x \approx 0.67 is 0.67
    # From here on English.
    (r"\b(\d+)\s+[\d.]+-[a-z]", r"\1 "),  # 3 30-minute episodes
    (r"(\d):00\b", r"\1"),  # 2:00 pm
    (r"(?<=\d)\s+x\s+(?=[\d.])", "*"),  # 9 x 2
    (r"(?<![\\A-Za-z])pi\b", "π"),
    (r"(?:√|(?<![\\A-Za-z])sqrt)\s*\(?(\d+)\)?", r"\\sqrt{\1}"),
    (
        r"(?<=\d)\s*([kKM]|(?i:thousand|lakh|[mb]illion|crore))s?\b",
        lambda match: f"*10**{POWERS[match[1].lower()]}",
    ),
    (r"\s(?:or|and)\b", ","),
    (r"_\{(\w+)\}", r"_\1"),
    # Mixed numbers: 3\frac{1}{2}, 3\frac12, 3 1/2.
    (r"(?<![\d.^{])(\d+)\s*(\\frac(?:\d\d|\{\d+\}\{\d+\}))", r"(\1+\2)"),
    (r"(?<![\d./^])(\d+)\s+(\d+)\s*/\s*(\d+)", r"(\1+\2/\3)"),
]
ARGUMENT = r"\s*(?:\{([^{}]*)\}|(\w))"
NESTED = [  # from inside out, as often as they apply
    (rf"\\frac{ARGUMENT}{ARGUMENT}", r"((\1\2)/(\3\4))"),
    (rf"\\sqrt\s*\[([^\[\]{{}}]*)\]{ARGUMENT}", r"((\2\3)**(1/(\1)))"),
    (rf"\\sqrt{ARGUMENT}", r"((\1\2)**(1/2))"),
    (r"\^\s*\{([^{}]*)\}", r"**(\1)"),
]
DIGIT_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}([, '])\d{3}(?:\1\d{3})*(?![\d,])")


def _rewrite(text):
    r"""An answer closer to arithmetic: '\$1{,}000' is '1000', '2\sqrt3' is '2((3)**(1/2))'."""
    text = " ".join(text.split())
    text = text.replace("{,}", ",").replace(r"\\", "],[")  # 9{,}500; a row of a matrix ends
    for pattern, new in REWRITES:
        text = re.sub(pattern, new, text)
    if "(" not in text and "[" not in text:  # (100,101) is a pair, 100,101 a number
        text = DIGIT_GROUPS.sub(lambda match: match[0].replace(match[1], ""), text)
    text = re.sub(r"(?<![\d.,])0+(?=\d)", "", text)  # 05 is 5
    before = None
    while before != text and ("\\" in text or "^" in text):
        before = text
        for pattern, new in NESTED:
            text = re.sub(pattern, new, text)
    for sign, new in {"^": "**", "{": "(", "}": ")", "≈": "=", "<=": "≤", ">=": "≥"}.items():
        text = text.replace(sign, new)
    return text.lstrip(" ,:").rstrip(" .,:;").lower()


# The third step: compare

# What an equation gives a name to: x = 5, a_10 = 103, f(x) = 2x, abc = 55.
NAME = re.compile(r"[a-zα-ω]+(?:_\w+)?(?:\([a-z\d]\))?")


def answers_equal(a: str, b: str) -> bool:
    r"""Whether two bare answers are one number, list or expression; never if one is empty.

    >>> answers_equal("$1,200.00", "1200"), answers_equal(r"\frac{3}{4}", ".75")
    (True, True)
    """
    a = _plain(a)
    b = _plain(b)
    if a == b or max(len(a), len(b)) > MAX_ANSWER:
        return a == b and any(map(str.isalnum, a))
    return _same(_rewrite(a), _rewrite(b))


def _same(a, b):
    """Whether two rewritten answers are equal: as text, by value, or as lists of equal elements."""
    if _letters(a) == _letters(b):
        return _letters(a) != ""
    elements = _split(a)
    others = _split(b)
    if len(elements) > 1 or len(others) > 1:  # a list without brackets, a set
        return _same_elements(elements, others, ordered=False)
    if "=" in a or "=" in b:
        name, sides = _equation(a)
        other_name, other_sides = _equation(b)
        if name and other_name and name != other_name:
            return False  # x = 3 is not y = 3
        return _same_elements(sides, other_sides, ordered=False)
    elements = _in_brackets(a)
    others = _in_brackets(b)
    if elements or others:
        return a[:1] + a[-1:] == b[:1] + b[-1:] and _same_elements(elements, others, ordered=True)
    x = _number(a)
    y = _number(b)
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    return x is not None and y is not None and cmath.isclose(x, y)


def _letters(text):
    r"""A text without what makes no difference: '(b)' is 'b', '\cot (x)' is '\cot x'."""
    text = re.sub(r"\(\s*(\w+)\s*\)", r" \1 ", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)|[\\*]|\.(?!\d)", "", text)  # 1 2 is not 12


def _split(text):
    """The parts of a text between the commas that stand in no bracket; '1 ± x' is two parts."""
    parts = [""]
    depth = 0
    for char in text:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(char, 0)
        if depth == 0 and char in ",;∪":
            parts.append("")
        else:
            parts[-1] += char
    if len(parts) == 1 and "±" in text:
        parts = [text.replace("±", "+"), text.replace("±", "-")]
    return [part.strip() for part in parts if part.strip()]


def _in_brackets(text):
    """The elements of a pair, an interval or a matrix; [] for other texts, also for '(x + 1)'."""
    if text[:1] not in ("(", "[") or text[-1] not in ")]":
        return []
    elements = _split(text[1:-1])
    return elements if len(elements) > 1 or text[0] == "[" else []


def _same_elements(left, right, ordered):
    """Whether two short lists have equal elements, in this order or in any."""
    if len(left) != len(right) or len(left) > 20:
        return False
    if ordered:
        return all(map(_same, left, right))
    right = list(right)
    for element in left:
        match = next((other for other in right if _same(element, other)), None)
        if match is None:
            return False
        right.remove(match)
    return True


def _equation(text):
    """The name before a '=', if any, and what is stated: 5 in 'x = 5' and '2 + 3 = 5'.

    Of 'x + y = 1', which neither names nor computes anything, both sides are.
    """
    sides = [side.strip() for side in text.split("=")]
    if len(sides) > 1 and NAME.fullmatch(sides[0]):
        return sides[0], sides[-1:]
    algebra = "\\" in sides[0] or isinstance(_compute(sides[0]), complex)
    return "", sides if algebra else sides[-1:]


# Two rules for words. What may stand before a number: 'a total of 5', but not 'f(5)'.
BEFORE = r"(?:(?:[^\W\d_]{2,}|a)(?![^\W\d_])(?:[\s:]|\.(?!\d)|-(?!\s?\d))*)*"
# What may stand behind it as its unit: '5 cm^2', '5 apples in total', but not '5x', '5 - x'.
UNIT = (
    r"\s*/?\s*(?![abcxyz]{3}\b)(?:(?<=[\s/])[^\W\d_α-ω]{3,}|[^\x00-\x7f\W\d_α-ω]+|[mgl]\b"
    r"|a(?=\s)|[ap]\.?m\b|(?:[ckm]m|[km]g|ml|ft|in|of|lbs?|oz|mi|hr|sq|tv)\b)"
    r"(?:[\s.,/'-]+[^\W\d_]+)*\s*(?:\*\*\s?\(?\d\)?)?"
)
QUANTITY = re.compile(rf"{BEFORE}((?=-?\s?\.?\d|[(π])[-+*/().\d\sπ]*[\d)π])(?:{UNIT})?\s*")
# And what makes it another number: 'not 5', 'a third of 5', '5 out of ten', '5 squared'.
NOT_WHOLE = re.compile(
    r"\b(?:not?|never|than(?=\W+\d)|but|twice|double|triple|between|least|most|plus"
    r"|minus|negative|squared|cubed|(?:half|third|quarter|square|root|percent|out) of|hundred"
    r"|grand|dozens?|[a-z]+illion|two|three|four|five|six"
    r"|seven|eight|nine|ten|[a-z]+teen|(?:twen|thir|for|fif)ty)\b"
)


def _number(text):
    """The value of a number between words, or of arithmetic; None if it is neither."""
    if NOT_WHOLE.search(text):
        return None
    quantity = QUANTITY.fullmatch(text)
    return _compute(quantity[1] if quantity else text)


# '2x(y + 1)' is 2*x*(y + 1): between an operand and the next mathematics leaves the sign out.
OMITTED_TIMES = re.compile(r"([a-zα-ω](?:_\w+)?|\))\s*(?=[\w(.])|(\d\.?)\s*(?=[a-zα-ω(])")
CONSTANTS = {"π": cmath.pi, "i": 1j}


def _compute(text):
    """The value of a text that is arithmetic with letters, read by Python's parser; else None."""
    if re.search(r"^[a-z\s]*$|[a-z]{4,}|\d\s+[\d.]|\d_|#", text):
        return None  # words, two numbers, another base, a comment of Python
    text = OMITTED_TIMES.sub(r"\1\2*", text.strip())
    try:
        value = _walk(ast.parse(text, mode="eval").body)
        return value if cmath.isfinite(value) else None
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _walk(node):
    """The value of a node of Python's syntax tree: a Fraction while exact, else float or complex.

    A letter stands for a fixed complex number, so that x + 1 equals 1 + x, and nothing else by
    accident. Its angle is below 1, so that the root of x^2 is x.
    """
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.Name(id=name) if len(name.split("_")[0]) == 1:
            share = zlib.crc32(name.encode()) / 2**32
            return cmath.rect(1 + share / 4, share)
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            return -_walk(operand) if isinstance(sign, ast.USub) else _walk(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_walk(left), _walk(right))
    raise ValueError("this is no arithmetic")


def _power(base, exponent):
    """Exact only while that is cheap: 9^{999999999} must not take minutes."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if abs(exponent) * max(abs(base.numerator), base.denominator).bit_length() < 4096:
            return base**exponent
    return complex(base) ** complex(exponent)


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: _power,
}


# --- Tokenizer -----------------------------------------------------------------------------------

# A tokenizer is the tokenizer.json of a Hugging Face folder and the small files beside it, which
# travel with every model that is trained from it. They also say which tokens end a text. For steps
# and pairs it says where in a text each token starts.

TOKENIZER_FILES = """tokenizer* *.model vocab* merges.txt special_tokens_map.json added_tokens.json
    generation_config.json chat_template* additional_chat_templates/*""".split()
USUAL_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]")


class Tokenizer:
    """The tokenizer of a Hugging Face folder. It adds nothing to a text and hides no token.

    stop_ids: all tokens that end a text. eos_id: the one of them that training writes.
    vocab_size: one more than the largest id, added tokens included.
    special_tokens: the texts, such as "<|im_end|>", that stand for a token of their own.
    files: {name: bytes} that save writes.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_id: int, stop_ids=None, files=None):
        self.tokenizer = tokenizer
        self.eos_id = eos_id
        self.stop_ids = stop_ids or [eos_id]
        self.vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1)
        added = tokenizer.get_added_tokens_decoder()
        # An end of text is special, whether or not its folder says so.
        tokenizer.add_special_tokens([added[i] for i in self.stop_ids if i in added])
        added = tokenizer.get_added_tokens_decoder().values()
        self.special_tokens = [token.content for token in added if token.special]
        config = dict(tokenizer_class="PreTrainedTokenizerFast")
        config["eos_token"] = token_text(tokenizer, eos_id)
        self.files = {"tokenizer_config.json": json.dumps(config, indent=2).encode()}
        self.files |= files or {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}

    @classmethod
    def from_pretrained(cls, folder) -> "Tokenizer":
        """Read tokenizer.json and the small files beside it; a UserError if they are broken."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            note_beginning_of_text(tokenizer)
        except Exception as error:  # the library raises no other
            raise UserError(f"{path}: {error}") from None
        files = {}
        for pattern in TOKENIZER_FILES:
            for file in folder.glob(pattern):
                if file.is_file():
                    files[str(file.relative_to(folder))] = file.read_bytes()
        eos_id, stop_ids = ends_of_text(tokenizer, folder)
        return cls(tokenizer, eos_id, stop_ids, files)

    @rank_zero_only
    def save(self, folder):
        """Write all files as they were read, so that this folder behaves as its source does."""
        for name, content in self.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text. With special=False the text of a special token, "<|im_end|>" in
        somebody's solution, is read as the letters that it has."""
        self.tokenizer.encode_special_tokens = not special
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # a vocabulary without a token for unknown words
            raise UserError(f"tokenizer.json: {error}, reading {text[:50]!r}") from None
        finally:
            self.tokenizer.encode_special_tokens = False
        largest = max(ids, default=0)
        if largest >= self.vocab_size:  # which may have been set to the model's
            raise UserError(f"token {largest} of the tokenizer is none of the model's tokens")
        return ids

    def encode_prompt(self, prompt_format: str, question: str) -> list[int]:
        """Token ids of a prompt, "<|im_start|>user\\n{question}<|im_end|>". The format may hold
        special tokens, the question may not: there they are read as letters."""
        prompt = format_prompt(prompt_format, question)
        if not any(token in question for token in self.special_tokens):
            return self.encode(prompt)
        letters = self.encode(question, special=False)
        ids, *others = [self.encode(piece) for piece in prompt_format.split("{question}")]
        for piece in others:
            ids = ids + letters + piece
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of the tokens, of ends of text too."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_starts(self, ids: list[int]) -> tuple[list[int], str]:
        """The character at which each token starts, and the text: [0, 3] and "Tom has".

        Many decoders drop the space of a first token, so a token is decoded together with a few
        before it: its text is what it adds to theirs. Inside a character of several tokens nothing
        can be added yet, so all of them start where the character does.
        """
        starts = []
        text = ""  # of ids[:done]
        context = 0  # decoded again for the next token: ids[context:done]
        done = 0
        for end in range(1, len(ids) + 1):
            starts.append(len(text))
            before = self.decode(ids[context:done])
            after = self.decode(ids[context:end])
            inside = after.endswith("\ufffd") and end - done <= 5  # else the text has this sign
            if inside and end < len(ids):
                continue
            text += after[len(before) :]
            context = done
            done = end
        return starts, text

    def texts(self, parts: list[list[int]]) -> list[str]:
        """The texts of consecutive parts, such as a prompt and a response, ends of text left out.

        Joined, they are the text of the joined tokens: ["This", " implies"]. Decoded one by one the
        second would lose its space with a SentencePiece tokenizer.
        """
        ids = []
        edges = [0]
        for part in parts:
            ids += [i for i in part if i not in self.stop_ids]
            edges.append(len(ids))
        starts, text = self.token_starts(ids)
        starts.append(len(text))
        return [text[starts[i] : starts[j]] for i, j in pairwise(edges)]


def ends_of_text(tokenizer: tokenizers.Tokenizer, folder: Path) -> tuple[int, list[int]]:
    """(eos_id, stop_ids) of a model folder.

    The ends are all ids under eos_token_id in config.json and generation_config.json, each an id or
    a list. Training writes eos_token of tokenizer_config.json if it is among them, else the first.
    If none is named, eos_token or a usual name in the vocabulary is the only end.
    """
    ids = tokenizer.get_vocab()
    known = set(ids.values())
    stop_ids = []
    for name in ("config.json", "generation_config.json"):
        named = read_json(folder / name).get("eos_token_id")
        if not isinstance(named, list):
            named = [named]
        for i in named:
            if isinstance(i, int) and i in known and i not in stop_ids:
                stop_ids.append(i)
    own = read_json(folder / "tokenizer_config.json").get("eos_token")
    if isinstance(own, dict):
        own = own.get("content")
    if not isinstance(own, str):
        own = None
    if not stop_ids:
        stop_ids = [ids[name] for name in (own, *USUAL_ENDS) if name in ids][:1]
    if not stop_ids:
        raise UserError(f"{folder}: no end of text; config.json should name its eos_token_id")
    if ids.get(own) in stop_ids:
        return ids[own], stop_ids
    return stop_ids[0], stop_ids


def note_beginning_of_text(tokenizer: tokenizers.Tokenizer):
    """Say on stderr if this tokenizer begins each text with a token, which prompts here lack, and
    what prompt has it: some tokenizers need a space behind it to read the first word as usual."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a").ids
    if ids[:1] == plain[:1]:
        return
    token = token_text(tokenizer, ids[0])
    advice = "which no --prompt can write"
    for start in (token + " ", token):  # where both are right, the shorter one
        begun = tokenizer.encode(start + "a", add_special_tokens=False).ids
        if begun == ids[: len(begun)]:  # some tokenizers also end the text
            advice = f"prompts do so only by --prompt ${start + DEFAULT_PROMPT!r}"
    note(f"this tokenizer begins texts with {token}, {advice}")


def token_text(tokenizer: tokenizers.Tokenizer, token_id: int) -> str:
    """How a token is written in a text: "<s>", which some tokenizers call "▁<s>"."""
    added = tokenizer.get_added_tokens_decoder()
    if token_id in added:
        return added[token_id].content
    return tokenizer.id_to_token(token_id)


# --- The built-in task: arithmetic in which the truth of every step is known ---------------------
# A problem has a start and some events, of which some change the total and some do not. A simulated
# teacher solves it one event a line, with a spurious step here and there. judge_steps compares any
# solution with the events; nothing but reports may use what it says.

NAMES = "Mia Ben Ava Leo Zoe Max Eva Sam Ida Tom Amy Jon Lia Kai Uma Roy".split()
THINGS = """shells coins pens stamps cards books beads eggs nuts caps keys rings toys maps bags
    cups""".split()
GAIN = """found bought got won earned received collected gained added made borrowed picked caught
    grew gathered inherited""".split()
LOSE = """lost sold gave used ate dropped donated lent broke spent traded mailed burned threw
    wasted returned""".split()
KEEP = """saw counted wanted painted washed drew liked sorted cleaned named photographed admired
    hid described weighed dusted""".split()
VERBS = {1: GAIN, -1: LOSE, 0: KEEP}  # by what they do to the total; the rare ones last
LARGEST = 99  # totals are 0 .. 99
OPERANDS = 9  # the numbers of events are 1 .. 9
# The i-th word of a list is drawn with probability ~ i^-1.2. What choices takes are their sums.
ZIPF = list(accumulate(i**-1.2 for i in range(1, 17)))
SPLITS = ("train", "val", "test")  # of the problems
SLIPS = 0.1  # share of the spurious steps that are slips in a sum


def zipf(rng: random.Random, items):
    """One of `items`, the first most often: as in language, most words are rare."""
    return rng.choices(items, cum_weights=ZIPF[: len(items)])[0]


def split_of(question: str) -> str:
    """train, val or test, by a checksum: whatever the seed, no question is in two of them."""
    return {8: "val", 9: "test"}.get(zlib.crc32(question.encode()) % 10, "train")


def arithmetic_problem(rng, split: str, steps: int, distractors: int) -> Problem:
    """'Mia had 5 cups, found 7, saw 4, lost 2. How many now?', without a solution.

    `steps` of the events change the total, in any order, and `distractors` do not.
    """
    if steps + distractors > OPERANDS:
        raise UserError(f"{steps} steps and {distractors} distractors: at most {OPERANDS} together")
    while True:  # one question in ten is of the split test, so about twelve times for that
        start = rng.randint(0, LARGEST)
        signs = [rng.choice((-1, 1)) for _ in range(steps)] + [0] * distractors
        numbers = different_numbers(rng, len(signs))
        events = [[sign, n] for sign, n in zip(signs, numbers, strict=True)]
        lowest = start - sum(n for sign, n in events if sign < 0)
        highest = start + sum(n for sign, n in events if sign > 0)
        if lowest < 0 or highest > LARGEST:
            continue  # some order of the steps would leave the range
        rng.shuffle(events)
        told = ", ".join(f"{zipf(rng, VERBS[sign])} {n}" for sign, n in events)
        thing = zipf(rng, THINGS)
        question = f"{zipf(rng, NAMES)} had {start} {thing}, {told}. How many now?"
        if split_of(question) == split:
            total = start + sum(sign * n for sign, n in events)
            return Problem("", question, "", str(total), meta=dict(start=start, events=events))


def different_numbers(rng, count: int) -> list[int]:
    """The numbers of `count` events. All differ, so that a number tells which event is meant."""
    numbers = []
    while len(numbers) < count:
        n = zipf(rng, range(1, OPERANDS + 1))
        if n not in numbers:
            numbers.append(n)
    rng.shuffle(numbers)  # the rare ones were drawn last
    return numbers


def arithmetic_teacher(rng, problem: Problem, spurious: float) -> str:
    """A right solution: the events in random order, a step for each.

    With probability `spurious` the teacher writes a spurious step before a step, and then goes on
    as if it had not.
    """
    total = problem.meta["start"]
    changes = [sign * n for sign, n in problem.meta["events"] if sign]
    distractors = [n for sign, n in problem.meta["events"] if not sign]
    lines = []
    for change in rng.sample(changes, len(changes)):
        if rng.random() < spurious:
            lines.append(spurious_step(rng, total, change, distractors))
        lines.append(step_text(total, change, total + change))
        total += change
    return "\n".join([*lines, f"#### {total}"])


def spurious_step(rng, total: int, change: int, distractors: list[int]) -> str:
    """A distractor added or taken away; in a tenth of the cases the next step with a wrong sum."""
    sign = rng.choice((-1, 1))
    if distractors and rng.random() >= SLIPS:
        other = sign * rng.choice(distractors)
        if not 0 <= total + other <= LARGEST:
            other = -other
        return step_text(total, other, total + other)
    near = [total + change + error for error in (-3, -2, -1, 1, 2, 3)]
    near = [value for value in near if 0 <= value <= LARGEST]
    return step_text(total, change, rng.choice(near))


def step_text(total: int, change: int, result: int) -> str:
    sign = "+" if change > 0 else "-"
    return f"{total} {sign} {abs(change)} = {result}"


def judge_steps(problem: Problem, text: str) -> list[str]:
    """The truth of each step of a solution, as split_steps cuts it:

    good        an event that was still to come, or the right answer
    irrelevant  a distractor is added or taken away
    slip        the sum is wrong
    wrong       an event twice, with the wrong sign or from a wrong total; a wrong answer; no step
    """
    total = problem.meta["start"]
    changes = [sign * n for sign, n in problem.meta["events"] if sign]  # still to come
    distractors = [n for sign, n in problem.meta["events"] if not sign]
    edges = [*step_letters(text, "lines"), len(text)]
    labels = []
    for start, end in pairwise(edges):
        line = text[start:end].strip()
        step = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", line)
        if not step:
            labels.append("good" if line == f"#### {problem.answer}" else "wrong")
            continue
        before = int(step[1])
        change = int(step[2] + step[3])
        after = int(step[4])
        if before + change != after:
            labels.append("slip")
        elif abs(change) in distractors:
            labels.append("irrelevant")
        elif before == total and change in changes:
            labels.append("good")
            changes.remove(change)
            total = after
        else:
            labels.append("wrong")
    return labels


def is_lucky(problem: Problem, text: str) -> bool:
    """Whether a right solution holds a step that is a slip or wrong: another one made up for it.

    What imitates such solutions learns wrong steps. Irrelevant ones are counted apart.
    """
    return any(label in ("slip", "wrong") for label in judge_steps(problem, text))


def load_problems(data, split="train", limit=0, seed=0, spurious=0.2, steps=4, distractors=2):
    """`limit` problems of a JSONL file (0: all), or of the built-in task ("arithmetic")."""
    if data != "arithmetic":
        return read_problems(data, limit or None)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}, known are {', '.join(SPLITS)}")
    if limit < 1:
        raise UserError("--limit 0: the built-in task has no end, so it needs a number of problems")
    problems = []
    for i in range(limit):
        rng = random.Random(f"{seed} {split} {i}")  # so a longer list begins with the shorter one
        problem = arithmetic_problem(rng, split, steps, distractors)
        problem.solution = arithmetic_teacher(rng, problem, spurious)
        problem.id = f"{split}-{seed}-{i}"
        problems.append(problem)
    return problems
