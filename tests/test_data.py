"""data.py: problem files, run folders, flags, the answer checker, steps, the tokenizer.

Each docstring names the bug it guards.
"""

import ast
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
from data import UserError, flag, load_problems, parse_flags, read_problems, read_rows, split_steps

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


def test_answers_that_are_none_are_left_out(tmp_path, capsys):
    """The 7,500 problems of MATH refused, because two boxes are empty; a gold "proof" or NaN that a
    sample may match; rows that are gone without a word."""
    data.note.cache_clear()
    rows = [GOOD, {"problem": "x", "solution": r"There are $\boxed{}$ primes."}]
    rows += [dict(question="q", answer=x) for x in ("proof", "notfound", "NaN", math.nan, "None")]
    rows += [
        dict(question="q", answer=x) for x in ("Proof.", r"\text{N/A}", "[invalid]", r"\boxed{}")
    ]
    path = write(tmp_path / "p.jsonl", *rows, GOOD)
    assert [p.id for p in read_problems(path)] == ["0", "11"]
    assert f"{path}: 10 problems left out, the first in line 2" in capsys.readouterr().err


def test_a_word_inside_a_solution_is_no_missing_answer(tmp_path):
    """A line that cannot be read left out instead of refused, because "banana" holds "nan"."""
    for word in ("banana", "none of them", "a proof"):
        with pytest.raises(UserError, match="p.jsonl:2: no gold answer"):
            read_problems(write(tmp_path / "p.jsonl", GOOD, dict(question="q", solution=word)))


def test_contradicting_solutions_are_not_imitated(tmp_path, capsys):
    """A teacher's solution that ends in another answer than its row's, imitated without a word."""
    data.note.cache_clear()
    rows = [
        dict(question="q", solution="2 + 2 = 5\n#### 5", answer="4"),
        dict(question="q", solution="The answer is 5.", answer="4"),
        dict(question="q", solution="2 + 2 = 4\n#### 4", answer="4"),
        dict(question="q", solution="I do not know.", answer="4"),
        dict(question="q", solution="2 + 2 = 5\nSo there are 5.", answer="4"),
        dict(question="q", solution="2 + 2 = 5\n#### 5", answer="#### 4"),
        dict(question="q", solution="2 boys have 4, of 5 in all.", answer="4"),
    ]
    path = write(tmp_path / "p.jsonl", *rows)
    solutions = [p.solution for p in read_problems(path)]
    assert solutions == [
        "",
        "",
        rows[2]["solution"],
        rows[3]["solution"],
        "",
        "",
        rows[6]["solution"],
    ]
    assert "4 solutions left out, the first in line 1" in capsys.readouterr().err


def test_a_runs_own_problems_are_read_back(tmp_path):
    """test.jsonl of a run that is another test: without the truth of its steps, cut elsewhere."""
    problems = load_problems("arithmetic", "train", 3)
    problems.append(replace(problems[0], id="m", style="math", meta=None))
    path = tmp_path / "p.jsonl"
    data.write_rows(path, [asdict(problem) for problem in problems])
    again = read_problems(path)
    assert again == problems


def test_golds_in_words_are_read(tmp_path):
    """A whole file of MATH refused, because a gold such as '2, 3, and 4' does not equal itself."""
    golds = [
        r"2, 3, \text{ and } 4",
        "90\\text{ square\nunits}",
        r"\text{(B)}",
        "4 apples and 3 pears",
    ]
    rows = []
    for gold in golds:
        rows.append(dict(problem="q", solution=rf"So \boxed{{{gold}}}.", answer=gold))
    problems = read_problems(write(tmp_path / "p.jsonl", *rows))
    assert len(problems) == len(golds) and all(problem.solution for problem in problems)


def test_many_rows_of_one_id(tmp_path):
    """Eight seconds for 8,000 rows of one id; an id that another row has."""
    rows = [dict(GOOD, id=id) for id in ["7"] * 3 + ["7-2"] + ["7"] * 8000]
    began = time.process_time()
    ids = [p.id for p in read_problems(write(tmp_path / "p.jsonl", *rows))]
    assert time.process_time() - began < 4
    assert ids[:5] == ["7", "7-2", "7-3", "7-2-2", "7-4"] and len(set(ids)) == len(ids)


def test_missing_keys_are_named(tmp_path):
    """An error that does not say under which names a question or an answer is looked for."""
    for row, keys in ((dict(text="q"), "problem"), (dict(question="q", gold="1"), "response")):
        with pytest.raises(UserError, match=f"p.jsonl:1: no [^\\n]*{keys}"):
            read_problems(write(tmp_path / "p.jsonl", row))


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


def test_control_characters_are_shown(capsys):
    """A question that clears the terminal, or turns the rest of a line around."""
    data.note.cache_clear()
    assert data.printable("Tom é 日本🎉\n 3") == "Tom é 日本🎉\n 3"
    assert data.printable("a\x1b[2J\r\tb\x00\x9b\u202e\u2028") == (
        r"a\x1b[2J\r\tb\x00\x9b\u202e\u2028"
    )
    assert data.printable("\ud83c") == r"\ud83c", "half an emoji cannot be printed"
    data.note("file\x1b[31m.jsonl")
    assert capsys.readouterr().err == "note: file\\x1b[31m.jsonl\n"


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
    data.claim_folder(Settings(), tmp_path / "config.json", {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "half.jsonl").write_text('{"id"')
    assert read_rows(tmp_path / "half.jsonl") == []
    assert (tmp_path / "half.jsonl").read_text() == '{"id"'


# --- Flags and config.json ---


@dataclass
class Settings:
    data: str = flag("arithmetic", "a task")
    batch_size: int = flag(4, "100% of the rows", group="training", least=1, most=8)
    rate: float = flag(0.5, "a rate", least=0, stage="neg")
    lr: float | None = flag(None, "a preset", group="training")
    loss: str = flag("dpo", "a loss", group="run", choices={"dpo": 1, "awr": 2})
    threads: int = flag(0, "threads", stage="")
    model: str = flag("", "a folder", stage="")


def test_flags_from_a_dataclass(capsys):
    """A flag of the wrong type; defaults that --help does not show."""
    config = parse_flags(Settings, "What it does.", ["--batch-size", "8", "--lr", "1e-4"])
    assert config == Settings(batch_size=8, lr=1e-4)
    with pytest.raises(SystemExit):
        parse_flags(Settings, "What it does.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in text and "training: --batch-size int 100% of the rows [4]" in text
    assert "--lr float a preset [arithmetic 0.0005, jsonl 2e-05]" in text
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
    assert data.apply_presets(Settings()).lr == 5e-4
    assert data.apply_presets(Settings(data="my.jsonl")).lr == 2e-5
    assert data.apply_presets(Settings(lr=0.0)).lr == 0.0
    world = {"spurious", "steps", "distractors"}
    assert data.PRESETS["arithmetic"].keys() - world == data.PRESETS["jsonl"].keys()


def test_a_model_brings_its_prompt_and_world(tmp_path, monkeypatch):
    """A model tested with another prompt or budget, or in another world, than it was trained."""
    monkeypatch.setattr(data, "POLICY_KEYS", ("lr",))
    (tmp_path / data.POLICY_FILE).write_text('{"lr": 7.0, "batch_size": 5}')
    assert data.apply_presets(Settings(model=str(tmp_path))).lr == 7.0
    assert data.apply_presets(Settings(model=str(tmp_path), data="my.jsonl")).lr == 7.0
    assert data.apply_presets(Settings(model=str(tmp_path), lr=3.0)).lr == 3.0


def test_claim_refuses_another_configuration(tmp_path):
    """A run that goes on in a folder whose rows another configuration or other problems made; hours
    of work refused for a flag of a stage of which nothing is there; a commit overwritten by a rerun
    that made nothing."""
    path = tmp_path / "run" / "config.json"
    config = data.apply_presets(Settings())

    def claim(config, made=("sft", "neg"), hash="1"):
        names = dict(sft=["run/sft", "run/neg"], neg=["run/neg"])
        in_the_way = {stage: names[stage] if stage in made else [] for stage in names}
        data.claim_folder(config, path, in_the_way, data_hash=("sft", hash))

    claim(config)
    stored = json.loads(path.read_text())
    assert stored["lr"] == 5e-4 and stored["data_hash"] == "1" and stored["torch"]
    assert {"commit", "device_name"} < stored.keys()
    claim(replace(config, threads=2))
    with pytest.raises(UserError, match="rate=0.5, not 0.25; delete run/neg, or choose another"):
        claim(replace(config, rate=0.25))
    with pytest.raises(UserError, match="delete run/sft, run/neg, or choose another --out"):
        claim(replace(config, lr=0.25))
    with pytest.raises(UserError, match="data_hash='1', not '2'"):
        claim(config, hash="2")
    claim(replace(config, rate=0.25), made=["sft"])
    assert json.loads(path.read_text())["rate"] == 0.25, "nothing was there of its stage"
    stored |= dict(commit="older", rate=0.5)
    for name in ("rate", "lr"):  # as if the run were older than these flags
        del stored[name]
    path.write_text(json.dumps(stored))
    for _ in range(2):
        claim(config)
    again = json.loads(path.read_text())
    assert again["commit"] == "older" and len(again["later"]) == 1
    assert again["later"][0]["commit"] == data.provenance()["commit"]
    path.write_text("{")
    with pytest.raises(UserError, match="config.json: not JSON"):
        claim(config)


def test_hashes_see_every_byte(tmp_path):
    """Other weights of the same size, whose middle nobody reads; a generation_config.json that
    ends texts elsewhere."""
    files = {"config.json": b"{}", "model.safetensors": bytes(5_000_000)}
    files["generation_config.json"] = b"{}"
    seen = set()
    for name in (None, *files):
        for other, content in files.items():
            middle = len(content) // 2
            changed = content[:middle] + b"!" + content[middle + 1 :]
            (tmp_path / other).write_bytes(changed if other == name else content)
        (tmp_path / "samples.jsonl").write_text(str(name))
        seen.add(data.folder_hash(tmp_path))
    assert len(seen) == 4


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


def begins_with_s(normalizer=None, pre_tokenizer=None, normalized=False):
    """A tokenizer that writes <s> before each text, read from its file as any other."""
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        bpe.normalizer = normalizer
    if pre_tokenizer is not None:
        bpe.pre_tokenizer = pre_tokenizer
    special = ["<unk>", "<s>", "</s>"]
    alphabet = list("<>s/▁Ġ")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([data.DEFAULT_PROMPT] * 5, trainer)
    template = ("<s> $A </s>", [("<s>", 1), ("</s>", 2)])
    bpe.post_processor = processors.TemplateProcessing(template[0], special_tokens=template[1])
    settings = json.loads(bpe.to_str())
    for token in settings["added_tokens"]:
        token["normalized"] = normalized
    return tokenizers.Tokenizer.from_str(json.dumps(settings))


LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
BEGINNERS = {
    "Llama-2": dict(normalizer=LLAMA_2),
    "Llama-2, normalized": dict(normalizer=LLAMA_2, normalized=True),
    "a space before the first word": dict(pre_tokenizer=pre_tokenizers.Metaspace("▁", "first")),
    "a space before every piece": dict(pre_tokenizer=pre_tokenizers.Metaspace("▁", "always")),
    "no space before words": dict(pre_tokenizer=pre_tokenizers.Metaspace("▁", "never")),
    "byte level": dict(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte level with a space": dict(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
}


@pytest.mark.parametrize("name", BEGINNERS)
def test_the_advised_prompt_begins_as_texts_do(name, capsys):
    """A prompt advised that holds other tokens: '▁<s>' in letters, or a first word without its
    space. What the note says must encode to what the tokenizer itself makes of the prompt."""
    data.note.cache_clear()
    bpe = begins_with_s(**BEGINNERS[name])
    data.note_beginning_of_text(bpe)
    said = capsys.readouterr().err
    assert "begins texts with <s>, prompts do so only by" in said
    prompt = ast.literal_eval(said.split("--prompt $")[1])
    tokenizer = data.Tokenizer(bpe, 2)
    ids = tokenizer.encode_prompt(prompt, "Tom?")
    assert ids[0] == 1
    plain = data.format_prompt(data.DEFAULT_PROMPT, "Tom?")
    assert ids == bpe.encode(plain).ids[:-1]
    assert json.loads(tokenizer.files["tokenizer_config.json"])["eos_token"] == "</s>"


def test_no_prompt_is_advised_where_none_helps(capsys):
    """A beginning that is only in the template advised as the letters <, s and >."""
    data.note.cache_clear()
    settings = json.loads(begins_with_s().to_str())
    settings["added_tokens"] = settings["added_tokens"][:1]
    data.note_beginning_of_text(tokenizers.Tokenizer.from_str(json.dumps(settings)))
    assert "begins texts with <s>, which no --prompt can write" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chat(byte_level):
    """With special tokens, an end of text that is not marked as special, and Qwen3's <think>,
    which is none."""
    bpe = tokenizers.Tokenizer.from_str(byte_level.tokenizer.to_str())
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    bpe.add_tokens(["<end>", "<think>"])
    ends = [bpe.token_to_id(name) for name in ("<|im_end|>", "<end>", "<eos>")]
    return data.Tokenizer(bpe, ends[0], ends)


CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("end", ["<|im_end|>", "<end>", "<eos>", "<|im_start|>"])
def test_special_tokens_of_others_are_letters(chat, end):
    """A solution about <|im_end|> that ends its own training text; a question that ends its turn.
    Special tokens of the prompt format stay, and so does what is a token but not special."""
    special = chat.tokenizer.token_to_id(end)
    text = f"Tom{end} has <think>3{end}"
    assert chat.encode(text).count(special) == 2
    ids = chat.encode(text, special=False)
    assert special not in ids and chat.decode(ids) == text
    assert ids.count(chat.tokenizer.token_to_id("<think>")) == 1
    prompt = chat.encode_prompt(CHAT, text)
    assert chat.decode(prompt) == CHAT.replace("{question}", text)
    assert prompt == (
        chat.encode("<|im_start|>user\n") + ids + chat.encode("<|im_end|>\n<|im_start|>assistant\n")
    )
    assert chat.tokenizer.encode(text).ids.count(special) == 2, "only that call reads plainly"


def test_prompts_keep_their_tokens(chat, sentencepiece):
    """A question apart from the words around it, so that every prompt has other tokens than before;
    a format that names the question twice, or not at all."""
    twice = "Tom {question} {question}s<|im_end|>"
    for question in ("has 3 pens", " Tom", "<think>", "x < y | im_end", "{question}"):
        for prompt_format in (CHAT, "{question}", "Tom{question}pens", twice):
            for tokenizer in (chat, sentencepiece):
                whole = tokenizer.encode(data.format_prompt(prompt_format, question))
                assert tokenizer.encode_prompt(prompt_format, question) == whole
    ids = chat.encode_prompt(twice, "a<eos>")
    assert chat.decode(ids) == "Tom a<eos> a<eos>s<|im_end|>" and chat.stop_ids[2] not in ids
    with pytest.raises(UserError, match="question"):
        chat.encode_prompt("{}", "a<eos>")


def test_a_failed_reading_changes_nothing():
    """Special tokens that stay letters after an error."""
    words = tokenizers.Tokenizer(models.WordLevel({"<eos>": 0, "Tom": 1}, unk_token="<unk>"))
    words.add_special_tokens(["<eos>"])
    tokenizer = data.Tokenizer(words, 0)
    with pytest.raises(UserError, match="reading 'Ann'"):
        tokenizer.encode("Ann", special=False)
    assert words.encode("Tom<eos>").ids == [1, 0]


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
    """A trained chat model without its template, one that vLLM no longer stops, or one that
    llama.cpp's converter cannot read: what tells of the tokenizer travels byte for byte."""
    source = tmp_path / "source"
    byte_level.save(source)
    truncated = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    truncated.enable_truncation(5)
    truncated.save(str(source / "tokenizer.json"))
    files = {
        "tokenizer.json": (source / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": b'{"eos_token": "<eos>",\r\n "model_max_length": 7}',
        "generation_config.json": b'{"eos_token_id": [0]}',
        "special_tokens_map.json": b"\xef\xbb\xbf{}",
        "added_tokens.json": b"{}",
        "chat_template.jinja": "{{ 'é' }}\n".encode(),
        "chat_template.json": b"{}",
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}\r\n",
        "tokenizer.model": b"\n\x07\n\x05<unk>\xff\x00",
        "sentencepiece.bpe.model": b"\xfe",
        "vocab.json": b'{"a": 0}',
        "vocab.txt": b"a\r\n",
        "merges.txt": b"#version: 0.2\na b\n",
    }
    for name, content in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    for name in ("config.json", "model.safetensors", "README.md", "samples.jsonl"):
        (source / name).write_text("{}")  # not of the tokenizer
    (source / "tokenizer").mkdir()
    tokenizer = data.Tokenizer.from_pretrained(source)
    assert len(tokenizer.encode("Tom has 3 pens. " * 9)) > 5
    copy = tmp_path / "new" / "copy"
    tokenizer.save(copy)
    copied = [path for path in copy.rglob("*") if path.is_file()]
    assert {str(path.relative_to(copy)): path.read_bytes() for path in copied} == files
    data.Tokenizer.from_pretrained(copy).save(copy)  # and on to the next model


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", None),
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", "[" * 200_000),
        ("tokenizer.json", "[" * 200_000),
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


# --- what a step is not ---


def pieces(text, style="lines"):
    letters = data.step_letters(text, style)
    return [text[i:j].strip() for i, j in itertools.pairwise([*letters, len(text)])]


@pytest.mark.parametrize("style", data.STEP_STARTS)
@pytest.mark.parametrize(
    "display",
    [
        "\\[\n9 \\times 2 = 18\n\\]",
        "$$\n9 \\times 2\n\n= 18\n$$",
        "\\begin{align}\nx &= 1\n\\begin{cases}\na\n\\end{cases}\n\n= 18\n\\end{align}",
        "```\nx = 9\n\nprint(x)\n```",
        "~~~\nx = 9\n\nprint(x)\n~~~",
        "Total\n---\n",
    ],
)
def test_no_step_ends_inside_a_display(style, display):
    """Of a display of three lines each a step, of which two hold no letter or digit."""
    text = f"First we add the numbers that it has.\n\n{display}\n\nSo it is 18.\n\n#### 18"
    found = pieces(text, style)
    assert all(re.search(r"[^\W_]", piece) for piece in found)
    assert display.strip() in found or style == "math" or "---" in display
    assert found[-1] == "#### 18" and len(found) <= 4


def test_a_display_that_is_not_closed():
    """All that follows one step, because a display was cut off or its sign meant something else."""
    assert pieces("a = 1\n\\[\nb = 2\nc = 3\n#### 3") == ["a = 1", "\\[\nb = 2", "c = 3", "#### 3"]


def test_a_numbered_list_of_facts():
    """Two numbered facts that switch off all other boundaries."""
    facts = "1. Monday: 5\n2. Tuesday: 6\n"
    for gap in ("", "\n"):
        text = f"{facts}{gap}5 + 6 = 11\n{gap}11 * 2 = 22\n{gap}#### 22"
        want = ["1. Monday: 5", "2. Tuesday: 6", "5 + 6 = 11", "11 * 2 = 22", "#### 22"]
        assert pieces(text) == pieces(text, "lines") == want
    steps = ["Step 1: add\n3 + 4 = 7\nso 7", "Step 2: take\n7 - 2 = 5", "#### 5"]
    assert pieces("\n\n".join(steps)) == pieces("\n\n".join(steps), "math") == steps


def test_a_paragraph_is_cut_at_its_sentences():
    """A solution in one paragraph is one step, and neg trains on whole responses without a word."""
    text = "Mr. Lee has 3.5 kg. He buys 2 kg more! Is it 5.5? $5.5$ kg it is. The answer is 5.5."
    assert [piece[:3] for piece in pieces(text)] == ["Mr.", "He ", "Is ", "$5.", "The"]
    assert len(pieces(text + "\nThat is all.")) == 2, "lines where there are lines"
    assert [piece[:3] for piece in pieces("He has 5. He eats 2.\n#### 3")] == ["He ", "He ", "###"]
    assert len(pieces("He has 5. He eats 2.\n#### 3\n3 - 2 = 1\n1 - 1 = 0")) == 4
