r"""Rollouts: value the steps of sampled solutions, find the first pit, make the pairs to train on.

The value of a step is the chance that the policy still reaches the correct answer when it goes on
from there (Eq. 2). So everything here comes from one function, `generate`, and its two uses:

    samples         solutions of a problem                 sample()        rollouts.jsonl
    continuations   ways to go on from a prefix of steps   first_pits()    values.jsonl
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
3. A solution that ran out of its token budget counts as wrong, whatever it says.
"""

import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import RANK, Tokenizer, UserError, append_rows, apply_presets, claim_folder
from data import content_hash, edit_distance, equation_key, flag, folder_hash, format_prompt
from data import is_correct, load_problems, parse_flags, read_rows, split_steps
from model import GPT, CheckpointError, KVCache

# torchrun sets these, and RANK. Its processes share the work and each gets all results; rank 0
# alone prints and writes.
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))

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
    first_pit: int | None = None  # number of the step, from 1; None if the solution is correct
    continuations: list = field(default_factory=list)  # correct ones from just before the pit

    def through_step(self, i):
        """Token ids of y_1 .. y_i; [] for i = 0."""
        return self.ids[: self.ends[i - 1]] if i else []

    def step(self, i):
        """Token ids of y_i."""
        return self.ids[len(self.through_step(i - 1)) : self.ends[i - 1]]


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
            ends = np.cumsum([len(step) for step in steps]).tolist()
            # the Q of the last step is the checker's verdict
            q_values = [None] * (len(steps) - 1) + [float(s["correct"])]
            solutions.append(
                Solution(
                    problem.id, number, s["correct"], s["ids"], ends, s["text"], value, q_values
                )
            )
    return solutions


def estimate_values(policy, problems, solutions, *, k, scan):
    """Set the q_values of `solutions` from k continuations of each prefix of steps (Eq. 2).

    scan "first" leaves a wrong solution at its first step with Q = 0, "full" values every step.
    problems: {id: Problem}.
    """
    longest = max((len(s.ends) for s in solutions), default=0)
    for i in range(1, longest):  # the last step needs no sampling: the checker decides
        walking = [s for s in solutions if len(s.ends) > i]
        if scan == "first":
            walking = [s for s in walking if s.correct or 0 not in s.q_values[:i]]
        # Many solutions of a problem begin alike: each prefix is continued once.
        prefixes = list(dict.fromkeys((s.id, tuple(s.through_step(i))) for s in walking))
        correct = correct_continuations(policy, problems, prefixes, k)
        for s in walking:
            found = correct[s.id, tuple(s.through_step(i))]
            if found and 0 not in s.q_values[:i]:  # the pit is still to come
                s.continuations = found
            s.q_values[i - 1] = len(found) / k
    for s in solutions:
        s.first_pit = None if s.correct else find_first_pit(s.q_values)


def correct_continuations(policy, problems, prefixes, k):
    """{prefix: those of its k continuations that end correctly}; a prefix is (problem id, tuple of
    token ids of its steps). The processes share the prefixes."""
    mine = shard(prefixes)
    prompts = [policy.prompt(problems[id]) + list(ids) for id, ids in mine]
    budgets = [policy.max_new_tokens - len(ids) for _, ids in mine]
    sampled = policy.generate(prompts, k, max_new_tokens=budgets)
    found = []
    for (id, ids), continuations in zip(mine, sampled, strict=True):
        correct = []
        for continuation in continuations:
            if policy.judge([*ids, *continuation], problems[id])["correct"]:
                correct.append(continuation)
        found.append(((id, ids), correct))
    return dict(gather(found))


def find_first_pit(q_values):
    """Number, from 1, of the first step with the least Q among those valued (Algorithm 1).

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


def first_pits(policy, problems, solutions, path, *, k, scan="first"):
    """Value `solutions` and find their first pits: rows of the JSONL file `path`.

    Solutions already in the file are not valued again. Returns `solutions`.
    """
    keys = dict(id=str, sample=int, ids=list, ends=list, q_values=list, continuations=list)
    rows = {(row["id"], row["sample"]): row for row in read_rows(path, keys)}
    gather([])  # all processes have read before rank 0 writes
    todo = []
    for s in solutions:
        row = rows.get((s.id, s.sample))
        if row is None:
            todo.append(s)
            continue
        belongs = row["ids"] == s.ids and row["ends"] == s.ends
        if not belongs or len(row["q_values"]) != len(s.ends):  # another engine may have written it
            raise UserError(
                f"{path}: the values of problem {s.id}, sample {s.sample}, are not of the steps of "
                "that sample in rollouts.jsonl"
            )
        s.q_values = row["q_values"]
        s.continuations = row["continuations"]
        s.first_pit = None if s.correct else find_first_pit(s.q_values)
    bar = progress("values", "solution", len(solutions), len(solutions) - len(todo))
    at_once = max(1, policy.samples_at_once * WORLD // k)
    for start in range(0, len(todo), at_once):
        part = todo[start : start + at_once]
        estimate_values(policy, problems, part, k=k, scan=scan)
        append_rows(path, [asdict(s) for s in part])
        bar.update(len(part))
    bar.close()
    gather([])  # rank 0 has written before any process goes on
    return solutions


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
        """What it counts in the mean over a batch: its response tokens."""
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
        """What it counts in the mean over a batch: one pair."""
        return 1


# A form of pairs gets a wrong solution, the distinct correct solutions of the same problem (token
# ids, in random order) and a function that splits token ids into steps. It returns the steps that
# join the prompt, candidates for chosen, of which the first suitable one is used, and rejected.


def continuation_form(s, correct, split):
    """Self-Explore's: from the steps before the pit, a correct continuation against the pit."""
    # Shortest first: it has the fewest irrelevant steps. Before step 1 there is no prefix, so any
    # correct solution is a continuation.
    chosen = correct if s.first_pit == 1 else sorted(s.continuations, key=len)
    return s.through_step(s.first_pit - 1), chosen, s.step(s.first_pit)


def step_form(s, correct, split):
    """Theorem 6.1: from the steps before the pit, one step against one step."""
    prefix, chosen, pit = continuation_form(s, correct, split)
    return prefix, [split(ids)[0] for ids in chosen], pit


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
    """A pair for every wrong solution that has a way to do better. Returns a list of `Pair`.

    form: a key of PAIR_FORMS. samples: {problem id: its samples}, from which they come.
    The end of text stands exactly where a solution ended, never behind a step that was cut out.
    """
    if form not in PAIR_FORMS:
        raise UserError(f"pairs: {form!r} is none of {', '.join(PAIR_FORMS)}")
    pairs = []
    for s in solutions:
        if s.correct:
            continue
        problem = problems[s.id]
        correct = distinct([x for x in samples[s.id] if x["correct"]])
        # a stream of its own, so that a pair depends on no other solution
        order = np.random.default_rng([seed, s.sample, *s.ids]).permutation(len(correct))

        correct = [correct[i]["ids"] for i in order]
        split = partial(split_steps, tokenizer=policy.tokenizer, style=problem.style)
        prefix, candidates, rejected = PAIR_FORMS[form](s, correct, split)
        # a candidate that begins with the rejected text is no better way to go on
        candidates = [ids for ids in candidates if ids[: len(rejected)] != rejected]
        if candidates:
            prompt = policy.prompt(problem) + prefix
            pairs.append(Pair(s.id, form, s.first_pit, prompt, candidates[0], rejected))
    return pairs


def pair_row(pair, tokenizer):
    """A row of pairs.jsonl: token ids, and texts that joined are the text of the joined ids."""
    prompt, chosen = tokenizer.texts([pair.prompt, pair.chosen])
    rejected = tokenizer.texts([pair.prompt, pair.rejected])[1]
    return dict(
        id=pair.id,
        form=pair.form,
        first_pit=pair.first_pit,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        prompt_ids=pair.prompt,
        chosen_ids=pair.chosen,
        rejected_ids=pair.rejected,
    )


# ---------------------------------------------------------------- samples, and what to use of them


def sample(policy, problems, path, n, temperature=None):
    """n solutions of every problem by `policy`: rows of the JSONL file `path`. Returns {problem id:
    list of samples}, a sample being {ids, text, ended, correct}.

    A row: {id, temperature, samples}. Problems already in the file are skipped. temperature:
    overrides the policy's; 0 is greedy. The processes share the problems.
    """
    if temperature is None:
        temperature = policy.temperature
    samples = {}
    for row in read_rows(path, dict(id=str, temperature=(int, float), samples=list)):
        check_samples(path, row, n, policy)
        samples[row["id"]] = row["samples"]
    todo = [problem for problem in problems if problem.id not in samples]
    bar = progress("sample", "problem", len(problems), len(problems) - len(todo))
    at_once = max(1, policy.samples_at_once * WORLD // n)
    for start in range(0, len(todo), at_once):
        part = todo[start : start + at_once]
        mine = shard(part)
        sampled = policy.generate([policy.prompt(problem) for problem in mine], n, temperature)
        new = []
        for problem, solutions in zip(mine, sampled, strict=True):
            judged = [policy.judge(ids, problem) for ids in solutions]
            new.append(dict(id=problem.id, temperature=temperature, samples=judged))
        new = gather(new)
        append_rows(path, new)
        samples |= {row["id"]: row["samples"] for row in new}
        bar.update(len(part))
    bar.close()
    gather([])  # rank 0 has written before any process goes on
    return {problem.id: samples[problem.id] for problem in problems}


def check_samples(path, row, n, policy):
    """Refuse a row of rollouts.jsonl that another engine has filled in wrongly."""
    where = f"{path}: problem {row['id']}"
    if len(row["samples"]) != n:
        raise UserError(f"{where}: {len(row['samples'])} samples where --samples is {n}")
    for s in row["samples"]:
        if not isinstance(s, dict) or not {"ids", "text", "ended", "correct"} <= set(s):
            raise UserError(f"{where}: a sample lacks ids, text, ended or correct")
        if not are_ids(s["ids"], policy.tokenizer.vocab_size):
            raise UserError(f"{where}: ids is not a list of token ids of the vocabulary")
        if s["ended"] != (s["ids"][-1] in policy.tokenizer.stop_ids):
            raise UserError(f"{where}: ended is not true just where the last id is an end of text")


def are_ids(ids, vocab_size):
    """Whether `ids` is a list of at least one token id."""
    if not isinstance(ids, list) or not ids:
        return False
    return all(type(i) is int and 0 <= i < vocab_size for i in ids)


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


@torch.no_grad()
def generate(
    model,
    prompts,
    n=1,
    *,
    max_new_tokens=256,
    temperature=1.0,
    top_p=1.0,
    seed=0,
    stop_ids=(),
    vocab_size=None,
    slots=None,
):
    """Sample n continuations of every prompt: per prompt a list of n lists of new token ids.

    prompts: lists of token ids, of any lengths > 0. max_new_tokens: an int, or one for each prompt.
    temperature 0 is greedy. A sample ends with the first of stop_ids, which it includes. Ids from
    vocab_size on are never chosen: some embeddings have rows with no token behind them. slots: how
    many rows decode together, at least n. Raises UserError for an empty prompt, and where learned
    positions would run out. Sample j of a prompt depends on (seed, prompt, j) alone: a second call
    draws the same samples again. top_p < 1 draws from the most likely tokens only, to look at.
    """
    budgets = max_new_tokens
    if isinstance(max_new_tokens, int):
        budgets = [max_new_tokens] * len(prompts)
    check_lengths(prompts, budgets, model.config.position_limit)
    results = [[[] for _ in range(n)] for _ in prompts]
    queue = [i for i in range(len(prompts)) if n and budgets[i] > 0]
    if not queue:
        return results
    queue.sort(key=lambda i: len(prompts[i]))  # the longest leave first: memory runs out early
    width = max(budgets)

    def choose_token(logits, uniforms):
        return choose(logits[:, :vocab_size], uniforms, temperature, top_p)

    rows = slots or default_slots(model, len(prompts[queue[-1]]) + width)
    rows = min(max(1, rows // n), len(queue)) * n  # the n samples of a prompt start together
    running = Slots(model, rows, width, choose_token, stop_ids)
    while True:
        free = running.collect(results)
        while queue and len(free) >= n:
            most = min(len(free) // n, max(1, PREFILL_TOKENS // len(prompts[queue[-1]])))
            batch = [queue.pop() for _ in range(min(most, len(queue)))]
            owners = [(i, j) for i in batch for j in range(n)]
            uniforms = [uniform_numbers(seed, prompts[i], j, width) for i, j in owners]
            running.admit(
                free[: len(owners)],
                owners,
                [prompts[i] for i in batch],
                [budgets[i] for i, _ in owners],
                np.stack(uniforms),
            )
            free = free[len(owners) :]
        if len(free) == rows:
            return results
        if queue:  # refill in groups: prefilling one prompt costs almost as much as many
            running.decode(until_done=max(n, rows // 8))
        else:
            if len(free) >= rows / 2:
                running.shrink()
                rows -= len(free)
            running.decode(until_done=math.ceil(rows / 2))


def check_lengths(prompts, budgets, limit):
    for prompt, budget in zip(prompts, budgets, strict=True):
        if not prompt:
            raise UserError("generate: a prompt has no tokens")
        if len(prompt) + budget - 1 > limit:  # the last token is never fed back
            raise UserError(
                f"generate: a prompt of {len(prompt)} tokens and {budget} new ones do not fit the "
                f"{limit} positions of the model"
            )


class Slots:
    """Rows that decode together. Each holds one sample; a finished row takes the next one.

    Every tensor is made once; admissions and steps write into it. A step depends on no Python
    scalar and never waits for the device, so on a GPU one CUDA graph replays it until the cache
    grows.
    """

    def __init__(self, model, rows, width, choose_token, stop_ids):
        weight = model.norm.weight
        device = weight.device
        self.model = model
        self.choose_token = choose_token
        self.stop_ids = torch.tensor(list(stop_ids) or [-1], device=device)
        self.owner = [None] * rows  # (prompt, sample) of a row, None while it is free
        self.cache = KVCache(model.config, rows, 0, weight.dtype, device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)  # the last one chosen
        self.count = torch.zeros(rows, dtype=torch.long, device=device)  # tokens chosen so far
        self.budget = torch.zeros(rows, dtype=torch.long, device=device)
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        # one column more than the largest budget, as rows that are done still read and write
        self.output = torch.zeros(rows, width + 1, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(rows, width + 1, device=device)
        self.graph = None
        self.graph_room = 0  # of the cache when the graph was captured

    def admit(self, rows, owners, prompts, budgets, uniforms):
        """Prefill P prompts and start R samples in free rows, R / P behind each prompt.

        rows, owners, budgets: lists of R; uniforms: float32 array (R, width).
        """
        device = self.token.device
        for row, owner in zip(rows, owners, strict=True):
            self.owner[row] = owner
        rows = torch.tensor(rows, device=device)
        prefilled, logits = prefill(self.model, prompts)
        source = torch.arange(len(prompts), device=device)
        source = source.repeat_interleave(len(rows) // len(prompts))
        self.cache.copy_rows(prefilled, source, rows)
        self.uniforms[rows, :-1] = torch.from_numpy(uniforms).to(device)
        self.budget[rows] = torch.tensor(budgets, device=device)
        token = self.choose_token(logits[source], self.uniforms[rows, 0])
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
        token = self.choose_token(logits, self.uniforms.gather(1, column)[:, 0])
        self.output.scatter_(1, column, token[:, None])
        self.token.copy_(torch.where(live, token, self.token))
        self.count += live
        self.done |= torch.isin(self.token, self.stop_ids) | (self.count >= self.budget)

    def decode(self, until_done):
        """Decode until so many rows are done or free."""
        on_gpu = self.token.is_cuda
        steps = 8 if on_gpu else 1  # between two looks at `done`, for which a GPU must be waited
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

    def collect(self, results):
        """Move the finished samples to results[prompt][sample]; returns the free rows."""
        free = self.done.nonzero()[:, 0].tolist()
        finished = [row for row in free if self.owner[row] is not None]
        index = torch.tensor(finished, dtype=torch.long, device=self.done.device)
        counts = self.count[index].tolist()
        for row, ids, count in zip(finished, self.output[index].tolist(), counts, strict=True):
            prompt, sample = self.owner[row]
            results[prompt][sample] = ids[:count]
            self.owner[row] = None
        return free

    def shrink(self):
        """Drop the free rows, so that the last long samples decode in a smaller batch."""
        busy = [row for row, owner in enumerate(self.owner) if owner is not None]
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
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        # torch's allocator cannot be trusted after a failed capture, so there is no going on
        raise UserError(
            f"a decode step could not be captured as a CUDA graph ({str(error).splitlines()[0]}); "
            "CUDA_GRAPHS = False in rollout.py decodes without one"
        ) from None
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


def choose(logits, uniforms, temperature, top_p=1.0):
    """Sample one token per row by inverting the cumulative distribution: the first token whose
    cumulative probability exceeds the row's uniform number. (B, V), (B,) -> int64 (B,). May
    overwrite logits."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = logits.float().div_(temperature).softmax(-1)
    order = None
    if top_p < 1:  # only to look at: data that a loss sees must come from the policy itself
        probs, order = probs.sort(dim=-1, descending=True)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= top_p, 0)
    cumulative = probs.cumsum_(-1)  # in place: over a large vocabulary each copy counts
    # the sum is not exactly 1, and less after top_p
    target = uniforms[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True)
    if order is not None:
        token = order.gather(1, token)
    return token[:, 0]


def uniform_numbers(seed, prompt, sample, count):
    """The random numbers of one sample, float32 (count,) in [0, 1).

    Its stream is seeded by (seed, prompt, sample) alone, so a sample is the same in any batch, in
    any order and after any restart.
    """
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
    max_new_tokens: int = 256  # tokens a solution may have
    temperature: float = 1.0
    seed: int = 0
    slots: int | None = None  # rows that decode together; None: as fit in memory
    device: str = "cpu"
    dtype: str = "float32"  # of the activations in training
    samples_at_once: int = 4096  # of a process, between two writes to disk
    decoded: int = 0  # tokens sampled so far, by this process

    def prompt(self, problem):
        """Token ids of the prompt. Prompt and solution are tokenized apart, in training as in
        sampling, so that no token spans the boundary."""
        return self.tokenizer.encode(format_prompt(self.prompt_format, problem.question))

    def solution(self, problem):
        """Token ids of the teacher's solution and the end of text."""
        return self.tokenizer.encode(problem.solution) + [self.tokenizer.eos_id]

    def text(self, ids):
        """The text of token ids, without ends of text."""
        return self.tokenizer.decode([id for id in ids if id not in self.tokenizer.stop_ids])

    def judge(self, ids, problem):
        """A sampled solution as in rollouts.jsonl. One that did not end counts as wrong."""
        text = self.text(ids)
        ended = bool(ids) and ids[-1] in self.tokenizer.stop_ids
        correct = ended and is_correct(text, problem.answer)
        return dict(ids=ids, text=text, ended=ended, correct=correct)

    def generate(self, prompts, n=1, temperature=None, max_new_tokens=None):
        """`generate` with this policy's settings, or with another temperature or other budgets.
        The same call draws the same samples again."""
        samples = generate(
            self.model,
            prompts,
            n,
            max_new_tokens=max_new_tokens or [self.max_new_tokens] * len(prompts),
            temperature=self.temperature if temperature is None else temperature,
            seed=self.seed,
            stop_ids=self.tokenizer.stop_ids,
            vocab_size=self.tokenizer.vocab_size,
            slots=self.slots,
        )
        self.decoded += sum(len(ids) for row in samples for ids in row)
        return samples


def load_policy(folder, c, train=False):
    """The policy of the model and tokenizer in `folder` and the flags `c`.

    Weights to train are float32, weights to sample from have the dtype of the activations.
    """
    if not folder:
        raise UserError("--model is missing: it names a Hugging Face folder")
    if c.dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"--dtype {c.dtype} is not float32 or bfloat16")
    device = pick_device(c.device)
    dtype = c.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    weights = torch.float32 if train else getattr(torch, dtype)
    # FSDP2 moves its parts of the model to the device by itself
    place = "cpu" if train and WORLD > 1 else device
    model = GPT.from_pretrained(folder, dtype=weights, device=place)
    tokenizer = Tokenizer.from_pretrained(folder)
    if max(tokenizer.stop_ids) >= model.config.vocab_size:
        raise UserError(
            f"{folder}: the end of text is token {max(tokenizer.stop_ids)}, but the "
            f"model has {model.config.vocab_size}"
        )
    tokenizer.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
    policy = Policy(
        model,
        tokenizer,
        c.prompt,
        c.max_new_tokens,
        c.temperature,
        c.seed,
        c.slots or None,
        device,
        dtype,
    )
    if device == "cpu":
        small = sum(p.numel() for p in model.parameters()) < 5_000_000
        cores = max(1, (os.cpu_count() or 1) // WORLD)
        torch.set_num_threads(c.threads or min(cores, 2 if small else cores))
        if not small:
            policy.samples_at_once = 512
    return policy


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
    return device


# ---------------------------------------------------------------- programs and processes


def shard(items):
    """This process's part of a list, one block of it."""
    return items[len(items) * RANK // WORLD : len(items) * (RANK + 1) // WORLD]


def gather(mine):
    """The lists of all processes, joined, in each of them. Waits for them all."""
    if WORLD == 1:
        return mine
    parts = [None] * WORLD
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def progress(name, unit, total, done):
    """A progress bar on rank 0; in a log file it is printed every 30 seconds."""
    pause = 0.2 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=done, desc=name, unit=unit, mininterval=pause, disable=RANK > 0
    )


def run_program(main):
    """Run a program. Errors that the user can fix are one line and exit code 2."""
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    try:
        main()
    except KeyboardInterrupt:
        leave(130, "stopped; the same command goes on from here")
    except (UserError, CheckpointError, OSError, UnicodeError, SafetensorError) as error:
        leave(2, f"error: {' '.join(str(error).split())}")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        leave(
            2,
            "error: out of memory; the same command goes on from here with lower "
            "--micro-tokens or --slots, or with --gradient-checkpointing 1",
        )
    if WORLD > 1:
        dist.destroy_process_group()


def out_of_memory(error):
    """Whether an error says that memory ran out, on a GPU or on a CPU."""
    words = ("out of memory", "allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def leave(code, message):
    """Print one line and exit. Of several processes the first to fail prints it."""
    if WORLD > 1 and dist.distributed_c10d._get_default_store().add("failed", 1) > 1:
        time.sleep(10)  # torchrun ends this process as soon as the first one has left
        os._exit(code)
    for bar in list(tqdm._instances):  # an open bar would share its line with the message
        bar.close()
    print(message, file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------- command line


@dataclass
class PolicyFlags:
    """The flags that all three programs share. None: the task's default, from data.PRESETS.

    A run may go on with model and data in another place: their hashes must stay, not their paths.
    """

    model: str | None = flag(None, "Hugging Face folder to start from", group="run", free=True)
    seed: int = flag(0, "random seed", least=0)
    data: str = flag("arithmetic", "arithmetic, or a JSONL file", group="data", free=True)
    prompt: str | None = flag(None, "prompt format; {question} is replaced")
    max_new_tokens: int | None = flag(None, "tokens a solution may have", group="sampling", least=1)
    temperature: float | None = flag(None, "sampling temperature", least=1e-6)
    dtype: str = flag("", "of activations; empty = bfloat16 on cuda, else float32", group="machine")
    device: str = flag("", "cpu, cuda or mps; empty = cuda where there is one", free=True)
    slots: int = flag(0, "rows that decode together; 0 = as fit in memory", least=0, free=True)
    threads: int = flag(0, "CPU threads; 0 = two for a small model, else all", least=0, free=True)


@dataclass
class RolloutFlags(PolicyFlags):
    out: str = flag("runs/rollouts", "folder for the rollouts", group="run", free=True)
    limit: int = flag(100, "the first problems only; 0 = all of a file", group="data", least=0)
    samples: int | None = flag(None, "samples a problem", group="sampling", least=1)
    rollouts: int = flag(0, "K: continuations per prefix; 0 = no values", group="values", least=0)
    scan: str = flag("first", "steps to value: to the first pit, or all", choices=SCANS)


def main():
    c = apply_presets(parse_flags(RolloutFlags, __doc__))
    problems = load_problems(c.data, limit=c.limit)
    policy = load_policy(c.model, c)
    policy.prompt(problems[0])  # a wrong prompt format fails here, before anything is written
    out = Path(c.out)
    hashes = dict(data_hash=content_hash(problems), model_hash=folder_hash(c.model))
    claim_folder(c, out / "rollout_config.json", **hashes)
    samples = sample(policy, problems, out / "rollouts.jsonl", c.samples)
    verdicts = [s["correct"] for drawn in samples.values() for s in drawn]
    print(f"{len(verdicts)} samples, {np.mean(verdicts):.1%} correct, in {out}")
    if c.rollouts:
        by_id = {problem.id: problem for problem in problems}
        solutions = solutions_to_value(policy, problems, samples, wrong=c.samples)
        first_pits(policy, by_id, solutions, out / "values.jsonl", k=c.rollouts, scan=c.scan)
        print(f"{len(solutions)} wrong solutions valued; {policy.decoded} tokens sampled")


if __name__ == "__main__":
    run_program(main)
