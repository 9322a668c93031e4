r"""Rollouts: sample solutions, value their steps by Monte Carlo, find the first pit, and make pairs to train on.

The one idea: the value of a step is the share of solutions that still come out right when the policy goes on from it
(Eq. 2). So everything here is one function, `generate`, asked from different prefixes:

    rollouts.jsonl   the problem alone as prefix: right and wrong solutions of the learner        (sample)
    values.jsonl     each step of a solution as prefix: Q of the step, and where it fell to zero   (estimate_values)
    pairs.jsonl      a good and a bad way to go on from one prefix: D of Eq. 1                     (make_pairs)

    python rollout.py --model FOLDER --data problems.jsonl --out runs/x --samples 8 --values 5

    Eq. 2   Q(x, y_{1:i-1}; y_i) = E_{y_new ~ policy(. | x, y_{1:i})} r([y_{1:i}, y_new])
    3.2     Q_BoK = 1 - (1 - Q)^K, the paper's policy: the best of K = 5 rollouts
    Eq. 3   A(x, y_{1:i-1}; y_i) = Q(x, y_{1:i-1}; y_i) - Q(x, y_{1:i-2}; y_{i-1}), and Q of the empty prefix is V(x)

Differences from the paper:
1. Q is the mean of K rollouts of the policy itself; the paper's, of the best of K, follows from it (`best_of`).
2. The last step's value is the checker's verdict: nothing is left to sample. So a wrong solution always has a pit.
3. A solution that ran out of its budget counts as wrong, whatever it says.
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

from data import DEFAULT_PROMPT, DataError, Tokenizer, edit_distance, equation_key, format_prompt, is_correct
from data import load_problems, split_steps
from model import GPT, PORTION, SHARED, KVCache

# ---------------------------------------------------------------- what the three entry points share


class UsageError(ValueError):
    """One line for the user: what is wrong, what was expected, the mend. Leaves with exit code 2."""


def flag(default, text, least=0, most=1e18, choices=None):
    """A field of a configuration: its default, the line that --help shows, and what values it may have."""
    return field(default=default, metadata=dict(help=text, least=least, most=most, choices=choices))


def parse(config_class, description, argv=None):
    """Flags from a flat dataclass; an unknown flag or a value of the wrong kind is a UsageError."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip

    def error(message):
        raise UsageError(f"{message}; see --help for the flags")

    parser.error = error
    for f in fields(config_class):
        kind = f.type if f.type in (int, float, str) else f.type.__args__[0]  # 'int | None' takes an int
        default = "by task" if f.default is None else repr(f.default)
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default, metavar=kind.__name__,
                            help=f"{f.metadata['help']} [{default}]".replace("%", "%%"))  # fmt: skip
    config = config_class(**vars(parser.parse_args(argv)))
    for f in fields(config_class):
        value = getattr(config, f.name)
        least, most, choices = (f.metadata[key] for key in ("least", "most", "choices"))
        if isinstance(value, (int, float)) and not least <= value <= most:
            parser.error(f"argument --{f.name.replace('_', '-')}: {value}; expected {least} to {most}")
        if choices and value not in choices.split():
            parser.error(f"argument --{f.name}: {value}; expected {', '.join(choices.split())}")
    return config


def fail(message):
    for bar in list(tqdm._instances):  # an open bar would share its line with the message
        bar.close()
    print(f"error: {message}", file=sys.stderr)
    return 2


def entry(main):
    """Run a program: errors that a user can mend are one line and exit code 2; Ctrl-C says how to go on."""
    try:
        together(main) if WORLD > 1 else main()
    except (ValueError, OSError, SafetensorError) as error:  # our own errors are ValueErrors of one line
        mend = "" if isinstance(error, ValueError) else "; mend that, and the same command goes on from here"
        sys.exit(fail(" ".join(str(error).split()) + mend))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        sys.exit(fail("out of memory; lower --micro-tokens (or --slots), or set --gradient-checkpointing 1; "
                      "the same command goes on from here"))  # fmt: skip
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def out_of_memory(error):
    """Whether this is what torch raises where memory runs out, on a GPU or on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def progress(name, unit, total, done):
    """A progress bar; where nobody watches (a file, a pipe) a line now and then."""
    pause = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=done, desc=name, unit=unit, mininterval=pause, disable=RANK > 0)


# Under torchrun the processes share the work, each of them gets all rows, and rank 0 alone prints and writes.
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def together(main):
    """main as one of torchrun's processes. An error is told by the first that meets it; torchrun then ends the rest."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        main()
    except (Exception, KeyboardInterrupt):
        if dist.distributed_c10d._get_default_store().add("failed", 1) > 1:
            time.sleep(1)  # as torchrun ends all when one is gone, and the first has yet to tell
            os._exit(2)
        raise
    dist.destroy_process_group()


def share(items):
    """This process's share of a list: one block, so that prompts of one problem stay together."""
    return items[len(items) * RANK // WORLD : len(items) * (RANK + 1) // WORLD]


def gather(mine):
    """The shares of all processes, put together again in each of them; waits for them all."""
    parts = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, mine)
    return list(chain(*parts))


def first_only(write):
    """Of a function that writes: the other processes pass it by."""
    return write if RANK == 0 else lambda *arguments, **options: None


def read_rows(path, kinds=None):
    """The rows of a JSONL file of ours, `kinds` {key: type} in each; a last line cut short by a crash is taken off."""
    path, rows, kinds = Path(path), [], kinds or {"id": (str, int)}
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]  # not splitlines: it also splits at \r
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        fits = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items())
        if not fits and number < len(lines):
            raise DataError(f"{path}:{number}: not JSON with {', '.join(kinds)}; expected our rows; delete the line")
        rows += [row] * fits
    if lines[-1] and RANK == 0:
        with open(path, "r+b") as file:  # another program may end a whole row without a newline: it stays
            file.truncate(file.seek(0 if fits else -len(lines[-1]), os.SEEK_END))
            file.write(b"\n" * fits)
    return rows


@first_only
def append_rows(path, rows):
    """Append rows in one write, so that a crash can only cut the last of them."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


@first_only
def write_rows(path, rows):
    """A whole JSONL file at once, under a temporary name and renamed: never half a file."""
    Path(f"{path}.tmp").unlink(missing_ok=True)
    append_rows(f"{path}.tmp", rows)
    os.replace(f"{path}.tmp", path)


@first_only
def write_json(path, value):
    """The same for a JSON file, for people to read."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def provenance():
    """Where a result comes from: the commit, torch's version, the device."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return dict(commit=commit or "unknown", torch=torch.__version__, device_name=device)


LOCKS = {}  # {folder: the file that locks it}, open until this process ends: killed or not, the lock goes with it


def lock(folder):
    """Lock a folder for this process; refuse one that another process works in."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if RANK or folder.resolve() in LOCKS:
        return
    file = open(folder / "lock", "a+")  # not closed: closing would unlock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UsageError(f"{folder}: {file.read().strip() or 'another process'} works here; expected a folder for each "
                         "process; wait for it, or choose another --out") from None  # fmt: skip
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    LOCKS[folder.resolve()] = file


def claim(config, path, problems=()):
    """Lock the folder of `path` and store the configuration with its results at `path`; refuse a folder that another
    configuration, or the same one on other problems, has begun to fill."""
    mine, path = asdict(config) | provenance(), Path(path)
    if problems:  # their file may have been changed since
        mine["data_hash"] = hashlib.blake2b(repr(problems).encode(), digest_size=8).hexdigest()
    lock(path.parent)
    # what changes no result that is already there:
    free = {"mode", "rounds", "explain", "out", "slots", "device", "threads", "save_seconds", *provenance()}
    if path.exists():
        try:
            there = {} | json.loads(path.read_text("utf-8"))
        except (ValueError, TypeError, RecursionError):
            raise UsageError(f"{path}: not the JSON of a configuration; expected ours; choose another --out") from None
        there = asdict(type(config)()) | there  # a folder may be older than a flag
        key = next((key for key in mine if key not in free and there.get(key) != mine[key]), None)
        if key:
            raise UsageError(f"{path}: a run with {key} = {there.get(key)!r}, not {mine[key]!r}; "
                             "expected the same configuration; choose another --out")  # fmt: skip
    write_json(path, mine)
    gather([])  # no process goes on in a folder that another was refused


def keep_freed_memory():
    """Let freed memory stay with the process, where the C library is glibc (M_MMAP_MAX 0, M_TRIM_THRESHOLD off).
    Otherwise each large tensor is mapped anew, page fault by page fault: a quarter of a training step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(-4, 0)
        mallopt(-1, -1)


def load_policy(folder, config, train=False):
    """The model and tokenizer in `folder`, on the device and in the dtype that `config` names or that suit it. A model
    to train has weights of `config.weights`, and the dtype is that of its activations."""
    if not folder:
        raise UsageError("--model is missing; expected a Hugging Face folder with model.safetensors; name one")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = config.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"--dtype {dtype}; expected float32 or bfloat16; choose one")
    try:
        if WORLD > 1 and device == "cuda":
            torch.cuda.set_device(LOCAL_RANK)
        model = GPT.from_pretrained(folder, getattr(torch, config.weights if train else dtype), device)
    except (RuntimeError, AssertionError) as error:  # torch's own words for a device that is not there
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}; expected cpu or cuda; choose one") from None
    small = sum(p.numel() for p in model.parameters()) < 5_000_000
    if device == "cpu":
        keep_freed_memory()
        # measured: a model this small gains nothing from a third core
        torch.set_num_threads(config.threads or min(2 if small else 64, max(1, (os.cpu_count() or 1) // WORLD)))
        if not small and not train:
            model.pack()
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
    if tokenizer.eos_id >= tokenizer.vocab_size:
        raise UsageError(f"{folder}: the end of text is token {tokenizer.eos_id}, but the model has "
                         f"{tokenizer.vocab_size}; expected a tokenizer and weights of one model; restore them")
    return Policy(model, tokenizer, config.prompt, config.slots or None, dtype, 4096 if small else 512)


@dataclass
class Policy:
    """A model with its tokenizer and prompt format: what turns problems into sampled solutions."""

    model: GPT
    tokenizer: Tokenizer
    prompt_format: str
    slots: int | None = None
    dtype: str = "float32"  # of the activations in training
    portion: int = 4096  # samples between two writes: what a crash can cost
    stats: dict = field(default_factory=dict)  # tokens prefilled and decoded so far

    def prompt(self, problem):
        """The prompt's token ids. Prompt and solution are tokenized apart, in training as in sampling."""
        return self.tokenizer.encode(format_prompt(self.prompt_format, problem.question))

    def text(self, ids):
        """The text of token ids without end of text, by its id: not every tokenizer calls it special."""
        return self.tokenizer.decode([i for i in ids if i != self.tokenizer.eos_id])

    def generate(self, prompts, n=1, *, max_new_tokens, streams=None, **options):
        """`generate`, its prompts shared among the processes; all of them get all results. Where memory runs out, half
        the slots go on: no result depends on them."""
        budgets = max_new_tokens if isinstance(max_new_tokens, int) else share(max_new_tokens)
        streams = streams and share(streams)
        while True:
            try:
                return gather(generate(self.model, share(prompts), n, max_new_tokens=budgets, slots=self.slots,
                                       stop_ids=[self.tokenizer.eos_id], vocab_size=self.tokenizer.vocab_size,
                                       stats=self.stats, streams=streams, **options))  # fmt: skip
            except (RuntimeError, MemoryError) as error:
                rows = min(self.slots or 1024, n * len(prompts))
                if not out_of_memory(error) or rows == 1:
                    raise
                self.slots = rows // 2
            print(f"out of memory with up to {rows} slots; going on with --slots {self.slots}", file=sys.stderr)


# ---------------------------------------------------------------- sampling


def uniforms(seed, prompt, samples, steps):
    """The random numbers of some samples of one prompt: float32 (len(samples), steps), each in (0, 1).

    Counter-based (splitmix64 over a hash of seed and prompt, the sample's number and the token's number): there is no
    state, so a sample draws the same numbers in any batch, in any order and after any restart.
    """
    digest = hashlib.blake2b(np.asarray([seed, *prompt], np.int64).tobytes(), digest_size=8).digest()
    x = np.frombuffer(digest, np.uint64) + np.asarray(samples, np.uint64)[:, None] * np.uint64(0xD1342543DE82EF95)
    x = x + np.arange(1, steps + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # wraps: modulo 2^64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = (x ^ (x >> np.uint64(31))) >> np.uint64(41)  # 23 bits and a half: exact in float32, never 0 or 1
    return (x.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def invert(weights, u):
    """The first index at which the running sum of weights (B, N) exceeds u (B,) of the whole, int64 (B,), and how far
    into that weight: (B,), uniform again if u was."""
    sums = weights.cumsum(-1)
    target = u[:, None] * sums[:, -1:]  # the sum is not exactly 1 in floats
    index = torch.searchsorted(sums, target, right=True).clamp_(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, index)
    inside = (target - (sums.gather(-1, index) - weight)) / weight
    return index[:, 0], inside.clamp_(0, 1 - 2**-23)[:, 0]  # below 1, whatever was rounded


def choose(logits, u, temperature, top_p):
    """One token per row by inversion: the first id whose cumulative probability exceeds u. (B, V), (B,) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    p, rows = torch.softmax(logits.float() / temperature, dim=-1), torch.arange(len(logits), device=logits.device)
    if top_p < 1:  # for show only: data that a loss sees must come from the policy itself
        p, order = p.sort(dim=-1, descending=True)
        p = p * (p.cumsum(-1) - p < top_p)  # a token stays while those before it have not filled top_p
        return order[rows, invert(p, u)[0]]
    if p.shape[-1] < 1024:
        return invert(p, u)[0]
    # first a block of ids, then one of them: a running sum over a large vocabulary takes a twentieth of a step
    p = F.pad(p, (0, -p.shape[-1] % 256)) if p.shape[-1] % 256 else p
    blocks = p.unflatten(-1, (-1, 256))
    block, u = invert(blocks.sum(-1), u)
    return block * 256 + invert(blocks[rows, block], u)[0]


def cuda_graph(step, device):
    """Capture the kernels of `step`, without running them; returns what launches them, all at once."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    # thread_local: what other threads do, as nccl's, is no part of it
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


class Slots:
    """Rows that decode together; a finished row gives its place to a waiting sample (continuous batching)."""

    capture, static = staticmethod(cuda_graph), False  # how steps are captured, None: not at all; True: on a CPU too

    def __init__(self, model, rows, width, stop_ids, pick):
        p = next(model.parameters())
        self.model, self.pick, self.tensors, self.replay = model, pick, [], None
        static = self.static or p.is_cuda
        self.cache = KVCache(model.config, rows, width + PORTION * static, p.dtype, p.device)  # of what is sampled
        self.cache.static, self.patience = static, 8 if static else 1  # tokens between two looks at `done`: a GPU waits
        self.stop = torch.tensor(sorted(stop_ids) or [-1], device=p.device)
        self.owner = [None] * rows  # (prompt, sample) of the row, None when free
        self.token, self.made, self.budget = torch.zeros(3, rows, dtype=torch.long, device=p.device)
        self.out = torch.zeros(rows, width, dtype=torch.long, device=p.device)
        self.u = torch.zeros(rows, width, device=p.device)
        self.done = torch.ones(rows, dtype=torch.bool, device=p.device)

    def admit(self, rows, owners, source, origins, stems, u, budgets, logits):
        """Start samples in free rows, each behind its prompt: the first stems[i] tokens of row origins[i] of the cache
        `source`. Each draws its own first token."""
        busy = [row for row, owner in enumerate(self.owner) if owner is not None]
        self.cache.branch(busy, rows, source, origins, stems)
        rows = torch.tensor(rows, device=self.token.device)
        self.u[rows] = torch.from_numpy(u).to(rows.device)
        self.token[rows] = token = self.pick(logits, self.u[rows, 0])
        self.out[rows, 0], self.made[rows], self.budget[rows] = token, 1, torch.tensor(budgets, device=rows.device)
        self.done[rows] = torch.isin(token, self.stop) | (self.budget[rows] <= 1)
        for row, owner in zip(rows.tolist(), owners, strict=True):
            self.owner[row] = owner

    def advance(self):
        """`step`; on a GPU by launching at once the kernels captured while the state stood in the same tensors: from
        Python a thousand launches take longer than the kernels. The first step with new tensors is an ordinary one, in
        which the libraries under it get ready, the second is captured."""
        cache = self.cache
        if not (cache.static and self.capture and cache.steady()):
            self.tensors, self.replay = [], None  # held no longer: they may be about to grow
            return self.step()
        before, state = self.tensors, (*vars(self).values(), *vars(cache).values())
        self.tensors = [x for x in state if isinstance(x, torch.Tensor)]  # a new prefix comes with new `members`
        if [*map(id, before)] != [*map(id, self.tensors)]:
            self.replay = None
            return self.step()
        if self.replay:
            cache.longest += 1
        else:
            try:
                self.replay = self.capture(self.step, self.token.device)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                Slots.capture = None
                print(f"a decode step could not be captured, so decoding is slower: {error!r:.200}", file=sys.stderr)
                return self.step()  # the bound on the lengths is now one too high, which costs nothing
        self.replay()

    def step(self):
        """One token for every row that is not done. All that changes with it are numbers in the same tensors."""
        live, counts = ~self.done, None
        if self.model.config.position == "learned":
            counts = live.long()  # its positions end: a finished row stands still
        elif self.cache.longest == self.cache.capacity:  # else it runs on, so that all rows write at one place,
            self.cache.set_lengths(self.cache.lengths * live)  # up to the end of its room
        logits = self.model.logits(self.model.hidden(self.token[:, None], self.cache, counts)[:, 0])
        at = self.made.clamp(max=self.out.shape[1] - 1)[:, None]  # a done row writes back what is there
        token = self.pick(logits, self.u.gather(1, at)[:, 0])
        self.out.scatter_(1, at, torch.where(live[:, None], token[:, None], self.out.gather(1, at)))
        self.token.copy_(torch.where(live, token, self.token))
        self.made += live
        self.done |= torch.isin(self.token, self.stop) | (self.made >= self.budget)

    def collect(self, results):
        """Hand the finished samples over; returns the free rows."""
        free = self.done.nonzero()[:, 0].tolist()
        finished = [row for row in free if self.owner[row] is not None]
        for row, ids, made in zip(finished, self.out[finished].tolist(), self.made[finished].tolist(), strict=True):
            i, sample = self.owner[row]
            results[i][sample], self.owner[row] = ids[:made], None
        return free

    def shrink(self):
        """Drop the free rows when nobody waits: the last long rows should not decode beside empty ones."""
        rows = [row for row, owner in enumerate(self.owner) if owner is not None]
        keep, self.owner = torch.tensor(rows, device=self.token.device), [self.owner[row] for row in rows]
        self.cache.keep(keep)
        for name in ("token", "made", "budget", "out", "u", "done"):
            setattr(self, name, getattr(self, name)[keep])


def default_slots(model, capacity):
    """Rows whose keys and values fill 1 GiB (a third of the free memory on a GPU), at most 1024."""
    p, c = next(model.parameters()), model.config
    room = torch.cuda.mem_get_info(p.device)[0] / 3 if p.is_cuda else 2**30
    return int(max(1, min(1024, room // (2 * c.n_layer * c.n_kv_head * c.head_dim * p.element_size() * capacity))))


def nested(prompts):
    """Indices of prompts in families [longest, those it begins with...], longest families first, so that rows of like
    lengths decode together. In descending order a prompt stands behind every prompt that it begins."""
    families = []
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i], reverse=True):
        if families and prompts[families[-1][0]][: len(prompts[i])] == prompts[i]:
            families[-1].append(i)
        else:
            families.append([i])
    return sorted(families, key=lambda family: len(prompts[family[0]]))[::-1]


def prefill(model, prompts, families):
    """Read the longest prompt of each family; the others are beginnings of it, with the same keys and values.

    Returns the cache (a row per family), and per prompt its index, its row in the cache, and logits for its first
    token, (V,) each."""
    device, longest = next(model.parameters()).device, [prompts[family[0]] for family in families]
    lengths = torch.tensor([len(ids) for ids in longest], device=device)
    ids = torch.zeros(len(longest), max(map(len, longest)), dtype=torch.long)
    for row, prompt in enumerate(longest):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    cache = KVCache(model.config, *ids.shape, next(model.parameters()).dtype, device)
    hidden = model.hidden(ids.to(device), cache, lengths)
    members = [(i, row) for row, family in enumerate(families) for i in family]
    logits = model.logits(hidden[[row for _, row in members], [len(prompts[i]) - 1 for i, _ in members]])
    return cache, [(i, row, first) for (i, row), first in zip(members, logits, strict=True)]


@torch.no_grad()
def generate(model, prompts, n=1, *, streams=None, max_new_tokens=256, temperature=1.0, top_p=1.0, seed=0, stop_ids=(),
             vocab_size=None, slots=None, stats=None):  # fmt: skip
    """Sample n continuations of every prompt.

    prompts: lists of token ids, any lengths > 0; max_new_tokens: an int, or one per prompt (0 gives empty lists);
    temperature 0 is greedy; ids >= vocab_size are never drawn; slots: rows that decode together.
    Returns per prompt a list of n lists of new ids, the stop id included where one was reached. The random stream of
    a sample depends on (seed, prompt, sample) alone. `stats` gets the tokens "prefilled" and "decoded" added.
    streams: per prompt (stem, first). Its samples are numbers first to first + n - 1 and draw as if only the first
    `stem` tokens had been given: sample j of the stem, where it begins with the prompt, ends as sample j of the prompt.
    A prompt is prefilled once for its n samples, or not at all if it begins another one: see `prefill`.
    """
    if not all(prompts):
        raise ValueError("generate: an empty prompt; expected at least one token id")
    budgets = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    results = [[[] for _ in range(n)] for _ in prompts]
    alive = [i for i, budget in enumerate(budgets) if budget > 0]
    if not alive or not n:
        return results
    families = [[alive[j] for j in family] for family in nested([prompts[i] for i in alive])][::-1]
    width = max(budgets[i] for i in alive)

    def draws(i, sample):
        stem, first = streams[i] if streams else (len(prompts[i]), 0)
        return uniforms(seed, prompts[i][:stem], [first + sample], len(prompts[i]) - stem + width)[:, -width:]

    def pick(logits, u):
        if vocab_size is not None:  # rows of the embedding with no token behind them cannot be decoded
            logits[..., vocab_size:] = float("-inf")
        return choose(logits, u, temperature, top_p)

    capacity = width + max(len(prompts[i]) for i in alive) / min(n, SHARED)  # a row's own, and its share of a prompt
    rows = min(slots or default_slots(model, capacity), n * len(alive))
    running, waiting, prefilled = Slots(model, rows, width, stop_ids, pick), [], 0
    while True:
        free = running.collect(results)
        while free and (waiting or families):
            if not waiting:  # prefill about as many prompts as there is room for
                batch = [families.pop()]
                size = len(prompts[batch[0][0]])  # the longest: all are padded to it
                real = size
                while families and sum(map(len, batch)) * n < len(free):
                    real += len(prompts[families[-1][0]])
                    if size * (len(batch) + 1) > 1.25 * real:  # the next ones are so much shorter: another batch
                        break
                    batch.append(families.pop())
                source, members = prefill(model, prompts, batch)
                waiting = [(i, sample, row, logits) for i, row, logits in members for sample in range(n)]
                prefilled += sum(len(prompts[family[0]]) for family in batch)
            now, waiting = waiting[: len(free)], waiting[len(free) :]
            owners, origins, logits = [w[:2] for w in now], [w[2] for w in now], torch.stack([w[3] for w in now])
            stems, u = [len(prompts[i]) for i, _ in owners], np.concatenate([draws(*owner) for owner in owners])
            running.admit(free[: len(now)], owners, source, origins, stems, u, [budgets[i] for i, _ in owners], logits)
            free = free[len(now) :]
        total, busy = len(running.owner), sum(owner is not None for owner in running.owner)
        if not busy:
            break
        refill = bool(waiting or families)
        if not refill and busy <= total // 2:
            running.shrink()
            total = busy
        # Wait for a portion of rows: a prefill of one row costs nearly as much as one of thirty.
        enough = max(1, total // 8) if refill else total - busy + max(1, busy // 2)
        while int(running.done.sum()) < min(enough, total):
            for _ in range(running.patience):
                running.advance()
    if stats is not None:
        decoded = sum(len(ids) for samples in results for ids in samples)
        for key, value in (("prefilled", prefilled), ("decoded", decoded)):
            stats[key] = stats.get(key, 0) + value
    return results


# ---------------------------------------------------------------- solutions: drawn, judged, chosen


def solution_row(ids, problem, tokenizer):
    """A drawn solution as it stands in the files: ids for training, text for people, whether it ended and is right."""
    ended = bool(ids) and ids[-1] == tokenizer.eos_id
    text = tokenizer.decode(ids[:-1] if ended else ids)
    return dict(ids=ids, text=text, ended=ended, correct=ended and is_correct(text, problem.answer))


def sample(policy, problems, path, *, n, max_new_tokens, temperature, seed):
    """n solutions of every problem by `policy`, as rows of the JSONL file `path`; problems already there are kept.

    A row: {id, temperature, samples: [{ids, text, ended, correct}, ...]}. Returns {problem id: row}.
    """
    rows = {}
    for row in read_rows(path, dict(id=str, temperature=(int, float), samples=list)):
        need_samples(path, row, rows, n, policy.tokenizer)  # another sampler may have written them
        rows[row["id"]] = row
    todo = [p for p in problems if p.id not in rows]
    bar = progress("sample", "problem", len(problems), len(problems) - len(todo))
    size = max(1, policy.portion * WORLD // n)
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        drawn = policy.generate([policy.prompt(p) for p in batch], n=n, max_new_tokens=max_new_tokens,
                                temperature=temperature, seed=seed)  # fmt: skip
        new = []
        for problem, samples in zip(batch, drawn, strict=True):
            solutions = [solution_row(ids, problem, policy.tokenizer) for ids in samples]
            new.append(dict(id=problem.id, temperature=temperature, samples=solutions))
        append_rows(path, new)
        rows.update((row["id"], row) for row in new)
        bar.update(len(batch))
    bar.close()
    return rows


def are_ids(ids, vocab_size):
    return isinstance(ids, list) and len(ids) > 0 and all(type(i) is int and 0 <= i < vocab_size for i in ids)


def need_samples(path, row, rows, n, tokenizer):
    """Refuse a row of rollouts.jsonl that the stages behind could not use, or that is there already."""
    good = row["id"] not in rows and len(row["samples"]) == n and all(
        isinstance(s, dict) and are_ids(s.get("ids"), tokenizer.vocab_size) and isinstance(s.get("text"), str)
        and isinstance(s.get("correct"), bool) and s.get("ended") is (s["ids"][-1] == tokenizer.eos_id)
        for s in row["samples"])  # fmt: skip
    if not good:
        raise DataError(f"{path}: row {row['id']!r:.80}: expected each id once, with {n} samples of ids (below "
                        f"{tokenizer.vocab_size}), text, correct, and ended: true just where the last id is "
                        f"{tokenizer.eos_id}, the end of text; correct the row or delete it")  # fmt: skip


def unique(solutions):
    """The solutions without repetitions: one for each list of equations, or for each text that has none."""
    seen = {}
    for solution in solutions:
        seen.setdefault(equation_key(solution["text"]) or solution["text"], solution)
    return list(seen.values())


def select_diverse(solutions, limit=4):
    """At most `limit` of the solutions, far from each other: RFT's filter. Greedy: the first, then again and again
    the one whose edit distances (over token ids, relative to the longer text) to those chosen sum to the most."""
    rest, chosen = unique(solutions), []
    far = [0.0] * len(rest)
    while rest and len(chosen) < limit:
        i = int(np.argmax(far))
        chosen.append(rest.pop(i))
        far.pop(i)
        if len(chosen) < limit:
            a = chosen[-1]["ids"]
            far = [f + edit_distance(a, b["ids"]) / max(len(a), len(b["ids"])) for f, b in zip(far, rest, strict=True)]
    return chosen


# ---------------------------------------------------------------- values of steps


def to_value(problems, rollouts, negatives, positives):
    """The solutions to value: for each problem at most so many wrong and correct ones that ended, all different."""
    chosen = {}
    for problem in problems:
        samples = rollouts[problem.id]["samples"]
        v = sum(s["correct"] for s in samples) / len(samples)  # V(x), for nothing
        room, seen = {True: positives, False: negatives}, set()
        for i, s in enumerate(samples):
            if room[s["correct"]] > 0 and s["ended"] and tuple(s["ids"]) not in seen:
                room[s["correct"]] -= 1
                seen.add(tuple(s["ids"]))
                chosen[problem.id, i] = s["ids"], s["correct"], v
    return chosen


def first_pit(values):
    """Index (>= 1) of the first step with the least Q among those looked at (Algorithm 1). values: [V(x), Q_1..Q_L],
    None where not looked at."""
    looked_at = [t for t in range(1, len(values)) if values[t] is not None]
    return min(looked_at, key=lambda t: values[t])


def advantages(values):
    """A_i = Q_i - Q_{i-1} of steps 1..L (Eq. 3), from [V(x), Q_1..Q_L]."""
    return [after - before for before, after in pairwise(values)]


def best_of(q, k):
    """Q of the policy "best of k", for a success rate q of one sample (paper 3.2)."""
    return 1 - (1 - q) ** k


def probe(scan, values):
    """Which prefixes to look at next, given [V(x), Q_1..Q_L] with None where not known; [] when the pit is settled.

    full: all of them; first: one after another up to the first that is 0; sequential: the same (but see
    `estimate_values`); bisect: halve between the last known good and the first known 0, which finds the same pit where
    values do not come back from 0.
    """
    if scan == "full":
        return [t for t, v in enumerate(values) if v is None]
    zero = next(t for t in range(1, len(values)) if values[t] == 0)  # a wrong solution ends in 0
    good = max(t for t in range(zero) if values[t] is not None)
    if zero - good == 1:
        return []
    return [(good + zero) // 2 if scan == "bisect" else good + 1]


def need_values(path, row, solution, scan, policy):
    """A row of values.jsonl, if it is of this solution and whole: its rollouts may be of another file by now."""
    (ids, correct, _), ends, values = solution, row["ends"], row["values"]
    gaps = scan != "full" and not correct  # steps that were not looked at
    good = (
        row["ids"] == list(ids) and row["correct"] is correct and len(values) == len(row["best"]) == len(ends) + 1
        and all(type(end) is int for end in ends) and [0, *ends] == sorted({0, *ends}) and ends[-1:] == [len(ids)]
        and all(type(v) in (int, float) and 0 <= v <= 1 or v is None and gaps for v in values)
        and None not in (values[0], values[-1]) and row["pit"] == first_pit(values)
        and all(are_ids(way, policy.tokenizer.vocab_size) for way in row["right"]))  # fmt: skip
    if not good:
        raise DataError(f"{path}: row {row['id']!r:.80}, sample {row['sample']}: expected the steps, values and pit of "
                        "that solution in rollouts.jsonl; delete the row, and it is made again")  # fmt: skip
    return row


def known(row, t, ways, samples, k):
    """Those of the k rollouts of prefix t that need no drawing, {number: (continuation, is it right)}: the problem's
    other samples that begin with it, by numbers below 0, then what was drawn from an earlier prefix (`ways`, {prefix:
    its rollouts}) and went on as the solution did."""
    prefix = row["ids"][: row["ends"][t - 1]]
    same = [s for i, s in enumerate(samples) if i != row["sample"] and s["ids"][: len(prefix)] == prefix][:k]
    have = {i - len(same): (s["ids"][len(prefix) :], s["correct"]) for i, s in enumerate(same)}
    for u in range(1, t):
        steps = prefix[row["ends"][u - 1] :]
        have |= {j: (way[len(steps) :], right) for j, (way, right) in ways.get(u, {}).items()
                 if j >= len(same) and way[: len(steps)] == steps}  # fmt: skip
    return have


def estimate_values(policy, problems, solutions, path, *, k, scan, max_new_tokens, temperature, seed, rollouts=None):
    """Monte Carlo values of the steps of `solutions`, rows of the JSONL file `path`; solutions already there are kept.

    solutions: {(problem id, sample number): (ids, correct, V(x))}, V(x) being the share of the problem's samples that
    are right. A row: {id, sample, correct, ids, text, ends, values, best, pit, right}. Steps end at the token counts
    `ends`. values: [V(x), Q_1..Q_L], means over k rollouts (null: not looked at; Q_L: the checker's verdict). best: the
    same of the best of k, by one draw: 1 if any is right. right: the distinct correct continuations found just before
    the pit. Wrong solutions are scanned by `scan`; correct ones have no zero to stop at and are scanned in full.

    The k rollouts of a prefix are the same in every scan. rollouts {problem id: row}, samples that `policy` drew with
    the same temperature and budget: those that begin with the prefix come first, except the solution itself, which
    was chosen for its verdict. The others share one random stream per problem and number: a rollout that goes on as
    the solution did is also a rollout from its next steps, and is not drawn again.
    sequential: a prefix is no pit as soon as one rollout from it is right, so they are drawn in portions, up to the
    first right one. The pit is that of `first`, rollout by rollout; a Q above 0 is then the share of those looked at,
    too high on average, and there are fewer right continuations to choose from.
    """
    kinds = dict(id=str, sample=int, correct=bool, ids=list, text=str, ends=list, values=list, best=list, pit=int,
                 right=list)  # fmt: skip
    there = {(row["id"], row["sample"]): row for row in read_rows(path, kinds)}
    rows = {key: need_values(path, there[key], solutions[key], scan, policy) for key in solutions if key in there}
    todo = [key for key in solutions if key not in rows]
    bar = progress("values", "solution", len(solutions), len(solutions) - len(todo))
    size = max(1, policy.portion * WORLD // k)
    for start in range(0, len(todo), size):
        new, ways = {}, {}  # ways: {(problem id, sample): {t: {number: (continuation, is it right)}}}
        for key in todo[start : start + size]:
            ids, correct, v = solutions[key]
            ends = np.cumsum([len(s) for s in split_steps(ids, policy.tokenizer, problems[key[0]].style)]).tolist()
            new[key] = dict(id=key[0], sample=key[1], correct=correct, ids=ids, ends=ends, text=policy.text(ids),
                            values=[v] + [None] * (len(ends) - 1) + [float(correct)])  # fmt: skip
            ways[key] = {}
        drawn = {}  # {(problem id, prefix, number): the same}, as many solutions begin alike
        while looked_at := [(key, t) for key, row in new.items()
                            for t in probe("full" if row["correct"] else scan, row["values"])]:  # fmt: skip
            wanted = []
            for key, t in looked_at:
                row = new[key]
                if t not in ways[key]:
                    ways[key][t] = known(row, t, ways[key], rollouts[key[0]]["samples"] if rollouts else [], k)
                have = ways[key][t]
                right = sum(right for _, right in have.values())
                missing = [j for j in range(sum(j < 0 for j in have), k) if j not in have]
                if scan == "sequential":  # first those right a step ago; the more failed, the fewer are drawn in vain
                    lucky = [j for j, (_, right) in ways[key].get(t - 1, {}).items() if right]
                    missing.sort(key=lucky.__contains__, reverse=True)
                    missing = [] if right else missing[: max(1, len(have) // 2)]
                if not missing:
                    row["values"][t] = right / len(have)
                prefix = tuple(row["ids"][: row["ends"][t - 1]])
                wanted += [(have, (key[0], prefix, j)) for j in missing]
            asked = [request for request in dict.fromkeys(request for _, request in wanted) if request not in drawn]
            prompts = [policy.prompt(problems[i]) for i, _, _ in asked]
            drawn_now = policy.generate([x + list(prefix) for x, (_, prefix, _) in zip(prompts, asked, strict=True)],
                                        streams=[(len(x), j) for x, (_, _, j) in zip(prompts, asked, strict=True)],
                                        max_new_tokens=[max_new_tokens - len(prefix) for _, prefix, _ in asked],
                                        temperature=temperature, seed=seed + 1)  # fmt: skip
            for (i, prefix, j), (way,) in zip(asked, drawn_now, strict=True):
                right = solution_row([*prefix, *way], problems[i], policy.tokenizer)["correct"]
                drawn[i, prefix, j] = way, right
            for have, request in wanted:
                have[request[-1]] = drawn[request]
        for key, row in new.items():
            row["pit"] = first_pit(row["values"])
            row["best"] = [None if q is None else float(q > 0) for q in row["values"]]
            before = sorted(ways[key].get(row["pit"] - 1, {}).items())
            row["right"] = [list(way) for way in dict.fromkeys(tuple(way) for _, (way, right) in before if right)]
        append_rows(path, list(new.values()))
        rows.update(new)
        bar.update(len(new))
    bar.close()
    return rows


# ---------------------------------------------------------------- pairs


def make_pairs(form, policy, problems, rollouts, values, seed=0, limit=8):
    """Preference pairs (prompt, chosen, rejected) from what was sampled and valued; at most `limit` a problem.

    form            prompt            chosen                              rejected
    continuation    x + y_{1:c-1}     a right continuation found there    the pit step y_c           (Self-Explore)
    step            x + y_{1:c-1}     the first step of one of those      the pit step y_c           (Theorem 6.1)
    algorithm1      x                 a right solution of x               y_{1:c}, with its pit      (as printed)
    response        x                 a right solution of x, any          a wrong one, any           (the control)
    farthest        x                 the right one of most edits         a wrong one                (Pal et al.)

    The end of text stands exactly where a solution ended: never behind a step that was cut out. Returns rows {id,
    form, pit, prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids}; the texts are for trl, which ends them
    on its own.
    """
    rng, pairs, count = np.random.default_rng(seed), [], Counter()
    for row in values.values():
        if row["correct"] or count[row["id"]] >= limit:
            continue
        ids, pit, prompt = row["ids"], row["pit"], policy.prompt(problems[row["id"]])
        start, end = ([0] + row["ends"])[pit - 1], row["ends"][pit - 1]
        right = unique([s for s in rollouts[row["id"]]["samples"] if s["correct"]])
        right = [right[i]["ids"] for i in rng.permutation(len(right))]
        if form in ("continuation", "step"):
            prompt, rejected = prompt + ids[:start], ids[start:end]
            # the shortest says least that is beside the point; before the first step any right solution will do
            chosen = sorted(row["right"], key=len) or (right if start == 0 else [])
            if form == "step":
                chosen = [split_steps(c, policy.tokenizer, problems[row["id"]].style)[0] for c in chosen]
        else:
            rejected = ids[:end] if form == "algorithm1" else ids
            chosen = sorted(right, key=lambda r: -edit_distance(r, ids)) if form == "farthest" else right
        chosen = [c for c in chosen if c[: len(rejected)] != rejected]  # the same way on is no preference
        if chosen:
            count[row["id"]] += 1
            pair = dict(id=row["id"], form=form, pit=pit)
            for side, tokens in (("prompt", prompt), ("chosen", chosen[0]), ("rejected", rejected)):
                pair[side], pair[f"{side}_ids"] = policy.text(tokens), tokens
            pairs.append(pair)
    return pairs


# ---------------------------------------------------------------- command line


@dataclass
class RolloutConfig:
    model: str = flag("", "Hugging Face folder of the policy")
    data: str = flag("arithmetic", "arithmetic, star, or a JSONL file of problems")
    out: str = flag("runs/rollouts", "folder for rollouts.jsonl, and with --values values.jsonl")
    limit: int = flag(100, "the first problems only; 0 = all of a file")
    prompt: str = flag(DEFAULT_PROMPT, "prompt format, {question} is replaced; the built-in tasks use '{question}\\n'")
    samples: int = flag(8, "solutions a problem", 1)
    temperature: float = flag(0.7, "sampling temperature; 0 is greedy")
    max_new_tokens: int = flag(256, "tokens a solution may have", 1)
    values: int = flag(0, "K: rollouts per step prefix of the wrong solutions; 0 = no values")
    scan: str = flag("first", "full, first (stop at the first pit), sequential (and at a right rollout) or bisect",
                     choices="full first sequential bisect")
    seed: int = flag(0, "of the random streams")
    slots: int = flag(0, "rows that decode together; 0 = as fits in memory")
    device: str = flag("", "cpu or cuda; empty = cuda where there is one")
    dtype: str = flag("", "float32 or bfloat16; empty = bfloat16 on cuda, else float32")
    threads: int = flag(0, "CPU threads; 0 = two for a small model, else all cores")


def main():
    c = parse(RolloutConfig, __doc__)
    problems, policy, out = load_problems(c.data, "train", c.limit), load_policy(c.model, c), Path(c.out)
    if not problems:
        raise UsageError("no problems; expected --limit of at least 1 for a built-in task; raise it")
    policy.prompt(problems[0])  # a wrong prompt format fails here, before anything is written
    claim(c, out / "rollout_config.json", problems)
    drawing = dict(max_new_tokens=c.max_new_tokens, temperature=c.temperature, seed=c.seed)
    rollouts = sample(policy, problems, out / "rollouts.jsonl", n=c.samples, **drawing)
    verdicts = [s["correct"] for p in problems for s in rollouts[p.id]["samples"]]
    print(f"{len(verdicts)} solutions of {len(problems)} problems, {np.mean(verdicts):.1%} right, in {out}")
    if c.values:
        chosen = to_value(problems, rollouts, c.samples, 0)
        values = estimate_values(policy, {p.id: p for p in problems}, chosen, out / "values.jsonl", k=c.values,
                                 scan=c.scan, rollouts=rollouts, **drawing)  # fmt: skip
        tokens = dict(sum(map(Counter, gather([policy.stats])), Counter()))
        print(f"{len(values)} wrong solutions valued; tokens: {tokens}")


if __name__ == "__main__":
    entry(main)
