"""Files from strangers and answers made to stall: only our own one-line errors may come out, and soon. Each docstring
names the bug it guards. Inputs are mutations of good ones, drawn from a seed: a failure can be made again.

    FUZZ=20000 python -m pytest tests/test_fuzz.py      # more inputs than the usual
"""

import json
import os
import random
import shutil
import struct
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError, Tokenizer, answers_equal, builtin_tokenizer, edit_distance, equation_key, extract_answer
from data import is_correct, read_problems, split_steps
from model import GPT, CheckpointError, Config
from rollout import load_policy, read_rows
from train import TrainConfig

N = int(os.environ.get("FUZZ", 1500))
BASE = Path(__file__).resolve().parent.parent / "experiments" / "base"


def soon(call, *arguments, errors=(), limit=1.0):
    """The result, or the error's text if it is one of `errors`; fails where it takes longer than a second."""
    began = time.process_time()  # the machine may be busy with other things
    try:
        result = call(*arguments)
    except errors as error:
        result = str(error)
        assert "\n" not in result.strip() and result, arguments
    taken = time.process_time() - began
    assert taken < limit, (taken, call, str(arguments)[:300])
    return result


FRAGMENTS = [
    "18", "-3.5", "1,234,567", "1/3", r"\frac{1}{2}", r"\frac12", r"\frac", r"\sqrt[3]{2}", r"\boxed{", "}", "{",
    "####", "#### 18", "The answer is", "answer: ", "$", "%", "10^10^10", "9**9**9", "2^{", "(", ")", "[", "]", "x",
    "x^2+1", r"\text{ cm}", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\pi", "π", "٣", "½", "²", "e", "i", "=", "1e999",
    "nan", "inf", "\n", "\\", "\\\\", ",", ";", "\0", "\ud800", "\u2028", "日本", "<<3*4=12>>", "<<", "A:", "or", "and",
    "true", "0/0", "1/0", "^", "_", "!", "|", r"\le", "0" * 50, "9" * 300, " " * 200, "-" * 100, "(" * 60, r"\left(",
    r"\cdot", "*", "/", "+"]  # fmt: skip


def text_of(rng):
    parts = [rng.choice(FRAGMENTS) for _ in range(rng.randrange(1, 12))]
    if rng.random() < 0.1:
        parts.append(rng.choice(parts) * rng.choice([50, 500, 5000]))
    if rng.random() < 0.2:
        parts.append("".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x3000)])) for _ in range(30)))
    return rng.choice(["", " "]).join(parts)


def test_answers_made_to_stall():
    """A regex that backtracks for ever, a power that fills the memory, a nesting that ends the stack."""
    rng = random.Random(0)
    for _ in range(N):
        a, b = text_of(rng), text_of(rng)
        assert soon(extract_answer, a) is None or isinstance(extract_answer(a), str)
        assert isinstance(soon(answers_equal, a, b), bool) and isinstance(soon(is_correct, a, b), bool)
        assert isinstance(soon(equation_key, a), tuple)


@pytest.mark.parametrize("piece", [
    "(", "{", "[", r"\frac{", r"\sqrt{", r"\boxed{", "1+", "-", "^2", "9^9^", "1,000,", "=1,0", "a ", "answer ",
    "the answer is ", "$", "\n", " ", "\\", "#### ", "<<", "=", "1/", ".", "x=1 ", r"\left(", "&", r"\\", "!",
    r"\text{", "0", "7"])  # fmt: skip
def test_one_piece_many_times(piece):
    """Quadratic time in the length of a text that a model repeats until its budget ends."""
    tokenizer = builtin_tokenizer()
    for text in (piece * 20_000, "#### " + piece * 5_000, r"\boxed{" + piece * 5_000 + "}", piece * 5_000 + "18"):
        soon(extract_answer, text)
        soon(answers_equal, text[:100_000], text[1:100_001])
        soon(is_correct, text, "18")
        soon(equation_key, text)
    ids = tokenizer.encode((piece + " ") * 300)
    for style in ("lines", "math"):
        assert sum(soon(split_steps, ids, tokenizer, style), []) == ids


def test_steps_of_any_ids_add_up():
    """Tokens lost or doubled between the steps, whatever a model writes."""
    rng, tokenizer = random.Random(1), builtin_tokenizer()
    for _ in range(N // 10):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 200))]
        for style in ("lines", "math", "arrows"):
            steps = soon(split_steps, ids, tokenizer, style)
            assert sum(steps, []) == ids and all(steps)
        assert soon(edit_distance, ids, ids[::-1]) >= 0


def mutated(rng, raw):
    """Bytes with a few of them changed, cut, doubled or put in."""
    raw = bytearray(raw)
    for _ in range(rng.randrange(1, 6)):
        at, kind = rng.randrange(len(raw) + 1), rng.randrange(5)
        if kind == 0:
            raw[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del raw[at : at + rng.choice([1, 5, 100])]
        elif kind == 2:
            raw[at:at] = rng.choice([
                b"\0", b"\xff", b"\n", b'"', b"{", b"[" * 2000, b"null", b"1e999", b"-1", b"NaN", b",", b"true",
                b"99999999999999999999", b"\\ud800", b"\xed\xa0\x80", b" " * 100])  # fmt: skip
        elif kind == 3:
            raw[at:at] = raw[at : at + 50]
        else:
            del raw[at:]
    return bytes(raw)


def test_problem_files(tmp_path):
    """A traceback for a line that is not ours, a file that fills the memory, the wrong line blamed."""
    rng, path = random.Random(2), tmp_path / "p.jsonl"
    rows = [dict(question="a b?", answer="x\n#### 18"), dict(problem="p", solution=r"\boxed{\frac{1}{2}}", id="k"),
            dict(prompt="q", answer="3", id=5)]  # fmt: skip
    good = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for i in range(N):
        path.write_bytes(mutated(rng, good))
        result = soon(read_problems, path, errors=DataError)
        if isinstance(result, str):
            assert result.startswith(f"{path}:") and ";" in result, (i, result)
        else:
            assert all(p.question and isinstance(p.answer, str) and isinstance(p.id, str) for p in result)
    path.write_bytes(b'{"question": "' + b"a" * 3_000_000)
    assert "split the line" in soon(read_problems, path, errors=DataError)


def test_rows_of_ours(tmp_path):
    """A damaged row believed, or the rows before it lost."""
    rng, path = random.Random(3), tmp_path / "r.jsonl"
    good = b"".join(json.dumps(dict(id=str(i), samples=[])).encode() + b"\n" for i in range(4))
    for _ in range(N):
        path.write_bytes(mutated(rng, good))
        result = soon(read_rows, path, dict(id=str, samples=list), errors=DataError)
        assert isinstance(result, str) or all(type(row["id"]) is str for row in result)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint to damage."""
    path, tokenizer = tmp_path_factory.mktemp("model"), builtin_tokenizer()
    torch.manual_seed(0)
    GPT(Config.from_hf(dict(model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8,
                            num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True, eos_token_id=0))
        ).save_pretrained(path)  # fmt: skip
    tokenizer.save(path)
    return path


def test_checkpoints(folder, tmp_path):
    """A header that lies about sizes, a config that asks for a terabyte, JSON that is none: a traceback, or memory."""
    rng, copy, errors = random.Random(4), tmp_path / "m", (CheckpointError, DataError)
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    shutil.copytree(folder, copy)
    before, refused = sorted(p for p in tmp_path.rglob("*")), 0
    for i in range(N // 2):
        name = names[i % len(names)]
        raw = (folder / name).read_bytes()
        if name == "model.safetensors" and rng.random() < 0.7:  # the header, where the sizes stand
            size = struct.unpack("<Q", raw[:8])[0]
            raw = mutated(rng, raw[: 8 + size]) + raw[8 + size :]
        else:
            raw = mutated(rng, raw)
        (copy / name).write_bytes(raw)
        for read in (GPT.from_pretrained, Tokenizer.from_pretrained):
            refused += isinstance(soon(read, copy, errors=errors, limit=2.0), str)
        (copy / name).write_bytes((folder / name).read_bytes())
    assert refused > N // 8 and sorted(p for p in tmp_path.rglob("*")) == before, "nothing written, most of it refused"


PARTS = [
    None, -1, 2**40, "", [], {}, True, ["a"], [["a", -1.0]], {"strategy": {"Fixed": 2**40}, "direction": "Right",
    "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}, {"type": "FixedLength", "length": 0},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "ByteFallback"},
    {"type": "Strip", "content": "a", "start": 2**40, "stop": 0},
    {"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"},
    {"type": "Replace", "pattern": {"Regex": "(a*)*$"}, "content": ""}, {"type": "Fuse"}]  # fmt: skip


def test_tokenizers_of_another_make(folder, tmp_path):
    """A panic of the library, which is no Exception, or a terabyte of padding, out of a tokenizer.json that reads well;
    at the first text as well as at the door."""
    rng, good = random.Random(5), json.loads((folder / "tokenizer.json").read_text())
    copy, met = shutil.copytree(folder, tmp_path / "m"), set()
    for _ in range(N // 3):
        parts = rng.sample(["truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"], 2)
        (copy / "tokenizer.json").write_text(json.dumps(good | {part: rng.choice(PARTS) for part in parts}))
        tokenizer = soon(Tokenizer.from_pretrained, copy, errors=DataError)
        for text in ("ab aab 3 + 4 = 7\n", "日" + "a" * 30) * (not isinstance(tokenizer, str)):
            ids = soon(tokenizer.encode, text, errors=DataError)
            met.add("encode" if isinstance(ids, str) else type(soon(tokenizer.decode, ids, errors=DataError)))
        met.add("load" if isinstance(tokenizer, str) else "fine")
    assert met == {"load", "fine", "encode", str}, "each stage has refused some, and let some pass"


def test_ids_that_the_model_lacks(folder, tmp_path):
    """An index error deep inside torch, for a tokenizer.json that is of a larger model, or has gaps."""
    copy = shutil.copytree(folder, tmp_path / "m")
    config = TrainConfig(prompt="{question}", threads=1, device="cpu")
    good = json.loads((folder / "tokenizer.json").read_text())
    for word in ("=", "<eos>"):
        changed = json.loads(json.dumps(good))
        changed["model"]["vocab"][word] = 5_000
        for token in changed["added_tokens"]:
            token["id"] = changed["model"]["vocab"][token["content"]]
        (copy / "tokenizer.json").write_text(json.dumps(changed))
        (copy / "config.json").write_text((folder / "config.json").read_text().replace('"eos_token_id": 0', '"x": 0'))
        with pytest.raises(ValueError, match="of one model") as error:
            load_policy(copy, config).tokenizer.encode("3 + 4 = 7")
        assert "\n" not in str(error.value)
        assert word == "<eos>" or load_policy(copy, config).tokenizer.encode("3 + 4") == Tokenizer.from_pretrained(
            folder).encode("3 + 4")  # fmt: skip


@pytest.mark.parametrize("key", [
    "hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size", "head_dim", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
    "eos_token_id", "model_type", "rope_scaling"])  # fmt: skip
def test_config_values(folder, tmp_path, key):
    """A terabyte asked for by one number; a wrong kind that fails deep inside torch."""
    copy = shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for value in (10**12, 2**24, 2**63, -1, 0, 1.5, "8", True, None, [], [1], {}, {"a": 1}, "x" * 10_000, 1e308):
        (copy / "config.json").write_text(json.dumps(config | {key: value}))
        soon(GPT.from_pretrained, copy, errors=CheckpointError, limit=2.0)


def test_shards_outside_the_folder(folder, tmp_path):
    """An index that reads, by '../', what the user did not name."""
    copy = shutil.copytree(folder, tmp_path / "m")
    (copy / "model.safetensors").rename(tmp_path / "secret.safetensors")
    for shard in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "./../secret.safetensors", "", ".", 5,
                  None, "config.json", "none.safetensors", "a/../../secret.safetensors", "\0"):  # fmt: skip
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
        assert isinstance(soon(GPT.from_pretrained, copy, errors=CheckpointError), str), shard
