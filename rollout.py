r"""Rollouts: value the steps of sampled solutions, find the first pit, make the pairs to train on.

The value of a step is the chance that the policy still reaches the correct answer when it goes on
from there (Eq. 2). So everything here comes from one function, `generate`, and its two uses:

    samples         solutions of a problem                 sample()        samples.jsonl
    continuations   ways to go on from a prefix of steps   value_steps()   values.jsonl
    pairs           a good and a bad way to go on          make_pairs()    pairs.jsonl

    python rollout.py --model FOLDER --data problems.jsonl --out runs/x --samples 8 --rollouts 5

    Eq. 2   Q_i = Q(x, y_1..y_{i-1}; y_i) = E[ reward of y_1..y_i and a continuation by the policy ]
    Eq. 3   A_i = Q_i - Q_{i-1}, where Q_0 = V(x), the share of all samples of x that are correct
    3.2     Q of best-of-K is 1 - (1 - Q)^K

Differences from the paper:
1. Q is the mean of K continuations of the policy itself. The paper's rollout policy is the best of
   K = 5, whose Q follows from ours (`best_of`). The first pit is the same for both.
2. The Q of a last step is the checker's verdict, as nothing is left to sample. A wrong solution
   therefore always has a first pit.
3. A solution that ran out of its token budget counts as wrong, and its steps are not valued.
4. At most so many wrong (and for Eq. 4 correct) solutions of a problem are valued, so Eq. 4 sees
   other shares of right and wrong than the policy draws.
"""

import math
import os
import re
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import POLICY_FILE, RANK, Tokenizer, UserError, append_rows, apply_presets, claim_folder
from data import content_hash, edit_distance, equation_key, flag, folder_hash, is_correct
from data import load_problems, note, parse_flags, printable, read_json, read_rows, split_steps
from data import write_json, write_rows
from model import GPT, CheckpointError, KVCache

# torchrun sets these, and RANK. Its processes share the work and each gets all results; rank 0
# alone prints and writes.
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
THREADS = torch.get_num_threads()  # what OMP_NUM_THREADS and the cores of this process allow

SCANS = ("first", "full")  # which steps to value: see estimate_values

# ---------------------------------------------------------------- values of steps, first pits


@dataclass
class Solution:
    """A sampled solution with the values of its steps: a row of values.jsonl."""

    id: str  # the problem's
    sample: int  # which of the problem's samples
    correct: bool
    ids: list  # token ids, with the end of text if the solution ended
    ends: list  # token count at the end of each of its L steps
    text: str
    value: float  # V(x): share of the problem's samples that are correct
    q_values: list  # Q_1 .. Q_L (Eq. 2); None where no continuation was sampled
    counts: list  # how many continuations each Q is the mean of; 0 for a verdict or None
    first_pit: int | None = None  # number of the step, from 1; None if the solution is correct
    continuations: list = field(default_factory=list)  # correct ones from just before the pit

    def through_step(self, i):
        """Token ids of y_1 .. y_i; [] for i = 0."""
        return self.ids[: self.ends[i - 1]] if i else []

    def step(self, i):
        """Token ids of y_i."""
        return self.ids[len(self.through_step(i - 1)) : self.ends[i - 1]]

    def prefix(self, i):
        """The problem's id and y_1 .. y_i, which other solutions may begin with, too."""
        return self.id, tuple(self.through_step(i))

    def found_pit(self, i):
        """Whether a step with Q = 0 is known among the first i."""
        return 0 in self.q_values[:i]


def solutions_to_value(policy, problems, samples, *, wrong, correct=0):
    """At most `wrong` wrong and `correct` correct samples of each problem, ended and distinct, as
    `Solution`s whose steps have no values yet. samples: {problem id: its samples}."""
    solutions = []
    for problem in problems:
        drawn = samples[problem.id]
        value = sum(s["correct"] for s in drawn) / len(drawn)  # V(x), at no cost
        left = {False: wrong, True: correct}
        seen = set()
        for number, s in enumerate(drawn):
            if not s["ended"] or left[s["correct"]] == 0 or tuple(s["ids"]) in seen:
                continue
            left[s["correct"]] -= 1
            seen.add(tuple(s["ids"]))
            steps = split_steps(s["ids"], policy.tokenizer, problem.style)
            solution = Solution(
                id=problem.id,
                sample=number,
                correct=s["correct"],
                ids=s["ids"],
                ends=np.cumsum([len(step) for step in steps]).tolist(),
                text=s["text"],
                value=value,
                q_values=[None] * len(steps),
                counts=[0] * len(steps),
            )
            solution.q_values[-1] = float(s["correct"])  # the checker's verdict
            solutions.append(solution)
    return solutions


def estimate_values(policy, problems, solutions, *, k, scan):
    """Sample k more continuations of each prefix of steps, and set q_values to the share that is
    correct (Eq. 2). A second call goes on where the first stopped, so K may grow.

    scan "first" stops at the first step with Q = 0 of a wrong solution, "full" values every step.
    problems: {id: Problem}.
    """
    correct = defaultdict(list)  # {(prefix, its number of steps): its correct continuations}
    for s in solutions:
        if s.first_pit:
            correct[s.prefix(s.first_pit - 1), s.first_pit - 1] = s.continuations
    longest = max((len(s.ends) for s in solutions), default=0)
    for i in range(1, longest):  # the last step needs no sampling: the checker decides
        walking = [s for s in solutions if len(s.ends) > i]
        if scan == "first":
            walking = [s for s in walking if s.correct or not s.found_pit(i - 1)]
        # Many solutions of a problem begin alike: each prefix is continued once.
        counts = {s.prefix(i): s.counts[i - 1] for s in walking}
        found = correct_continuations(policy, problems, counts, k)
        for prefix, new in found.items():
            correct[prefix, i] = correct[prefix, i] + new
        for s in walking:
            before = s.counts[i - 1] * (s.q_values[i - 1] or 0.0)
            s.counts[i - 1] += k
            s.q_values[i - 1] = (before + len(found[s.prefix(i)])) / s.counts[i - 1]
    for s in solutions:
        if not s.correct:
            s.first_pit = find_first_pit(s.q_values)
            # Q is above 0 just before the pit, so there are some: the candidates for chosen.
            s.continuations = correct[s.prefix(s.first_pit - 1), s.first_pit - 1]


def correct_continuations(policy, problems, counts, k):
    """{prefix: those of k more continuations that end correctly}. counts: {prefix: how many of its
    continuations were sampled before}; a prefix is (problem id, tuple of token ids of its steps).
    The processes share the prefixes."""
    found = []
    for first in sorted(set(counts.values())):
        mine = shard([prefix for prefix, count in counts.items() if count == first])
        prompts = [policy.prompt(problems[id]) + list(ids) for id, ids in mine]
        budgets = [policy.sampling.max_new_tokens - len(ids) for _, ids in mine]
        sampled = policy.generate(prompts, k, first=first, max_new_tokens=budgets)
        for (id, ids), continuations in zip(mine, sampled, strict=True):
            correct = []
            for continuation in continuations:
                if policy.judge([*ids, *continuation], problems[id])["correct"]:
                    correct.append(continuation)
            found.append(((id, ids), correct))
    return dict(gather(found))


def find_first_pit(q_values):
    """Number, from 1, of the first step with the least Q among those valued (Algorithm 1). In a
    wrong solution that is the first with Q = 0; there is one, as its last step has Q = 0.

    >>> find_first_pit([0.6, 0.0, None, 0.0])
    2
    """
    valued = [i for i, q in enumerate(q_values, 1) if q is not None]
    return min(valued, key=lambda i: q_values[i - 1])


def advantages(solution):
    """A_1 .. A_L of a solution whose steps are all valued (Eq. 3)."""
    q_values = [solution.value, *solution.q_values]
    return [q_values[i] - q_values[i - 1] for i in range(1, len(q_values))]


def best_of(q, k):
    """Q of the policy "best of k samples", if one sample is correct with probability q (3.2)."""
    return 1 - (1 - q) ** k


def value_steps(policy, problems, solutions, path, *, k, scan="first"):
    """Value the steps of `solutions` and find their first pits: rows of the JSONL file `path`.

    Solutions already in the file are not valued again. Returns `solutions`.
    """
    keys = dict(id=str, sample=int, ids=list, ends=list, q_values=list, continuations=list)
    rows = {(row["id"], row["sample"]): row for row in read_rows(path, keys)}
    wait_for_all()  # all processes have read before rank 0 writes
    todo = []
    for s in solutions:
        row = rows.get((s.id, s.sample))
        if row is None:
            todo.append(s)
            continue
        # another engine may have written it
        if (row["ids"], row["ends"], len(row["q_values"])) != (s.ids, s.ends, len(s.ends)):
            raise UserError(f"{path}: values of {s.id}, sample {s.sample}, are not of its steps")
        s.q_values = row["q_values"]
        s.counts = row.get("counts") or [0 if q is None else k for q in s.q_values[:-1]] + [0]
        s.continuations = row["continuations"]
        s.first_pit = None if s.correct else find_first_pit(s.q_values)
    bar = progress("values", "solution", len(solutions), len(solutions) - len(todo))
    at_once = max(1, policy.samples_at_once * PROCESSES // k)
    for start in range(0, len(todo), at_once):
        part = todo[start : start + at_once]
        estimate_values(policy, problems, part, k=k, scan=scan)
        append_rows(path, [asdict(s) for s in part])
        bar.update(len(part))
    bar.close()
    wait_for_all()  # rank 0 has written before any process goes on
    return solutions


def ask_pits_again(policy, problems, solutions, path, *, k, most=100):
    """How sure are the first pits? About `most` of them are continued by k other samples each:
    rows {id, sample, first_pit, first, continuations, correct} of the JSONL file `path`."""
    # A pit that is the last step was judged, not sampled.
    pits = [s for s in solutions if not s.correct and s.first_pit < len(s.ends)]
    pits = pits[:: max(1, len(pits) // most)][:most]
    rows = []
    for s in pits:
        first = s.counts[s.first_pit - 1]  # its continuations so far found the pit
        row = dict(id=s.id, sample=s.sample, first_pit=s.first_pit, first=first)
        rows.append(row | dict(continuations=k, correct=None))
    stored = read_rows(path)
    wait_for_all()
    if [dict(row, correct=None) for row in stored] == rows:
        return stored
    counts = {s.prefix(s.first_pit): s.counts[s.first_pit - 1] for s in pits}
    found = correct_continuations(policy, problems, counts, k)
    for row, s in zip(rows, pits, strict=True):
        row["correct"] = len(found[s.prefix(s.first_pit)])
    write_rows(path, rows)
    return rows


# ---------------------------------------------------------------- pairs


@dataclass
class Example:
    """A solution to imitate, with a weight for each response token (None: all 1)."""

    id: str
    prompt: list  # token ids
    response: list
    weights: list | None = None  # Eq. 4

    @property
    def sequence(self):
        return self.prompt, self.response

    @property
    def loss_count(self):
        """Its weight in the mean over a batch: the number of its response tokens."""
        return len(self.response)


@dataclass
class Pair:
    """A better and a worse way to go on from one prompt: D of Eq. 1, a row of pairs.jsonl."""

    id: str
    form: str
    first_pit: int
    prompt: list  # token ids of the problem and, in some forms, of the steps before the pit
    chosen: list
    rejected: list
    reference: list | None = None  # log-probabilities of [chosen, rejected] under the reference

    @property
    def sequence(self):
        return self.prompt, self.chosen, self.rejected

    @property
    def loss_count(self):
        """Its weight in the mean over a batch: one pair."""
        return 1


# A form of pairs gets a wrong solution, the distinct correct samples of its problem (token ids, in
# random order) and a function that splits token ids into steps. It returns the steps that join the
# prompt, candidates for chosen, of which the first suitable one is used, and rejected.


def continuation_form(s, correct, split):
    """Self-Explore's: from the steps before the pit, a correct continuation against the pit."""
    # Shortest first: it has the fewest irrelevant steps. Before step 1 there is no prefix, so any
    # correct solution is a continuation.
    chosen = correct if s.first_pit == 1 else sorted(s.continuations, key=len)
    return s.through_step(s.first_pit - 1), chosen, s.step(s.first_pit)


def step_form(s, correct, split):
    """Theorem 6.1: from the steps before the pit, one step against one step."""
    prefix, chosen, pit = continuation_form(s, correct, split)
    return prefix, [first_step(prefix, ids, split) for ids in chosen], pit


def first_step(prefix, continuation, split):
    """The first step of a continuation, cut as it is in the whole solution."""
    end = 0
    for step in split(prefix + continuation):
        end += len(step)
        if end > len(prefix):
            return continuation[: end - len(prefix)]


def algorithm1_form(s, correct, split):
    """As the paper's Algorithm 1 is printed: a correct solution against y_1 .. pit."""
    return [], correct, s.through_step(s.first_pit)


def response_form(s, correct, split):
    """A control: any correct solution against the whole wrong one."""
    return [], correct, s.ids


def farthest_form(s, correct, split):
    """A control (Pal et al.): the correct solution of most edits against the wrong one."""
    return [], sorted(correct, key=lambda ids: -edit_distance(ids, s.ids)), s.ids


PAIR_FORMS = {
    "continuation": continuation_form,
    "step": step_form,
    "algorithm1": algorithm1_form,
    "response": response_form,
    "farthest": farthest_form,
}


def make_pairs(form, policy, problems, samples, solutions, seed=0):
    """A list of `Pair`s, one for each wrong solution that has a usable correct alternative.

    form: a key of PAIR_FORMS. samples: {problem id: its samples}, from which they come.
    The end of text stands exactly where a solution ended, never behind a step that was cut out.
    Left out are: a pit from which a correct sample or continuation goes on, as it is none (what
    ask_pits_again finds is only counted); a pair of which one side begins with the other; a pair
    that equals another.
    """
    if form not in PAIR_FORMS:
        raise UserError(f"pairs: {form!r} is none of {', '.join(PAIR_FORMS)}")
    pairs = {}
    for s in solutions:
        if s.correct:
            continue
        problem = problems[s.id]
        correct = [x for x in samples[s.id] if x["correct"]]
        ways = [x["ids"] for x in distinct(correct)]
        # a stream of its own, so that a pair depends on no other solution
        np.random.default_rng([seed, s.sample, *s.ids]).shuffle(ways)
        split = partial(split_steps, tokenizer=policy.tokenizer, style=problem.style)
        prefix, candidates, rejected = PAIR_FORMS[form](s, ways, split)
        before_pit = s.through_step(s.first_pit - 1)
        known = [x["text"] for x in correct]
        known += [policy.text(before_pit + ids) for ids in s.continuations]
        through_pit = policy.text(prefix + rejected)
        if any(begins_with(text, through_pit) for text in known):
            continue
        chosen = first_other(candidates, rejected, policy)
        if chosen is not None:
            prompt = policy.prompt(problem) + prefix
            pair = Pair(s.id, form, s.first_pit, prompt, chosen, rejected)
            pairs.setdefault(repr(pair.sequence), pair)
    return list(pairs.values())


def first_other(candidates, rejected, policy):
    """The first candidate that neither begins with the rejected text nor is its beginning."""
    bad = policy.text(rejected)
    for ids in candidates:
        good = policy.text(ids)
        if not begins_with(good, bad) and not begins_with(bad, good):
            return ids
    return None


def begins_with(text, start):
    """Whether a text begins with another, in whole words; spaces do not count, nor what punctuation
    the other ends with.

    >>> begins_with("9 + 5 = 14\n\nSo 14", "9 + 5 = 14"), begins_with("9 + 5 = 145", "9 + 5 = 14")
    (True, False)
    """
    text = " ".join(text.split())
    start = " ".join(start.split()).rstrip(" .,:;")
    goes_on = re.match(r"\w|[.,/]\d", text[len(start) :])  # a word or number of the start
    return text.startswith(start) and (not goes_on or not start)


def pair_row(pair, tokenizer):
    """A row of pairs.jsonl: token ids and texts. The texts of prompt and chosen, joined, are what
    the joined ids decode to (see Tokenizer.texts)."""
    prompt, chosen = tokenizer.texts([pair.prompt, pair.chosen])
    rejected = tokenizer.texts([pair.prompt, pair.rejected])[1]
    row = dict(id=pair.id, form=pair.form, first_pit=pair.first_pit)
    row |= dict(prompt=prompt, chosen=chosen, rejected=rejected)
    return row | dict(prompt_ids=pair.prompt, chosen_ids=pair.chosen, rejected_ids=pair.rejected)


# ---------------------------------------------------------------- samples, and what to use of them


def sample(policy, problems, path, n, temperature=None):
    """n solutions of every problem by `policy`: rows of the JSONL file `path`. Returns {problem id:
    list of n samples}, a sample being {ids, text, ended, correct}.

    A row: {id, temperature, samples}; of several rows of a problem the last one counts. What is in
    the file is not drawn again: of more samples only the missing ones are. temperature: overrides
    the policy's; 0 is greedy. The processes share the problems.
    """
    if temperature is None:
        temperature = policy.sampling.temperature
    samples = {problem.id: [] for problem in problems}
    for row in read_rows(path, dict(id=str, temperature=(int, float), samples=list)):
        check_samples(path, row, temperature, policy)
        samples[row["id"]] = row["samples"]
    todo = [problem for problem in problems if len(samples[problem.id]) < n]
    bar = progress("sample", "problem", len(problems), len(problems) - len(todo))
    at_once = max(1, policy.samples_at_once * PROCESSES // n)
    for start in range(0, len(todo), at_once):
        part = todo[start : start + at_once]
        first = min(len(samples[problem.id]) for problem in part)
        mine = shard(part)
        prompts = [policy.prompt(problem) for problem in mine]
        sampled = policy.generate(prompts, n - first, first=first, temperature=temperature)
        rows = []
        for problem, solutions in zip(mine, sampled, strict=True):
            drawn = [policy.judge(ids, problem) for ids in solutions]
            drawn = samples[problem.id][:first] + drawn
            rows.append(dict(id=problem.id, temperature=temperature, samples=drawn))
        rows = gather(rows)
        append_rows(path, rows)
        samples |= {row["id"]: row["samples"] for row in rows}
        bar.update(len(part))
    bar.close()
    wait_for_all()  # rank 0 has written before any process goes on
    return {problem.id: samples[problem.id][:n] for problem in problems}


def check_samples(path, row, temperature, policy):
    """Refuse a row of samples.jsonl that another engine has filled in wrongly."""
    where = f"{path}: problem {row['id']}"
    drawn = f"drawn at temperature {row['temperature']}"
    if row["temperature"] != temperature:
        raise UserError(f"{where}: {drawn}, not {temperature}; delete the file")
    size = policy.tokenizer.vocab_size
    for s in row["samples"]:
        if not isinstance(s, dict) or not {"ids", "text", "ended", "correct"} <= set(s):
            raise UserError(f"{where}: a sample lacks ids, text, ended or correct")
        ids = s["ids"] if isinstance(s["ids"], list) else []
        if not ids or not all(type(id) is int and 0 <= id < size for id in ids):
            raise UserError(f"{where}: ids is not a list of token ids of the vocabulary")
        if s["ended"] != (ids[-1] in policy.tokenizer.stop_ids):
            raise UserError(f"{where}: ended is not true just where the last id is an end of text")


def distinct(samples):
    """One sample for each list of equations, or for each text that has none."""
    by_key = {}
    for s in samples:
        by_key.setdefault(equation_key(s["text"]) or s["text"], s)
    return list(by_key.values())


def most_diverse(samples, limit=4):
    """RFT's filter: at most `limit` distinct samples that are far from each other.

    Greedy: the first, then again and again the one whose edit distances to those taken (over token
    ids, relative to the longer text) have the largest sum.
    """
    rest = distinct(samples)
    taken = []
    distances = [0.0] * len(rest)
    while rest and len(taken) < limit:
        farthest = int(np.argmax(distances))
        taken.append(rest.pop(farthest))
        distances.pop(farthest)
        new = taken[-1]["ids"]
        for i, s in enumerate(rest):
            distances[i] += edit_distance(new, s["ids"]) / max(len(new), len(s["ids"]))
    return taken


# ---------------------------------------------------------------- sampling

CUDA_GRAPHS = True  # False: launch every kernel of a decode step from Python, which is slower
PREFILL_TOKENS = 32_768  # of one prefill, with padding


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn."""

    max_new_tokens: int | list = 256  # of every prompt, or a list with one number for each
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # below 1 only the most likely tokens are drawn: to look at, not to train on
    seed: int = 0
    stop_ids: tuple = ()  # each ends a sample, which includes it
    vocab_size: int | None = None  # ids from here on are rows of the embedding without a token


@torch.no_grad()
def generate(model, prompts, n=1, *, first=0, slots=None, **sampling):
    """Sample n continuations of every prompt: per prompt a list of n lists of new token ids.

    prompts: lists of token ids, of any lengths > 0. sampling: the fields of `Sampling`, such as
    max_new_tokens=64. slots: how many rows decode together, at least n. Raises UserError for an
    empty prompt, and where learned positions would run out.

    Sample j of a prompt depends on (seed, prompt, j) alone: a second call draws the same again, and
    first=n draws the next n. It does not depend on the other rows either, up to rounding: on a CPU
    in float32 the tokens are the same in any batch, in bfloat16 and on a GPU some are not.

        generate(model, [[5, 7], [9]], 2, max_new_tokens=2) -> [[[3, 8], [3, 1]], [[4, 0], [6, 2]]]
    """
    sampling = Sampling(**sampling)
    budgets = sampling.max_new_tokens
    if isinstance(budgets, int):
        budgets = [budgets] * len(prompts)
    check_lengths(prompts, budgets, model.config.position_limit)
    results = [[[] for _ in range(n)] for _ in prompts]
    waiting = [i for i in range(len(prompts)) if n and budgets[i] > 0]
    waiting.sort(key=lambda i: len(prompts[i]))  # longest first: too little memory fails at once
    if not waiting:
        return results
    rows = slots or default_slots(model, len(prompts[waiting[-1]]) + max(budgets))
    rows = min(max(1, rows // n), len(waiting)) * n  # the n samples of a prompt start together
    running = Slots(model, sampling, rows, max(budgets))
    while waiting or running.busy:
        running.refill(waiting, prompts, budgets, range(first, first + n))
        if not waiting:
            running.shrink()
        running.decode(until_done=running.enough(waiting, n))
        for (i, j), ids in running.collect():
            results[i][j - first] = ids
    return results


def check_lengths(prompts, budgets, limit):
    for prompt, budget in zip(prompts, budgets, strict=True):
        if not prompt:
            raise UserError("generate: a prompt has no tokens")
        if len(prompt) + budget - 1 > limit:  # the last token is never fed back
            tokens = f"a prompt of {len(prompt)} tokens and {budget} new ones"
            raise UserError(f"generate: {tokens} do not fit the {limit} positions of the model")


class Slots:
    """Rows that decode together. Each holds one sample; a finished row takes the next one.

    Three rows after prompts of 3, 5 and 4 tokens. Token 2 is the end of text:

        row  owner   token  count  budget  done   output         cache holds
        0    (4, 0)     17      2       9  False  8 17 .  .  ..  the prompt and 8
        1    (7, 1)      2      3       9  True   6 11 2  .  ..  the prompt, 6 and 11
        2    None        .      .       .  True   .  .  .  .  .. what nobody reads

    A step reads `token`, adds it to the cache and writes the next one into `token` and `output`, in
    every row that is not done. Each tensor is made once, and admissions and steps write into it:
    so a step depends on no Python number and never waits for the device, and on a GPU one CUDA
    graph replays it until the cache grows.
    """

    def __init__(self, model, sampling, rows, width):
        weight = model.norm.weight
        device = weight.device
        self.model = model
        self.sampling = sampling
        self.stop_ids = torch.tensor(list(sampling.stop_ids) or [-1], device=device)
        self.owner = [None] * rows  # (prompt, sample) of a row, None while it is free
        self.cache = KVCache(model.config, rows, 0, weight.dtype, device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)  # the last one chosen
        self.count = torch.zeros(rows, dtype=torch.long, device=device)  # tokens chosen so far
        self.budget = torch.zeros(rows, dtype=torch.long, device=device)
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        # one column more than the largest budget, as rows that are done still read and write
        self.output = torch.zeros(rows, width + 1, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(rows, width + 1, device=device)  # a random number for each
        self.graph = None
        self.graph_room = 0  # of the cache when the graph was captured

    @property
    def free(self):
        return [row for row, owner in enumerate(self.owner) if owner is None]

    @property
    def busy(self):
        return [row for row, owner in enumerate(self.owner) if owner is not None]

    def refill(self, waiting, prompts, budgets, numbers):
        """Start samples of waiting prompts in the free rows, so that no row is idle for long.

        waiting: indices of prompts, the longest last, of which those that start are removed.
        numbers: those of the samples that each prompt gets.
        """
        while waiting and len(self.free) >= len(numbers):
            most = max(1, PREFILL_TOKENS // len(prompts[waiting[-1]]))
            most = min(most, len(self.free) // len(numbers), len(waiting))
            batch = [waiting.pop() for _ in range(most)]
            self.admit(batch, prompts, budgets, numbers)

    def admit(self, batch, prompts, budgets, numbers):
        """Prefill the prompts of a batch, and start their samples in free rows."""
        device = self.token.device
        prefilled, logits = prefill(self.model, [prompts[i] for i in batch])
        owners = list(product(batch, numbers))
        rows = self.free[: len(owners)]
        for row, owner in zip(rows, owners, strict=True):
            self.owner[row] = owner
        width = self.uniforms.shape[1] - 1
        uniforms = [uniform_numbers(self.sampling.seed, prompts[i], j, width) for i, j in owners]
        rows = torch.tensor(rows, device=device)
        source = torch.arange(len(batch), device=device).repeat_interleave(len(numbers))
        self.cache.copy_rows(prefilled, source, rows)
        self.uniforms[rows, :-1] = torch.from_numpy(np.stack(uniforms)).to(device)
        self.budget[rows] = torch.tensor([budgets[i] for i, _ in owners], device=device)
        token = choose(logits[source], self.uniforms[rows, 0], self.sampling)
        self.token[rows] = token
        self.output[rows, 0] = token
        self.count[rows] = 1
        self.done[rows] = torch.isin(token, self.stop_ids) | (self.budget[rows] == 1)

    def step(self):
        """Choose the next token in every row that is not done; the others stand still."""
        live = ~self.done
        hidden = self.model.hidden(self.token[:, None], self.cache, live.long())
        logits = self.model.logits(hidden[:, 0])
        column = self.count[:, None]  # in a row that is done, one that nobody reads
        token = choose(logits, self.uniforms.gather(1, column)[:, 0], self.sampling)
        self.output.scatter_(1, column, token[:, None])
        self.token.copy_(torch.where(live, token, self.token))
        self.count += live
        self.done |= torch.isin(self.token, self.stop_ids) | (self.count >= self.budget)

    def decode(self, until_done):
        """Decode until so many rows are done or free."""
        on_gpu = self.token.is_cuda
        steps = 8 if on_gpu else 1  # between two looks at `done`: each look waits for the GPU
        while True:
            looked_at = torch.stack((self.done.sum(), self.cache.lengths.max()))
            done, longest = looked_at.tolist()
            if done >= until_done:
                return
            self.cache.make_room(longest + steps)
            if self.graph_room != self.cache.room:
                self.graph = None  # it works on tensors that are no longer the cache's
            for _ in range(steps):
                if self.graph is not None:
                    self.graph.replay()
                    continue
                self.step()  # once uncaptured, as CUDA graphs need a warm-up
                if on_gpu and CUDA_GRAPHS:
                    self.graph = capture(self.step)
                    self.graph_room = self.cache.room

    def enough(self, waiting, n):
        """How many rows should be done or free before `decode` stops: an eighth, to refill them
        together, as reading one prompt costs almost as much as many; at the end half, to shrink."""
        rows = len(self.owner)
        return max(n, rows // 8) if waiting else math.ceil(rows / 2)

    def collect(self):
        """Free the rows of finished samples. Returns [((prompt, sample), token ids)]."""
        done = self.done.tolist()
        rows = [row for row in self.busy if done[row]]
        index = torch.tensor(rows, dtype=torch.long, device=self.done.device)
        outputs = self.output[index].tolist()
        finished = []
        for row, ids, count in zip(rows, outputs, self.count[index].tolist(), strict=True):
            finished.append((self.owner[row], ids[:count]))
            self.owner[row] = None
        return finished

    def shrink(self):
        """Drop the free rows once they are half of all, so that the last long samples decode in a
        smaller batch."""
        busy = self.busy
        if 2 * len(busy) > len(self.owner):
            return
        self.owner = [self.owner[row] for row in busy]
        keep = torch.tensor(busy, device=self.token.device)
        old = self.cache
        self.cache = KVCache(self.model.config, len(busy), old.room, old.k.dtype, old.k.device)
        self.cache.copy_rows(old, keep, torch.arange(len(busy), device=keep.device))
        self.token = self.token[keep]
        self.count = self.count[keep]
        self.budget = self.budget[keep]
        self.done = self.done[keep]
        self.output = self.output[keep]
        self.uniforms = self.uniforms[keep]
        self.graph = None


def capture(step):
    """A CUDA graph of the kernels of `step`, which this does not run."""
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: what other threads do meanwhile, as nccl's, is no part of it
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:  # torch's allocator is damaged, so this run cannot go on
        if OUT_OF_MEMORY.search(repr(error)):
            raise
        reason = str(error).splitlines()[0]
        advice = "with CUDA_GRAPHS = False in rollout.py there is none"
        raise UserError(f"a CUDA graph of a decode step failed: {reason}; {advice}") from None
    return graph


def prefill(model, prompts):
    """Read B prompts of any lengths. Returns a cache with a row for each, and the logits (B, V) of
    the token behind each."""
    weight = model.norm.weight
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    cache = KVCache(model.config, *ids.shape, weight.dtype, weight.device)
    hidden = model.hidden(ids.to(weight.device), cache, lengths)  # (B, T, C)
    rows = torch.arange(len(prompts), device=weight.device)
    return cache, model.logits(hidden[rows, lengths - 1])


def choose(logits, uniforms, sampling):
    """Sample one token per row by inverting the cumulative distribution: the first token whose
    cumulative probability exceeds the row's uniform number. (B, V), (B,) -> int64 (B,). May
    overwrite logits."""
    logits = logits[:, : sampling.vocab_size]
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = logits.float().div_(sampling.temperature).softmax(-1)
    order = None
    if sampling.top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= sampling.top_p, 0)
    cumulative = probs.cumsum_(-1)  # in place: over a large vocabulary each copy counts
    # the sum is not exactly 1, and less after top_p
    target = uniforms[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True)
    if order is not None:
        token = order.gather(1, token)
    return token[:, 0]


def uniform_numbers(seed, prompt, sample, count):
    """The random numbers of one sample, float32 (count,) in [0, 1), from a stream of its own that
    is seeded by (seed, prompt, sample)."""
    rng = np.random.default_rng([seed, sample, len(prompt), *prompt])
    # below 1 by more than a rounding error, or a token of probability 0 could be chosen
    return np.minimum(rng.random(count, dtype=np.float32), np.float32(1 - 2**-22))


def default_slots(model, tokens):
    """How many rows of `tokens` tokens to decode together, at most 1024: as many as have their keys
    and values in 2 GiB, or on a GPU in a third of the memory that is free."""
    weight = model.norm.weight
    memory = 2**31
    if weight.is_cuda:
        torch.cuda.empty_cache()  # so that torch's cached memory counts as free
        memory = torch.cuda.mem_get_info(weight.device)[0] / 3
    c = model.config
    row = 2 * c.n_layer * c.n_kv_head * c.head_dim * weight.element_size() * tokens
    return int(min(1024, memory // row))


# ---------------------------------------------------------------- the policy


@dataclass
class Policy:
    """A model with its tokenizer, its prompt format, and how it is sampled."""

    model: GPT
    tokenizer: Tokenizer
    prompt_format: str
    sampling: Sampling = Sampling()
    slots: int | None = None  # rows that decode together; None: as fit in memory
    device: str = "cpu"
    dtype: str = "float32"  # of the activations in training
    folder: str = ""  # where the model came from
    samples_at_once: int = 4096  # of a process, between two writes to disk
    decoded: int = 0  # tokens sampled so far, by this process

    def prompt(self, problem):
        """Token ids of the prompt. Prompt and solution are tokenized apart, in training as in
        sampling, so that no token spans the boundary."""
        return self.tokenizer.encode_prompt(self.prompt_format, problem.question)

    def solution(self, problem):
        """Token ids of the teacher's solution and the end of text."""
        return self.tokenizer.encode(problem.solution, special=False) + [self.tokenizer.eos_id]

    def text(self, ids):
        """The text of token ids, without ends of text."""
        return self.tokenizer.decode([id for id in ids if id not in self.tokenizer.stop_ids])

    def judge(self, ids, problem):
        """A sampled solution as in samples.jsonl. One that did not end counts as wrong."""
        text = self.text(ids)
        ended = bool(ids) and ids[-1] in self.tokenizer.stop_ids
        correct = ended and is_correct(text, problem.answer)
        return dict(ids=ids, text=text, ended=ended, correct=correct)

    def generate(self, prompts, n=1, first=0, **changes):
        """`generate` as this policy is sampled, but for `changes` of its `Sampling`."""
        ends = dict(stop_ids=self.tokenizer.stop_ids, vocab_size=self.tokenizer.vocab_size)
        sampling = replace(self.sampling, **ends, **changes)
        samples = generate(self.model, prompts, n, first=first, slots=self.slots, **vars(sampling))
        self.decoded += sum(len(ids) for row in samples for ids in row)
        return samples

    def save_settings(self, folder, **more):
        """Write POLICY_FILE: what a program that loads the saved model should know of it. more: in
        which world it was trained, and how it is rounded."""
        known = dict(
            prompt=self.prompt_format,
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
        )
        write_json(Path(folder) / POLICY_FILE, known | more)


def load_policy(folder, c, train=False):
    """The policy of the model and tokenizer in `folder` and the flags `c`, to train or to sample.

    Weights to train are float32. Those to sample from are so, too, unless --sampling-dtype says
    otherwise: a short fine-tune moves weights by less than bfloat16 resolves.
    """
    if not folder:
        raise UserError("--model is missing: it names a Hugging Face folder")
    if "\\n" in c.prompt:
        note(f"--prompt {c.prompt}: a backslash and an n are no line break; $'...' makes one")
    if c.dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"--dtype {c.dtype} is not float32 or bfloat16")
    device = pick_device(c.device)
    weights = torch.float32 if train else getattr(torch, c.sampling_dtype)
    # FSDP2 moves its parts of the model to the device by itself
    place = "cpu" if train and PROCESSES > 1 else device
    model = GPT.from_pretrained(folder, dtype=weights, device=place)
    policy = Policy(
        model,
        load_tokenizer(folder, model.config.vocab_size),
        prompt_format=c.prompt,
        sampling=Sampling(c.max_new_tokens, temperature=c.temperature, seed=c.seed),
        slots=c.slots or None,
        device=device,
        dtype=c.dtype or ("bfloat16" if device.startswith("cuda") else "float32"),
        folder=str(folder),
    )
    if device == "cpu":
        small = sum(p.numel() for p in model.parameters()) < 5_000_000
        torch.set_num_threads(c.threads or (min(THREADS, 2) if small else THREADS))
        if not small:
            policy.samples_at_once = 512
    return policy


def load_tokenizer(folder, vocab_size):
    """The tokenizer of a model folder, without tokens that the model has no row for."""
    tokenizer = Tokenizer.from_pretrained(folder)
    last = max(tokenizer.stop_ids)
    if last >= vocab_size:
        raise UserError(
            f"{folder}: the end of text is token {last}, but the model has {vocab_size}"
        )
    tokenizer.vocab_size = min(tokenizer.vocab_size, vocab_size)
    return tokenizer


def pick_device(name):
    """The device to use: the named one, or else cuda where there is one."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{LOCAL_RANK}"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32: products of float32 numbers, fast
    return device


# ---------------------------------------------------------------- programs and processes


def shard(items):
    """This process's part of a list, one block of it."""
    return items[len(items) * RANK // PROCESSES : len(items) * (RANK + 1) // PROCESSES]


def wait_for_all():
    """Wait until all processes are here."""
    gather([])


def gather(mine):
    """The lists of all processes, joined, in each of them. Waits for them all."""
    if PROCESSES == 1:
        return mine
    parts = [None] * PROCESSES
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def progress(name, unit, total, done):
    """A progress bar on rank 0; in a log file it is printed every 30 seconds."""
    pause = 0.2 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=done, desc=name, unit=unit, mininterval=pause, disable=RANK > 0
    )


# in the errors of Python, of torch on a GPU and on a CPU, of cuDNN and of C++
OUT_OF_MEMORY = re.compile("MemoryError|(out of|allocate|not enough) memory|ALLOC_FAILED|bad_alloc")


def run_program(main):
    """Run a program. Errors that the user can fix are one line and exit code 2."""
    if PROCESSES > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    try:
        main()
    except KeyboardInterrupt:
        leave(130, "stopped; the same command goes on from here")
    except (UserError, CheckpointError, OSError, UnicodeError, SafetensorError) as error:
        leave(2, printable(f"error: {' '.join(str(error).split())}"))
    except (RuntimeError, MemoryError) as error:
        if not OUT_OF_MEMORY.search(repr(error)):
            raise
        less = "lower --micro-tokens or --slots, or with --gradient-checkpointing 1"
        leave(2, f"error: out of memory; the same command goes on from here with {less}")
    if PROCESSES > 1:
        dist.destroy_process_group()


def leave(code, message):
    """Print one line and exit. Of several processes the first to fail prints it."""
    if PROCESSES > 1 and dist.distributed_c10d._get_default_store().add("failed", 1) > 1:
        time.sleep(10)  # torchrun ends this process as soon as the first one has left
        os._exit(code)
    for bar in list(tqdm._instances):  # an open bar would share its line with the message
        bar.close()
    print(message, file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------- command line


DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class PolicyFlags:
    """The flags that all three programs share. None: what the model was trained with, as the
    policy.json of its folder says, else the task's default, from data.PRESETS.

    A run may go on with model and data in another place: their hashes must stay, not their paths.
    """

    model: str | None = flag(None, "Hugging Face folder to start from", group="run", stage="")
    seed: int = flag(0, "random seed", least=0)
    data: str = flag("arithmetic", "arithmetic, or a JSONL file", group="data", stage="")
    prompt: str | None = flag(None, "prompt format; {question} is replaced")
    spurious: float | None = flag(None, "arithmetic: rate of spurious steps", least=0, most=1)
    steps: int | None = flag(None, "arithmetic: numbers that count", least=1)
    distractors: int | None = flag(None, "arithmetic: numbers that do not count", least=0)
    max_new_tokens: int | None = flag(None, "tokens a solution may have", group="sampling", least=1)
    temperature: float | None = flag(None, "sampling temperature", least=1e-6, stage="pos")
    sampling_dtype: str = flag("float32", "of the weights that are sampled", choices=DTYPES)
    dtype: str = flag("", "of activations in training; empty = bfloat16 on cuda", group="machine")
    device: str = flag("", "cpu, cuda or mps; empty = cuda where there is one", stage="")
    slots: int = flag(0, "rows that decode together; 0 = as fit in memory", least=0, stage="")
    threads: int = flag(0, "CPU threads; 0 = two for a small model, else all", least=0, stage="")


def world_flags(c):
    """What the flags say of the built-in task; {} for a file."""
    if c.data != "arithmetic":
        return {}
    return dict(spurious=c.spurious, steps=c.steps, distractors=c.distractors)


def how_prompted(c):
    """A line that says how a policy is prompted and sampled, and in which world, and what of it is
    not as the model was trained."""
    used = dict(prompt=c.prompt, max_new_tokens=c.max_new_tokens, temperature=c.temperature)
    used |= dict(sampling_dtype=c.sampling_dtype) | world_flags(c)
    known = read_json(Path(c.model) / POLICY_FILE)
    others = {name: known[name] for name in used if name in known and known[name] != used[name]}
    text = ", ".join(f"{name} {value!r}" for name, value in used.items())
    if not known:
        return f"{text}; its folder does not say how it was trained"
    return f"{text}; trained with {others}" if others else f"{text}, as it was trained"


def read_data(c, split, enough):
    """(problems, their hash), --limit of them; 0 is all of a file, `enough` of the built-in task.
    The hash is that of any number of problems from the same source."""
    if c.data == "arithmetic":
        problems = load_problems(c.data, split, c.limit or enough, **world_flags(c))
        return problems, content_hash(problems[:1])
    problems = load_problems(c.data)
    return problems[: c.limit or None], content_hash(problems)


def counted(samples):
    """How many samples, {problem id: its samples}, and what share is right and did not end."""
    drawn = [s for row in samples.values() for s in row]
    right = np.mean([s["correct"] for s in drawn])
    unended = np.mean([not s["ended"] for s in drawn])
    text = f"{len(drawn)} samples of {len(samples)} problems, {right:.1%} correct"
    return text + (f", {unended:.1%} did not end" if unended else "")


@dataclass
class RolloutFlags(PolicyFlags):
    out: str = flag("runs/rollouts", "folder for the rollouts", group="run", stage="")
    limit: int = flag(0, "problems; 0 = all of a file, or 100", group="data", least=0, stage="")
    samples: int | None = flag(None, "of a problem", group="sampling", least=1, stage="values")
    rollouts: int = flag(0, "K a prefix; 0 = no values", group="values", least=0, stage="values")
    scan: str = flag("first", "values to the first pit, or all", choices=SCANS, stage="values")


def main():
    c = apply_presets(parse_flags(RolloutFlags, __doc__))
    problems, data_hash = read_data(c, "train", enough=100)
    policy = load_policy(c.model, c)
    policy.prompt(problems[0])  # a wrong prompt format fails here, before anything is written
    c.device = policy.device
    out = Path(c.out)
    values = sorted(out.glob("values.jsonl"))
    sampled = sorted(out.glob("samples.jsonl")) + values
    claim_folder(
        c,
        out / "rollout_config.json",
        dict(sft=sampled, pos=sampled, values=values),
        data_hash=("sft", data_hash),
        model_hash=("sft", folder_hash(c.model)),
    )
    wait_for_all()
    samples = sample(policy, problems, out / "samples.jsonl", c.samples)
    print(f"{counted(samples)}, in {out}; {how_prompted(c)}")
    if c.rollouts:
        by_id = {problem.id: problem for problem in problems}
        solutions = solutions_to_value(policy, problems, samples, wrong=c.samples)
        value_steps(policy, by_id, solutions, out / "values.jsonl", k=c.rollouts, scan=c.scan)
        tokens = sum(gather([policy.decoded]))
        print(f"{len(solutions)} wrong solutions valued; {tokens} tokens sampled")


if __name__ == "__main__":
    run_program(main)
