"""Files from strangers and answers made to stall: a result or one line of error, and soon.

Each docstring names the bug it guards. Inputs are mutations of good ones, drawn from a seed, so a
failure can be made again. More of them than usual:

    FUZZ=20000 python -m pytest tests/test_fuzz.py
"""

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BASE, Tokenizer, UserError, answers_equal, equation_key, extract_answer
from data import is_correct, read_problems, read_rows, split_steps
from model import GPT, CheckpointError

N = int(os.environ.get("FUZZ", 400))
TOKENIZER = Tokenizer.from_pretrained(BASE)


def soon(function, *arguments, errors=(), seconds=1.0):
    """The result, or the text of one of `errors`, which must be one line."""
    began = time.process_time()  # the machine may be busy with other things
    try:
        result = function(*arguments)
    except errors as error:
        result = str(error)
        assert result and "\n" not in result, arguments
    taken = time.process_time() - began
    assert taken < seconds, (taken, function, str(arguments)[:300])
    return result


FRAGMENTS = r"""18 -3.5 1,234,567 1/3 \frac{1}{2} \frac12 \frac \sqrt[3]{2} \boxed{ } { #### answer:
    $ % 10^10^10 9**9**9 2^{ ( ) [ ] x x^2+1 \text{cm} \begin{pmatrix}1\\2\end{pmatrix} \pi π ٣ ½ ²
    e i = 1e999 nan inf \ \\ , ; 日本 <<3*4=12>> << A: or and true 0/0 1/0 ^ _ ! | \le \left( \cdot
    * / + . 90^\circ -- &""".split()
FRAGMENTS += [" ", "\n", "\0", "\ud800", "\u2028", "The answer is", "9" * 300, "(" * 60]


def random_text(rng):
    parts = [rng.choice(FRAGMENTS) for _ in range(rng.randrange(1, 12))]
    if rng.random() < 0.1:
        parts.append(rng.choice(parts) * rng.choice([50, 500, 5000]))
    return rng.choice(["", " "]).join(parts)


def check_answers(a, b):
    assert isinstance(soon(is_correct, a, b), bool)
    assert isinstance(soon(answers_equal, a, b), bool)
    answer = soon(extract_answer, a)
    assert answer is None or isinstance(answer, str)
    assert isinstance(soon(equation_key, a), tuple)


def test_answers_made_to_stall():
    """A verifier that hangs or raises ends the run (simpleRL-reason#95): a regex that backtracks
    for ever, a power that fills the memory, a nesting that ends the stack."""
    rng = random.Random(0)
    for _ in range(N):
        check_answers(random_text(rng), random_text(rng))


@pytest.mark.parametrize("piece", [*FRAGMENTS, r"\frac{", r"\sqrt{", "1+", "=1,0", "x=1 ", "a "])
def test_one_piece_many_times(piece):
    """Quadratic time in the length of a text that a model repeats until its budget ends."""
    check_answers(piece * 20_000, "18")
    check_answers("#### " + piece * 5_000, piece * 5_000)
    check_answers(r"\boxed{" + piece * 5_000 + "}", "18")


def test_steps_of_any_ids_add_up():
    """Tokens lost or doubled between the steps, whatever a model writes."""
    rng = random.Random(1)
    for _ in range(N // 10):
        ids = [rng.randrange(TOKENIZER.vocab_size) for _ in range(rng.randrange(1, 200))]
        for style in ("lines", "math"):
            steps = soon(split_steps, ids, TOKENIZER, style)
            assert sum(steps, []) == ids and all(steps)


PIECES = [b"\0", b"\xff", b"\n", b'"', b"{", b"[" * 2000, b"null", b"1e999", b"-1", b"NaN", b","]
PIECES += [b"true", b"9" * 20, b"\\ud800", b"\xed\xa0\x80", b" " * 100, b"[]"]


def mutated(rng, raw):
    """Bytes with a few of them cut, doubled or put in."""
    raw = bytearray(raw)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(raw) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            del raw[at : at + rng.choice([1, 5, 100])]
        elif kind == 1:
            raw[at:at] = rng.choice(PIECES)
        elif kind == 2:
            raw[at:at] = raw[at : at + 50]
        else:
            del raw[at:]
    return bytes(raw)


def test_problem_files(tmp_path):
    """A traceback for a line that is not ours, or an error that does not name the file."""
    rng = random.Random(2)
    path = tmp_path / "p.jsonl"
    rows = [
        dict(question="a b?", answer="x\n#### 18"),
        dict(problem="p", solution=r"\boxed{\frac{1}{2}}", id="k"),
        dict(prompt="q", answer="3", id=5),
    ]
    good = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for _ in range(N):
        path.write_bytes(mutated(rng, good))
        result = soon(read_problems, path, errors=UserError)
        if isinstance(result, str):
            assert result.startswith(str(path))
        else:
            assert all(problem.question and problem.answer for problem in result)


def test_rows_of_ours(tmp_path):
    """A damaged row believed, or an error that does not name the line."""
    rng = random.Random(3)
    path = tmp_path / "r.jsonl"
    good = b"".join(b'{"id": "%d", "samples": []}\n' % i for i in range(4))
    for _ in range(N):
        path.write_bytes(mutated(rng, good))
        result = soon(read_rows, path, dict(id=str, samples=list), errors=UserError)
        if isinstance(result, str):
            assert result.startswith(f"{path}:")
        else:
            assert all(type(row["id"]) is str for row in result)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_model_folders(tmp_path, name):
    """A traceback for a broken file of a model, such as a header that lies about sizes."""
    rng = random.Random(4)
    folder = shutil.copytree(BASE, tmp_path / "m")
    read = Tokenizer.from_pretrained if name == "tokenizer.json" else GPT.from_pretrained
    good = (BASE / name).read_bytes()
    refused = 0
    for _ in range(N // 8):
        head = mutated(rng, good[:2000])
        (folder / name).write_bytes(head + good[2000:])
        result = soon(read, folder, errors=(CheckpointError, UserError), seconds=5)
        refused += isinstance(result, str)
    assert refused > N // 16
