"""data.py: problem files, run folders, flags, the answer checker, steps, the tokenizer.

Each docstring names the bug it guards.
"""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
from data import UserError, flag, parse_flags, read_problems, read_rows, split_steps

TRAINING_TEXTS = [
    "Tom has 3 pens.\n\nHe buys 4 more.\n#### 7\n",
    "so $x = 2$. Then $y = 3$.\nThe answer is 5",
] * 5


def write(path, *rows):
    """A JSONL file of rows; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def byte_level():
    """As GPT-2's: a token begins with the space before a word. Trained on so little that most
    characters beyond ASCII take several tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TRAINING_TEXTS, trainer)
    return data.Tokenizer(bpe, bpe.token_to_id("<eos>"))


@pytest.fixture(scope="module")
def sentencepiece():
    """As Llama-2's: '▁' for a space, one before the first word, bytes for unknown characters, and a
    decoder that drops the first space."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *pieces]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(TRAINING_TEXTS, trainer)
    settings = json.loads(bpe.to_str())
    settings["added_tokens"] = settings["added_tokens"][:3]  # bytes are no special tokens
    bpe = tokenizers.Tokenizer.from_str(json.dumps(settings))
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return data.Tokenizer(bpe, 2)


@pytest.fixture(scope="module")
def word_level():
    """Each word is a token, and so is a newline with what surrounds it."""
    vocab = {"<eos>": 0, "<unk>": 1, "Tom": 2, "runs": 3, " ": 4, "\n": 5, "end\nnew": 6}
    words = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.decoder = decoders.Fuse()
    return data.Tokenizer(words, 0)


# --- Problem files ---


def test_reads_gsm8k_and_math(tmp_path):
    """A solution used as the answer; annotations left in the training text; MATH cut like GSM8K."""
    gsm = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5 pens.\n#### 5"}
    boxed = {"problem": "Find $x$.", "solution": r"So $x=\boxed{\frac{1}{2}}$; the answer = right."}
    path = write(
        tmp_path / "p.jsonl", gsm, b"", boxed, {"prompt": "1+1?", "answer": "2", "id": "mine"}
    )
    a, b, c = read_problems(path)
    assert (a.id, a.solution, a.answer, a.style) == ("0", "2 + 3 = 5 pens.\n#### 5", "5", "lines")
    assert (b.id, b.answer, b.style) == ("2", r"\frac{1}{2}", "math")
    assert (c.id, c.question, c.solution, c.answer) == ("mine", "1+1?", "", "2")
    assert len(read_problems(path, limit=1)) == 1


@pytest.mark.parametrize(
    "row, expected",
    [
        (
            dict(prompt="q", solution="It is 9 * 2.", answer="18"),  # Big-Math
            ("q", "It is 9 * 2.", "18"),
        ),
        (
            dict(query="q", response="9 * 2 = 18\n#### 18\nThe answer is: 18"),  # MetaMathQA
            ("q", "9 * 2 = 18\n#### 18\nThe answer is: 18", "18"),
        ),
        (
            dict(problem="q", question="q", solution=r"So \boxed{025}.", answer="25"),  # AIME
            ("q", r"So \boxed{025}.", "25"),
        ),
        (dict(question=7, problem="q", answer=18), ("q", "", "18")),
        (dict(question="q", answer=18.0), ("q", "", "18.0")),
        (dict(question="q", solution=None, answer="x=2\n#### 2"), ("q", "x=2\n#### 2", "2")),
        (dict(problem="q", answer="", output=r"\boxed{3}"), ("q", r"\boxed{3}", "3")),
        (dict(prompt="q", solution="see below", response=r"\boxed{3}"), ("q", r"\boxed{3}", "3")),
        (
            dict(prompt="q", response=r"\boxed{4}", output=r"\boxed{3}", answer=3),
            ("q", r"\boxed{3}", "3"),
        ),
    ],
)
def test_names_in_use(tmp_path, row, expected):
    """A public file refused for the names of its columns, or its solutions dropped in silence."""
    problem = read_problems(write(tmp_path / "p.jsonl", row))[0]
    assert (problem.question, problem.solution, problem.answer) == expected


def test_repeated_ids_are_numbered(tmp_path):
    """GSM-Symbolic refused because its 50 variants of a problem share an id."""
    row = dict(question="q", answer="2")
    rows = [row | {"id": name} for name in (7, 7, "7-2", 7)]
    path = write(tmp_path / "p.jsonl", *rows)
    assert [p.id for p in read_problems(path)] == ["7", "7-2", "7-2-2", "7-3"]


GOOD = {"prompt": "1+1?", "answer": "2"}


@pytest.mark.parametrize(
    "rows, line, words",
    [
        ([{"prompt": "  ", "answer": "2"}], 1, "no question"),
        ([{"text": "x"}], 1, "no question, a text under question, problem, prompt, query"),
        ([b"[", GOOD, b"]"], 1, "JSON array"),
        ([GOOD, b"\xff\xfe"], 2, "UTF-8"),
        ([GOOD, b'"x"'], 2, "object"),
        ([b'{"prompt": "\\ud800", "answer": "2"}'], 1, "UTF-8"),
        ([GOOD, b'{"prompt": "x", "ans'], 2, "JSON"),
        ([GOOD, {"question": "x"}], 2, "gold"),
        ([{"question": "x", "answer": None}], 1, "gold"),
        ([{"question": "x", "answer": True}], 1, "gold"),
        ([{"question": "x", "answer": "five\nsix"}], 1, "gold"),
        ([{"problem": "x", "solution": "five"}], 1, "gold"),
        ([{"problem": "x", "solution": r"So \boxed{5}." + " so" * 2000}], 1, "gold"),
    ],
)
def test_bad_lines_are_named(tmp_path, rows, line, words):
    """A traceback, a wrong line number, a gold answer read as '' that nothing can match."""
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(UserError) as error:
        read_problems(path)
    message = str(error.value)
    assert message.startswith(f"{path}:{line}: ") and words in message and "\n" not in message


def test_files_without_problems(tmp_path):
    """An OSError traceback for a mistyped path; an empty file that trains on nothing."""
    with pytest.raises(UserError, match="none.jsonl: No such file"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no problems"):
        read_problems(write(tmp_path / "empty.jsonl", b"", b"  "))


def test_an_empty_box_is_left_out(tmp_path, capsys):
    """The 7,500 problems of MATH refused, or valued against '', because two boxes are empty."""
    empty = {"problem": "x", "solution": r"There are $\boxed{}$ primes."}
    path = write(tmp_path / "p.jsonl", GOOD, empty, GOOD)
    assert [p.id for p in read_problems(path)] == ["0", "2"]
    assert f"{path}:2: left out" in capsys.readouterr().err


def test_byte_order_mark(tmp_path):
    """A file that a Windows editor saved."""
    path = write(tmp_path / "p.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_problems(path)[0].answer == "2"


def test_format_prompt_keeps_braces():
    """str.format fails on, or rewrites, the braces of LaTeX."""
    prompt = data.format_prompt("{a} {question}", r"\frac{1}{question}")
    assert prompt == r"{a} \frac{1}{question}"
    with pytest.raises(UserError, match="question"):
        data.format_prompt("Q: {}", "x")


# --- Run folders ---


def test_rows_survive_a_crash(tmp_path):
    """Half a last line that spoils the file for good; a whole one that loses its row."""
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    rows = [{"id": "a", "text": "é\r\u2028"}, {"id": "b"}]
    data.append_rows(path, rows[:1])
    data.append_rows(path, rows[1:])
    whole = path.read_bytes()
    assert read_rows(path) == rows
    last = len(b'{"id": "b"}\n')
    for cut in range(2, last):
        path.write_bytes(whole[:-cut])
        assert read_rows(path) == rows[:1]
        data.append_rows(path, rows[1:])
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # only the newline is missing
    assert read_rows(path) == rows and path.read_bytes() == whole


@pytest.mark.parametrize("line", [b'{"id": "b"', b'{"id": 2}', b'["id"]', b"{}", b""])
def test_a_broken_row_is_named(tmp_path, line):
    """Rows dropped in silence, so that their problems are sampled again beside them."""
    path = write(tmp_path / "rows.jsonl", {"id": "a"}, line, {"id": "c"})
    with pytest.raises(UserError, match="rows.jsonl:2: not a JSON object with id"):
        read_rows(path)


def test_a_last_row_of_another_kind_stays(tmp_path):
    """A row that lacks a key deleted, as if a crash had cut it, since no newline follows."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 2}')
    with pytest.raises(UserError, match="rows.jsonl:1"):
        read_rows(path)
    assert path.read_text() == '{"id": 2}'


def test_files_are_never_half_written(tmp_path):
    """A crash while a file is written again that leaves neither the old nor the new one."""
    path = tmp_path / "rows.jsonl"
    data.write_rows(path, [{"id": "a"}])

    def failing_rows():
        yield {"id": "b"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_rows(path, failing_rows())
    assert read_rows(path) == [{"id": "a"}]
    data.write_json(tmp_path / "value.json", {"é": 1})
    assert data.read_json(tmp_path / "value.json") == {"é": 1}
    with pytest.raises(UnicodeEncodeError):
        data.write_json(tmp_path / "value.json", {"half an emoji": "\ud83c"})
    assert data.read_json(tmp_path / "value.json") == {"é": 1}


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    """Each row once per GPU."""
    monkeypatch.setattr(data, "RANK", 1)
    data.append_rows(tmp_path / "rows.jsonl", [{"id": "a"}])
    data.write_rows(tmp_path / "rows.jsonl", [{"id": "a"}])
    data.write_json(tmp_path / "value.json", 1)
    data.claim_folder(Settings(), tmp_path / "config.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "half.jsonl").write_text('{"id"')
    assert read_rows(tmp_path / "half.jsonl") == []
    assert (tmp_path / "half.jsonl").read_text() == '{"id"'


# --- Flags and config.json ---


@dataclass
class Settings:
    data: str = flag("arithmetic", "a task")
    batch_size: int = flag(4, "100% of the rows", group="training", least=1, most=8)
    rate: float = flag(0.5, "a rate", least=0)
    lr: float | None = flag(None, "a preset", group="training")
    loss: str = flag("dpo", "a loss", group="run", choices={"dpo": 1, "awr": 2})
    threads: int = flag(0, "threads", free=True)


def test_flags_from_a_dataclass(capsys):
    """A flag of the wrong type; defaults that --help does not show."""
    config = parse_flags(Settings, "What it does.", ["--batch-size", "8", "--lr", "1e-4"])
    assert config == Settings(batch_size=8, lr=1e-4)
    with pytest.raises(SystemExit):
        parse_flags(Settings, "What it does.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in text and "training: --batch-size int 100% of the rows [4]" in text
    assert "--lr float a preset [arithmetic 0.001, jsonl 2e-05]" in text
    assert "run: --data str a task ['arithmetic'] --loss str" in text
    assert "--loss str a loss: dpo, awr ['dpo']" in text


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--bath-size 8", "--bath-size"),
        ("--batch 8", "--batch"),
        ("--batch-size", "--batch-size"),
        ("--batch-size x", "--batch-size"),
        ("--batch-size 0", "--batch-size 0 is less than 1"),
        ("--batch-size 9", "--batch-size 9 is more than 8"),
        ("--rate nan", "--rate nan is less than 0"),
        ("--loss ppo", "ppo"),
    ],
)
def test_bad_flags(flags, words):
    """argparse's usage and exit code instead of our one line; a value that nothing can mean."""
    with pytest.raises(UserError) as error:
        parse_flags(Settings, "", flags.split())
    assert words in str(error.value) and "\n" not in str(error.value)


def test_presets():
    """A flag of the user's overwritten; the learning rate of the toy on a pretrained model."""
    assert data.apply_presets(Settings()).lr == 1e-3
    assert data.apply_presets(Settings(data="my.jsonl")).lr == 2e-5
    assert data.apply_presets(Settings(lr=0.0)).lr == 0.0
    assert data.PRESETS["arithmetic"].keys() == data.PRESETS["jsonl"].keys()


def test_claim_refuses_another_configuration(tmp_path):
    """A run that goes on in a folder whose rows another configuration or other problems made."""
    path = tmp_path / "run" / "config.json"
    config = data.apply_presets(Settings())
    data.claim_folder(config, path, data_hash="1")
    stored = json.loads(path.read_text())
    assert stored["lr"] == 1e-3 and stored["data_hash"] == "1" and stored["torch"]
    assert {"commit", "device_name"} < stored.keys()
    data.claim_folder(replace(config, threads=2), path, data_hash="1")
    with pytest.raises(UserError, match="rate=0.5, not 0.25"):
        data.claim_folder(replace(config, rate=0.25), path, data_hash="1")
    with pytest.raises(UserError, match="data_hash='1', not '2'"):
        data.claim_folder(config, path, data_hash="2")
    for name in ("rate", "lr"):  # as if the run were older than these flags
        del stored[name]
    path.write_text(json.dumps(stored))
    data.claim_folder(config, path, data_hash="1")
    path.write_text("{")
    with pytest.raises(UserError, match="config.json: not JSON"):
        data.claim_folder(config, path, data_hash="1")


def test_one_process_in_a_folder(tmp_path):
    """Two writers in one file; a lock that outlives its owner."""
    code = f"import data; data.lock_folder({str(tmp_path)!r}); print('locked', flush=True); input()"
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(data.__file__).parent)
    other = subprocess.Popen([sys.executable, "-c", code], **options)
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="another process"):
        data.lock_folder(tmp_path)
    other.kill()
    other.wait()
    data.lock_folder(tmp_path)
    data.lock_folder(tmp_path / ".")  # this process may come back


def test_hashes_notice_a_change(tmp_path):
    """Values kept for problems, or by a model, that have been replaced under the same name."""
    problem = data.Problem("1", "q", "s", "a")
    assert data.content_hash([problem]) == data.content_hash([replace(problem)])
    assert data.content_hash([problem]) != data.content_hash([replace(problem, solution="t")])
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 * 2**20))
    hashes = {data.folder_hash(tmp_path)}
    assert data.folder_hash(tmp_path) in hashes
    for place in (0, 3 * 2**20 - 1):
        with open(weights, "r+b") as file:
            file.seek(place)
            file.write(b"x")
        hashes.add(data.folder_hash(tmp_path))
    os.truncate(weights, 2 * 2**20 + 5)
    hashes.add(data.folder_hash(tmp_path))
    (tmp_path / "config.json").write_text("{} ")
    hashes.add(data.folder_hash(tmp_path))
    assert len(hashes) == 5


# --- Steps ---


def steps_text(text, tokenizer, style="lines"):
    """The texts of the steps. No end of text is in them."""
    ids = tokenizer.encode(text)
    steps = split_steps(ids, tokenizer, style)
    assert sum(steps, []) == ids, "steps must join to the response, token by token"
    texts = tokenizer.texts(steps)
    assert "".join(texts) == text
    return texts


def test_lines(byte_level):
    """Empty steps for blank lines; a character of several tokens cut; an end that is a step."""
    text = "Tom é has 日本🎉 3.\n\n\n🎉 He buys 4.\n  \n#### 7"
    steps = [step.strip() for step in steps_text(text, byte_level)]
    assert steps == ["Tom é has 日本🎉 3.", "🎉 He buys 4.", "#### 7"]
    second = split_steps(byte_level.encode(text), byte_level)[1]
    assert byte_level.decode(second).startswith("🎉"), "all four tokens of it"
    ids = byte_level.encode("a\nb\n")
    assert split_steps(ids + [byte_level.eos_id], byte_level)[-1][-1] == byte_level.eos_id
    assert len(split_steps(ids + [byte_level.eos_id], byte_level)) == 2
    assert split_steps([], byte_level) == [] and split_steps([0], byte_level) == [[0]]


def test_any_end_of_text_is_in_the_last_step(byte_level):
    """A second end of a chat model that counts as a step of its own."""
    ends = [byte_level.eos_id, byte_level.encode("x")[0]]
    tokenizer = data.Tokenizer(byte_level.tokenizer, ends[0], stop_ids=ends)
    ids = tokenizer.encode("3 + 4 = 7\n#### 7\n")
    for end in ends:
        assert split_steps(ids + [end], tokenizer)[-1][-1] == end
        assert len(split_steps(ids + [end], tokenizer)) == 2


def test_a_token_in_two_steps(word_level):
    """A token lost, doubled or left behind: the token with the first letter of a step opens it."""
    ids = [2, 6, 4, 3, 5, 2, 0]  # Tom|end\nnew| |runs|\n|Tom|<eos>
    assert split_steps(ids, word_level) == [[2], [6, 4, 3, 5], [2, 0]]
    assert split_steps([6, 6], word_level) == [[6], [6]]


SENTENCES = (
    "The line meets the parabola at the point $x = 2$. However, the second root is $x = 5$. "
    "Substituting both roots into the line, we get $y = 4$ and $y = 7$. "
    "Adding these, we find that the sum of all roots is $18$."
)


def test_math_sentences(byte_level, sentencepiece):
    """Cuts inside the word behind the boundary, as its token begins with the space before it."""
    starts = ["The line", "However, the", "Substituting both", "Adding these"]
    for tokenizer in (byte_level, sentencepiece):
        steps = steps_text(SENTENCES, tokenizer, "math")
        assert len(steps) == 4
        for step, start in zip(steps, starts, strict=True):
            assert step.strip().startswith(start)


@pytest.mark.parametrize("style", ["lines", "math"])
@pytest.mark.parametrize(
    "gap, steps",
    [
        ("\n\n", ["We have $x = 2$.", "So $y = 3$. Then $z = 5$, so all is well.", "It is 18."]),
        ("\n \n", ["Ann has 3.", "So 3 + 4 = 7."]),
        ("\n", ["Step 1: Find $x$.", "Step 2: It is $x = 3$. Thus $y = 4$.", "Step 3: So 7."]),
        ("\n", ["1. Find $x$ first.", "2. Then $x = 3$. And $y = 4$.", "3. So 7.", "#### 7"]),
        ("\n\n", ["**Step 1:** Find the root.", "**Step 2:** So 7.", "The answer is 7"]),
    ],
)
def test_marked_steps(byte_level, sentencepiece, style, gap, steps):
    """Steps that the text itself divides, by blank lines or numbers, joined or cut again."""
    for tokenizer in (byte_level, sentencepiece):
        found = steps_text(gap.join(steps), tokenizer, style)
        assert [step.strip() for step in found] == steps


def test_numbered_steps_of_several_lines(byte_level):
    """The heading of a step taken for a step, and the lines under it for others."""
    steps = ["Let us see.", "Step 1: Eggs\n16 - 3 = 13\n\nso 13.", "Step 2: Money\n13 * 2 = 26"]
    for style in ("lines", "math"):
        found = steps_text("\n\n".join([*steps, "#### 26"]), byte_level, style)
        assert [step.strip() for step in found] == [*steps, "#### 26"]


def test_displays_continue_a_paragraph(byte_level):
    """A formula on its own lines taken for a step, and the rest of its sentence for another."""
    steps = ["We have\n\n\\[x = 2\\]\n\nwhich is even.", "So $y = 3$.\n\n$$z = 4$$"]
    found = steps_text("\n\n".join(steps), byte_level, "math")
    assert [step.strip() for step in found] == steps


def test_math_rule(byte_level):
    """Tiny steps, more than nine steps, an answer hidden in a step, a solution of one step only."""
    sentence = "Now the number $a + b$ is known to be $%d$. "
    many = "".join(sentence % i for i in range(20))
    steps = steps_text(many + "\nThe answer is 5", byte_level, "math")
    assert len(steps) == 9 and steps[-1] == "The answer is 5"
    assert all(len(step) >= 20 for step in steps[:-1])
    text = "We begin with the long equation $a$, which is the reason that all is well $b$."
    few = [step.strip() for step in steps_text(text, byte_level, "math")]
    assert few == [text[:36], text[37:]]
    short = steps_text("Ok $x$. " + sentence % 1 * 4 + "So.", byte_level, "math")
    assert short[0].startswith("Ok $x$. Now")
    long = "word " * 60 + "so long "
    uneven = f"It is a very short one $x$. {long}$y$. {long}$z$."
    assert steps_text(uneven, byte_level, "math")[0].startswith("It is a very short one $x$. word")
    assert steps_text("It is $18. No.", byte_level, "math") == ["It is $18. No."]


def test_unknown_style(byte_level):
    """A misspelt style that cuts by another rule."""
    with pytest.raises(UserError, match="'sentences'.*lines, math"):
        split_steps([1, 2], byte_level, "sentences")


def test_fuzzed_steps(byte_level, sentencepiece, word_level):
    """Steps that do not join to the response; empty steps; undecodable bytes."""
    rng = random.Random(0)
    for tokenizer in (byte_level, sentencepiece, word_level):
        for style in ("lines", "math"):
            for _ in range(200):
                ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(50))]
                steps = split_steps(ids, tokenizer, style)
                assert sum(steps, []) == ids and all(steps)


def test_no_word_is_cut(byte_level, sentencepiece):
    """A boundary inside a word, or a step that begins behind its first letter, in random text."""
    rng = random.Random(0)
    words = ["Tom", "so", "which", "$x = 2$.", "$5.", ",$", "é", "日本", "Thus", "=", "\n", "2. "]
    for _ in range(300):
        text = " ".join(rng.choices(words, k=rng.randrange(1, 40))).strip()
        for tokenizer in (byte_level, sentencepiece):
            for style in ("lines", "math"):
                text_before = ""
                for step in steps_text(text, tokenizer, style):
                    joint = text_before[-1:] + step[:1]
                    assert len(joint) < 2 or any(c.isspace() for c in joint), (text, step)
                    text_before += step


def test_steps_in_linear_time(byte_level):
    """Decoding the whole prefix for every token: seconds for each long response."""
    times = []
    for n in (500, 4000):
        ids = byte_level.encode("Tom 日 has\n" * n)
        start = time.perf_counter()
        assert len(split_steps(ids, byte_level)) == n
        times.append(time.perf_counter() - start)
    assert times[1] < 40 * times[0] + 0.1


@pytest.mark.parametrize("piece", ["\n", " ", "a.$ ", "\n\n", "1. \n", "[asy]", "* ", ",$ ", "so "])
def test_hostile_steps_are_cheap(piece):
    """A regular expression that takes minutes on a degenerate sample."""
    text = piece * (60_000 // len(piece))
    start = time.perf_counter()
    for style in ("lines", "math"):
        data.step_letters(text + "x", style)
    assert time.perf_counter() - start < 2


# --- Distances and equations ---


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
        a = rng.choices(range(4), k=rng.randrange(15))
        b = rng.choices(range(4), k=rng.randrange(15))
        assert data.edit_distance(a, b) == levenshtein(a, b)


def test_equation_key():
    """Rewordings kept as different solutions; numbers without an equation taken for one."""
    a = data.equation_key("He pays 2 x 3 = $<<2*3=6>>6.\nSo 6 + 1,000 = 1,006 in all.\n#### 1006")
    assert a == data.equation_key("2*3=6 is paid, then 6+1000=1006.") == ("2*3=6", "6+1000=1006")
    assert data.equation_key("x = five, in 1999") == ()


# --- Tokenizer ---


def test_texts_join(byte_level, sentencepiece):
    """'This' and 'implies' joined to 'Thisimplies', on which another trainer would then train."""
    text = "Tom has 3 pens. So  日本 é\n\nHe runs."
    for tokenizer in (byte_level, sentencepiece):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        for cut in range(len(ids) + 1):
            parts = [ids[:cut], ids[cut:] + [tokenizer.eos_id], []]
            assert "".join(tokenizer.texts(parts)) == text
    this = sentencepiece.encode("Tom")
    implies = sentencepiece.encode("buys")
    assert sentencepiece.decode(implies) == "buys"
    assert sentencepiece.texts([this, implies]) == ["Tom", " buys"]


def test_tokenizer_adds_nothing(tmp_path, sentencepiece):
    """A beginning or an end of text in the middle of a prompt; special tokens hidden in texts."""
    sentencepiece.save(tmp_path)
    again = data.Tokenizer.from_pretrained(tmp_path)
    text = "Tom has 日本\n"
    assert again.encode(text) == sentencepiece.encode(text) and 1 not in again.encode(text)
    assert again.decode(again.encode(text)) == text
    assert (again.eos_id, again.vocab_size) == (2, sentencepiece.vocab_size)
    assert again.decode([again.eos_id]) == "</s>"
    assert again.texts([[again.eos_id]]) == [""]


def test_a_beginning_of_text_is_told_once(tmp_path, capsys, sentencepiece, byte_level):
    """A model that has only seen texts behind <s> sampled without it, and nobody knows."""
    data.note.cache_clear()
    sentencepiece.save(tmp_path / "a")
    byte_level.save(tmp_path / "b")
    for name in ("a", "a", "b"):
        data.Tokenizer.from_pretrained(tmp_path / name)
    assert capsys.readouterr().err.count("--prompt $'<s>Question: {question}\\nAnswer:\\n'") == 1
    assert sentencepiece.encode("<s>Tom")[0] == 1


@pytest.mark.parametrize(
    "config, generation, own, expected",
    [
        (None, None, "</s>", (2, [2])),
        (None, [3, 2], "<end>", (3, [3, 2])),
        (2, [3, 2], "<end>", (2, [2, 3])),
        ([9999, 3], -1, "</s>", (3, [3])),
        ([3, 2], 5, "</s>", (2, [3, 2, 5])),
        (None, None, "<end>", (2, [2])),
    ],
)
def test_ends_of_text(tmp_path, sentencepiece, config, generation, own, expected):
    """A sample that never stops, since the model ends its answers with a second end of text; a
    model trained to end with another token than its tokenizer names."""
    sentencepiece.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    for token in (own, {"content": own}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        tokenizer = data.Tokenizer.from_pretrained(tmp_path)
        assert (tokenizer.eos_id, tokenizer.stop_ids) == expected


def test_save_keeps_all_files(tmp_path, byte_level):
    """A trained chat model without its template, or one that vLLM no longer stops."""
    source = tmp_path / "source"
    byte_level.save(source)
    truncated = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    truncated.enable_truncation(5)
    truncated.save(str(source / "tokenizer.json"))
    texts = {
        "tokenizer.json": (source / "tokenizer.json").read_text(),
        "tokenizer_config.json": '{"eos_token": "<eos>",\n "model_max_length": 7}',
        "generation_config.json": '{"eos_token_id": [0]}',
        "special_tokens_map.json": "{}",
        "added_tokens.json": "{}",
        "chat_template.jinja": "{{ 'é' }}\n",
    }
    for name, text in texts.items():
        (source / name).write_text(text, encoding="utf-8")
    tokenizer = data.Tokenizer.from_pretrained(source)
    assert len(tokenizer.encode("Tom has 3 pens. " * 9)) > 5
    tokenizer.save(tmp_path / "copy")
    copied = {path.name: path.read_text("utf-8") for path in (tmp_path / "copy").iterdir()}
    assert copied == texts


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", None),
        ("config.json", "{"),
        ("config.json", "[]"),
        ("tokenizer_config.json", "{}"),
    ],
)
def test_bad_tokenizer_folder(tmp_path, word_level, name, text):
    """A traceback from inside the tokenizers library; a model that cannot end a text."""
    word_level.tokenizer.get_vocab()
    word_level.save(tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    if name == "tokenizer_config.json":
        words = json.loads((tmp_path / "tokenizer.json").read_text())
        words["model"]["vocab"]["end"] = words["model"]["vocab"].pop("<eos>")
        (tmp_path / "tokenizer.json").write_text(json.dumps(words))
        name = "no end of text"
    with pytest.raises(UserError, match=name) as error:
        data.Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_token_that_the_model_lacks(byte_level):
    """An index error of the embedding, far from the folder whose files do not belong together."""
    tokenizer = data.Tokenizer(byte_level.tokenizer, 0)
    largest = max(tokenizer.encode("Tom"))
    tokenizer.vocab_size = largest
    with pytest.raises(UserError, match=f"token {largest}"):
        tokenizer.encode("Tom")
