"""data.py: reading, the answer checker, steps, distances, the tokenizer. Each docstring names the bug it guards."""

import json
import random
import time

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import data
from data import DataError, answers_equal, extract_answer, is_correct, split_steps


def write(path, *rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def byte_level():
    """Trained on too little for most non-ASCII characters, which therefore take several tokens each."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    lines = ["Tom has 3 pens.\n\nHe buys 4 more.\n#### 7\n", "so $x = 2$. Then $y = 3$.\nThe answer is 5"] * 5
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<eos>"], "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=330, **options))
    return data.Tokenizer(bpe, bpe.token_to_id("<eos>"))


@pytest.fixture(scope="module")
def word_level():
    """Each word is a token, and so is a newline with what surrounds it."""
    vocab = {"<eos>": 0, "<unk>": 1, "Tom": 2, "runs": 3, " ": 4, "\n": 5, "end\nnew": 6}
    words = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.decoder = decoders.Fuse()
    return data.Tokenizer(words, 0)


# --- reading ---


def test_reads_three_formats(tmp_path):
    """A solution used as the answer; annotations left in the training text; MATH cut like GSM8K."""
    gsm = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5 pens.\n#### 5"}
    boxed = {"problem": "Find $x$.", "solution": r"So $x=\boxed{\frac{1}{2}}$; the answer = right."}
    path = write(tmp_path / "p.jsonl", gsm, b"", boxed, {"prompt": "1+1?", "answer": "2", "id": "mine"})
    a, b, c = data.read_problems(path)
    assert (a.id, a.solution, a.answer, a.style) == ("0", "2 + 3 = 5 pens.\n#### 5", "5", "lines")
    assert (b.id, b.answer, b.style) == ("2", r"\frac{1}{2}", "math")
    assert (c.id, c.question, c.solution, c.answer) == ("mine", "1+1?", "", "2")
    assert len(data.read_problems(path, limit=1)) == 1


GOOD = {"prompt": "1+1?", "answer": "2"}


@pytest.mark.parametrize(
    "rows, line, words",
    [
        ([GOOD, {"id": "0", **GOOD}], 2, "unique"),
        ([GOOD, {"id": True, **GOOD}], 2, "'id'"),
        ([{"prompt": "x", "answer": 2}], 1, "'answer'"),
        ([{"prompt": "a\0b", "answer": "2"}], 1, "NUL"),
        ([{"prompt": "  ", "answer": "2"}], 1, "'prompt'"),
        ([{"text": "x"}], 1, "question + answer"),
        ([b"[1, 2]"], 1, "question + answer"),
        ([GOOD, b"\xff\xfe"], 2, "UTF-8"),
        ([b'{"prompt": "\\ud800", "answer": "2"}'], 1, "UTF-8"),
        ([b"\xef\xbb\xbf" + json.dumps(GOOD).encode()], 1, "byte order mark"),
        ([GOOD, b"{" * 100_000], 2, "JSON"),
        ([b"[" * 100_000], 1, "JSON"),
        ([b" " * 10 + b"x" * 1_100_000], 1, "bytes"),
        ([{"question": "x", "answer": "five"}], 1, "####"),
        ([{"problem": "x", "solution": "five"}], 1, "boxed"),
        ([b"", b"  "], 1, "no problems"),
        ([], 1, "no problems"),
    ],
)
def test_bad_files_name_the_line(tmp_path, rows, line, words):
    """A traceback, a wrong line number, or silently dropped problems instead of one line that says what to do."""
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(DataError) as error:
        data.read_problems(path)
    message = str(error.value)
    assert message.startswith(f"{path}:{line}: ") and words in message and "\n" not in message
    assert message.count(";") >= 2, "problem; expected; mend"


def test_missing_file(tmp_path):
    """An OSError traceback for a mistyped path."""
    with pytest.raises(DataError, match="check the path"):
        data.read_problems(tmp_path / "none.jsonl")


def test_fuzzed_files_raise_nothing_else(tmp_path):
    """An exception other than DataError for a damaged file."""
    rng = random.Random(0)
    good = json.dumps({"question": "é?", "answer": "a\n#### 5"}).encode()
    for _ in range(300):
        line = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            line[rng.randrange(len(line))] = rng.randrange(256)
        try:
            data.read_problems(write(tmp_path / "f.jsonl", bytes(line)))
        except DataError as error:
            assert "\n" not in str(error).replace(str(tmp_path), "")


def test_format_prompt_keeps_braces():
    """str.format fails on, or rewrites, the braces of LaTeX."""
    assert data.format_prompt("{a} {question}", r"\frac{1}{question}") == r"{a} \frac{1}{question}"
    with pytest.raises(DataError, match="expected"):
        data.format_prompt("Q: {}", "x")


# --- answers ---

EQUAL = [
    ("8,000", "8000"), ("9{,}500", "9500"), (r"9\,500", "9500"), ("10.", "10"), ("10.00", "10"), (".5", "0.5"),
    ("18 miles", "18"), ("$18", "18"), (r"\$18", "18"), ("18 cm", "18"), ("18cm", "18"), (r"5\text{ cm}", "5"),
    (r"15\mbox{ cm}^2", "15"), ("18 dollars per day", "18"), (r"90^\circ", "90"), ("50%", "50"), (r"50\%", "50"),
    ("3/4", "0.75"), (r"\frac34", "3/4"), (r"\dfrac{3}{4}", ".75"), ("1 1/2", "1.5"), (r"-3\frac12", "-3.5"),
    ("−5", "-5"), ("-$5", "-5"), ("5", "5/1"), ("1e3", "1000"), (r"1.5 \times 10^3", "1500"), ("10^{5}", "100,000"),
    ("x = 5", "5"), (r"x \in [2,5]", "[2,5]"), (r"\text{(B)}", "B"), ("(B)", "b"), (r"\text{even}", "Even"),
    (r"\left( 3, \frac{\pi}{2} \right)", "(3,pi/2)"), ("(100,101)", "(100, 101)"),
    (r"\sqrt2", r"\sqrt 2"),
    (r"\frac{1}{2}\sqrt{3}", r"\frac{\sqrt3}{2}"), ("2x+3", "3 + 2x"), ("x^2-2x+1", "(x-1)^2"), ("5-2i", "-2i+5"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"), ("1,2", "2, 1"), (r"\{1,2\}", "1,2"),
    (r"-2\text{ or }3", "3,-2"),
    (r"\begin{pmatrix} \frac12 \\ 3 \end{pmatrix}", r"\begin{bmatrix}0.5\\3\end{bmatrix}"), ("7:30", "7:30"),
    (r"(-\infty,-2) \cup (-1,1]", r"(-\infty, -2)\cup(-1,1]"), ("2516_8", "2516_{8}"), ("<<9*2=18>>18", "18"),
    (r"\angle ABC = 55^\circ", r"55^\circ"), ("a_{10} = 103", "103"), ("5 = x", "x = 5"), (r"\frac14 = 0.25", "1/4"),
    (r"\frac{5}{13} \approx 0.38", r"\frac{5}{13}"), (r"x = \text{(B)}", "B"), ("f(x) = 2x", "y = 2x"),
    ("x = 3, x = -1", "-1, 3"), (r"x = 3 \text{ or } x = -1", "-1,3"), ("2x - 2y + 2 = 0", "y = x + 1"),
    ("0 = x + 2y - z", "x + 2y - z = 0"), ("3√10", r"3\sqrt{10}"), ("√51", r"\sqrt{51}"), ("13 m", "13"),
    ("27 °F", "27"),
    (r"\left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right)", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    ("\\begin{bmatrix} 1 \\\\\n 2 \\\\ \\end{bmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"), ("£5", r"\pounds 5"),
    (r"\left[\begin{matrix} 1 \\ 2 \end{matrix}\right]", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("x**2 - 3", "x^2-3"), (r"11,\! 111,\! 100", "11,111,100"), (r"\cot(x)", r"\cot x"), (r"2^(4950)", "2^{4950}"),
    ("a < b \\leq 5", r"a < b \le 5"),
    ("x > 5", r"(5,\infty)"), (r"3 \ge x > -2", "(-2,3]"),
    (r"x < 2 \text{ or } x \geq 3", r"(-\infty,2)\cup[3,\infty)"),
    (r"\mathbf{v} = \begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"), ("5; 7", "5,7"),
    ("5:30 PM", r"5\!:\!30 \text{ p.m.}"), ("05:00", "5:00"), (r"\frac{3}{5}", "3:5"), (r"25\pi\text{ cm}^3", r"25\pi"),
    (r"\mathbb{R}", r"(-\infty,\infty)"), (r"\varnothing", r"\emptyset"), (r"\boldsymbol{5}", "5"), (r"\quad 5", "5"),
]  # fmt: skip
UNEQUAL = [
    ("x+y=1", "10^{-400}=0"),
    ("12", "1 2"), ("1,2", "12"), ("-5", "5"), ("50%", "0.5"), ("", ""), (r"\text{}", ""), ("0", ""), ("$", "$"),
    ("(1,2)", "(2,1)"), ("(0,1)", "[0,1]"), ("(1,2)", "1"), ("3", "3,4"), ("even", "odd"), ("CBAD", "ABCD"),
    ("x+1", "x+2"), ("5x", "5"), ("1/3", "0.333"), ("9" * 200, "9" * 199), ("1e999999999", "2"), ("7:30", "7:3"),
    ("9^{999999999}", "3"), ("*", "* *"), ("2516_8", "2516"), ("B", "C"), ("1/0", "2/0"),
    (r"\begin{matrix}1&2\end{matrix}", r"\begin{matrix}1\\2\end{matrix}"), ("x + y = 0", "x + 2y = 0"),
    ("x = 3", "y = 3"), ("AB=9, CD=4", "AB=4, CD=9"), (r"\frac{12}{3}\tan x", r"\frac{1}{23}\tan x"),
    (r"\tan x = 2x", r"\cot x = 2x"), ("x + y + z = 0", "0"),
    (r"x \ge 5", r"(5,\infty)"), ("x > 5", r"(-\infty,5)"), ("x < y", "(0,y)"), ("x = 5", "x = 6"),
]  # fmt: skip


@pytest.mark.parametrize("a, b", EQUAL)
def test_two_formats_of_one_answer(a, b):
    """'10.' counted as wrong for '10' turns a good step into a first pit."""
    assert answers_equal(a, b) and answers_equal(b, a) and answers_equal(a, a)
    assert is_correct(rf"Hence it is $\boxed{{{a}}}$.", b)


@pytest.mark.parametrize("a, b", UNEQUAL)
def test_different_answers(a, b):
    """Lost minus signs, pairs read as numbers, 0 = 0 for two answers that could not be read."""
    assert not answers_equal(a, b) and not answers_equal(b, a)


RIGHT = [
    ("#### 5 apples", "5"), ("#### 1,234.50", "1234.5"), ("#### -3", "-3"), ("#### 10.", "10"),
    ("#### $10", "10"),
    ("1\n#### 3\nno\n#### 4", "4"), ("#### 7\n#### ", "7"), ("#### 9 * 2 = 18", "18"), ("72, in total", "72"),
    ("#### 18\n\nThanks", "18"), (r"\boxed 2", "2"), ("The answer is 18.", "18"),
    ("The answer is $18 per day.", "18"), ("**18**", "18"),
    ("The final answer is $18$. I hope it is correct.", "18"), ("Answer:\n\n18", "18"), ("**Answer:** 18", "18"),
    ("So she makes $18 every day.", "18"), ("She buys 3.\nShe makes\n$18 every day.\nWell done!", "18"),
    ("#### Step 3: 5 + 5\nThe total = 18.", "18"), (r"\boxed{18}. So the answer is correct.", "18"),
    (r"\boxed{5} No, the answer is 6.", "6"), ("Answer: Ann sells 9 eggs a day, all year. 9*2 = 18.", "18"),
    (r"So the answer is $\frac{3}{4}$ of it.", "3/4"), (r"Thus $x=\frac34$.", ".75"),
    ("A: 26", "26"), ("It lasts 10-18 days", "18"),
    ("The answer is (B).", r"\text{(B)}"), ("The answer is even.", r"\text{even}"), (r"\boxed{x=5}", "5"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt2}"), ("#### 5", "2+3 = <<2+3=5>>5\n#### 5"),
    ("It is 5-8=-3", "-3"), ("2516", "2516_8"), (r"\boxed{1011 \text{ (base 2)}}", "1011_2"), (r"\fbox{18}", "18"),
    (r"so \boxed{14}. Can it be? The answer is yes!", "14"), ("🎉 The answer is 34! 🎉", "34"),
    ("The answer is `34`.", "34"), ('The answer is "34".', "34"), ("She has 3.\n#### 18</s>", "18"),
    ("The answer is 3, since 4 - 1 = 3 boxes and 2 - 1 = 1.", "3"), ("The answer is:\n\\[\nx+1\n\\]", "1+x"),
    ("She makes **$18** from 9 eggs.", "18"), ("**3. Total:** 9 * 2 = 18", "18"),
    (r"\cos^{2}{(\alpha)}", r"\cos^2\alpha"),
    ("Thus\n<answer>x + 1</answer>", "1+x"), ("#### Cost of 3 apples\n\n3 * 5 = 15", "15"),
    (r"It is $\$18.90$.", "18.90"),
    ("Answer: x^8 + x^7 + x^6 + x^5 + x^4 + x^3 + 1", "1 + x^3 + x^4 + x^5 + x^6 + x^7 + x^8"),
]  # fmt: skip
WRONG = [
    ("", "5"), (None, "5"), (5.5, "5"), ("#### ", "5"), ("#### ,", "5"), ("#### 15", "5"), ("-5", "5"), ("3/4", "4"),
    (r"\boxed{(3,5)}", "3"), (r"\boxed{5 or 3}", "5"), (r"\boxed{", "5"), (r"\boxed{5x}", "5"), ("5", ""), ("5", None),
    ("#### 18\n#### 19", "18"), ("hello", "5"), (r"\boxed{}", r"\boxed{}"), ("It costs $5 more than $6", "5"),
    (r"\boxed{2517}", "2516_8"), (r"\boxed{2516_9}", "2516_8"), ("#### Cost of 3 apples\n\n3 * 5 = 15", "3"),
    ("The answer is 4, since 4 - 1 = 3 boxes.", "3"), (r"Then 13. \fbox{14}", "13"),
]  # fmt: skip


@pytest.mark.parametrize("response, gold", RIGHT)
def test_right_responses(response, gold):
    """The first marker instead of the last, '[\\d,]+' that matches a comma, nested braces cut short."""
    assert is_correct(response, gold), extract_answer(response)


@pytest.mark.parametrize("response, gold", WRONG)
def test_wrong_responses(response, gold):
    """Any number somewhere in the text accepted; no answer equal to no answer."""
    assert is_correct(response, gold) is False, extract_answer(response)


def test_no_answer_is_none():
    """A whole unfinished solution passed on as if it were an answer."""
    assert extract_answer("First he buys 3.\nThen he") is None and extract_answer("") is None
    assert extract_answer(" 42 ") == "42" and extract_answer(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"


PIECES = "#### |\\boxed{|{|(|1,|-|\\frac|answer is |((1,|\\text{|$|9|9 |\\sqrt|x^|2^9^|1e9|\n|<<|\\pm |\\{a,|\\(|=|or "


@pytest.mark.parametrize("piece", PIECES.split("|"))
def test_hostile_text_is_cheap(piece):
    """A regular expression or a power that takes minutes on a degenerate sample, or a recursion error, ends the run."""
    for size in (1_000_000, 3_900, 290, 150):
        text = piece * (size // len(piece))
        start = time.perf_counter()
        is_correct(text, "5"), is_correct("5", text), answers_equal(text, text + "1"), is_correct(text, r"\frac{x}{2}")
        assert time.perf_counter() - start < 0.4, (piece, size)


def test_fuzzed_answers():
    """Exceptions from odd text; an order-dependent verdict; a nonempty answer that is not itself."""
    rng = random.Random(0)
    alphabet = ["\\frac", "\\sqrt", "\\boxed", "\\text", "\\pm", *"{}()[]0123456789.,+-*/^_$%xi =;&\n#"]
    for _ in range(2000):
        a, b = ("".join(rng.choices(alphabet, k=rng.randrange(12))) for _ in range(2))
        assert answers_equal(a, b) == answers_equal(b, a) and is_correct(a, b) in (True, False)
    for _ in range(500):
        n, d = rng.randrange(-99999, 99999), rng.choice([1, 2, 4, 5, 8, 10])
        assert answers_equal(f"{n / d:,}", rf"\frac{{{n}}}{{{d}}}") and is_correct(f"so\n#### ${n:,} cats", str(n))
        assert not answers_equal(str(n), str(n + d)) and not is_correct(f"so\n#### {n + d}", str(n))


# --- steps ---


def steps_text(text, tokenizer, style="lines"):
    ids = tokenizer.encode(text)
    steps = split_steps(ids, tokenizer, style)
    assert sum(steps, []) == ids, "steps must join to the response, token by token"
    return [tokenizer.decode(step) for step in steps]


def test_lines(byte_level):
    """Empty steps for blank lines; characters of several tokens counted as several; a step from the end of text."""
    text = "Tom é has 日本🎉 3.\n\n\nHe 🎉 buys 4.\n  \n#### 7"
    assert steps_text(text, byte_level) == ["Tom é has 日本🎉 3.\n\n\n", "He 🎉 buys 4.\n  \n", "#### 7"]
    assert data._token_starts(byte_level.encode(text), byte_level)[1] == text
    ids = byte_level.encode("a\nb\n")
    assert split_steps(ids + [byte_level.eos_id], byte_level)[-1][-1] == byte_level.eos_id
    assert len(split_steps(ids + [byte_level.eos_id], byte_level)) == 2
    assert split_steps([], byte_level) == [] and split_steps([0], byte_level) == [[0]]


def test_token_across_a_boundary(word_level):
    """A token lost or doubled when its text holds the end of one step and the start of the next."""
    ids = [2, 6, 4, 3, 5, 2, 0]
    assert split_steps(ids, word_level) == [[2, 6], [4, 3, 5], [2, 0]]


def test_math_rule(byte_level):
    """Tiny steps, more than nine steps, an answer hidden in a step, a solution of one step only."""
    sentence = "Now the number $a + b$ is known to be $%d$. "
    many = "".join(sentence % i for i in range(20))
    steps = steps_text(many + "\nThe answer is 5", byte_level, "math")
    assert len(steps) == 9 and steps[-1] == "The answer is 5" and all(len(step) >= 20 for step in steps[:-1])
    text = "We begin with the long equation $a$, which is the reason that all is well $b$."
    few = steps_text(text, byte_level, "math")
    assert few == ["We begin with the long equation $a$", ", which is the reason that all is well $b$."]
    assert steps_text("Ok $x$. " + sentence % 1 * 4 + "So.", byte_level, "math")[0].startswith("Ok $x$. Now")
    uneven = "It is a very short one $x$. " + "word " * 60 + "so long $y$. " + "word " * 60 + "so long $z$."
    assert steps_text(uneven, byte_level, "math")[0].startswith("It is a very short one $x$. word")
    assert steps_text("It is $18. No.", byte_level, "math") == ["It is $18. No."]


def test_fuzzed_steps(byte_level, word_level):
    """Steps that do not join to the response; empty steps; undecodable bytes."""
    rng = random.Random(0)
    for tokenizer in (byte_level, word_level):
        for style in ("lines", "math"):
            for _ in range(200):
                ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(50))]
                steps = split_steps(ids, tokenizer, style)
                assert sum(steps, []) == ids and all(steps)


def test_steps_in_linear_time(byte_level):
    """Decoding the whole prefix for every token: seconds for each long response."""
    times = []
    for n in (500, 4000):
        ids = byte_level.encode("Tom 日 has\n" * n)
        start = time.perf_counter()
        assert len(split_steps(ids, byte_level)) == n
        times.append(time.perf_counter() - start)
    assert times[1] < 40 * times[0] + 0.1


# --- distances and equations ---


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        new = [i + 1]
        for j, y in enumerate(b):
            new.append(min(new[j] + 1, row[j + 1] + 1, row[j] + (x != y)))
        row = new
    return row[-1]


def test_edit_distance():
    """An off-by-one at the edges, or insertions that the vectorised row forgets."""
    rng = random.Random(0)
    assert data.edit_distance("kitten", "sitting") == 3
    assert data.edit_distance([], [1, 2]) == 2 == data.edit_distance("ab", "")
    for _ in range(200):
        a, b = (rng.choices(range(4), k=rng.randrange(15)) for _ in range(2))
        assert data.edit_distance(a, b) == levenshtein(a, b)


def test_equation_key():
    """Rewordings kept as different solutions; numbers without an equation taken for one."""
    a = data.equation_key("He pays 2 x 3 = $<<2*3=6>>6.\nSo 6 + 1,000 = 1,006 in all.\n#### 1006")
    assert a == data.equation_key("2*3=6 is paid, then 6+1000=1006.") == ("2*3=6", "6+1000=1006")
    assert data.equation_key("x = five, in 1999") == ()


# --- tokenizer ---


def test_tokenizer_round_trip(tmp_path, byte_level):
    """A saved tokenizer with another end of text, added special tokens, or lost added tokens in the size."""
    byte_level.save(tmp_path / "out")
    again = data.Tokenizer.from_pretrained(tmp_path / "out")
    text = "Tom has 日本\n"
    ends = tokenizers.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", again.eos_id)])
    again.tokenizer.post_processor = ends
    assert again.encode(text) == byte_level.encode(text) and again.decode(again.encode(text)) == text
    assert (again.eos_id, again.vocab_size) == (byte_level.eos_id, byte_level.vocab_size)
    assert again.decode([again.eos_id]) == "<eos>" and again.decode([again.eos_id], skip_special_tokens=True) == ""


def test_end_of_text_order(tmp_path, word_level):
    """The wrong end of text, so that generation never stops: config.json counts before the tokenizer's own."""
    word_level.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 2]}')
    assert data.Tokenizer.from_pretrained(tmp_path).eos_id == 3
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert data.Tokenizer.from_pretrained(tmp_path).eos_id == 2
    (tmp_path / "config.json").write_text('{"eos_token_id": 99}')
    assert data.Tokenizer.from_pretrained(tmp_path).eos_id == 3


@pytest.mark.parametrize("name, text", [("tokenizer.json", "{}"), ("config.json", "{"), ("config.json", "[]")])
def test_bad_tokenizer_folder(tmp_path, word_level, name, text):
    """A traceback from inside the tokenizers library."""
    word_level.save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="expected") as error:
        data.Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and name in str(error.value)
