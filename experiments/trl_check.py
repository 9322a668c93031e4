"""Check that trl's DPOTrainer trains on the token ids of pairs.jsonl, unchanged.

    python -m venv trl && trl/bin/pip install trl==1.16.0 -r requirements.txt
    trl/bin/python experiments/trl_check.py runs/x/pos

Takes the first pairs of a folder with a model and its pairs.jsonl. The summed log-probabilities of
chosen and rejected must be those of train.py to 1e-4 (relative, where they are large); if not, it
exits with 1. What DPOTrainer makes of the pairs by itself is printed for comparison.

`IdsTrainer` and `stepwise_rows` are to be used in scripts of your own: experiments/FILES.md.
"""

import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Tokenizer, UserError, read_json, read_rows
from model import GPT
from rollout import Pair, run_program
from train import pair_logps

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
PAIRS = 256
TOLERANCE = 1e-4


class IdsTrainer(DPOTrainer):
    """Trains on prompt_ids, chosen_ids and rejected_ids as they are. DPOTrainer makes them anew
    from the texts, with an end of text even behind a step that was cut out of a solution."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def trl_logps(trainer_class, folder, rows):
    """What trl trains on: its dataset, and the summed log-probabilities of [chosen, rejected],
    float32 (B, 2), under the model in `folder`."""
    with tempfile.TemporaryDirectory() as out:
        args = DPOConfig(out, max_length=None, bf16=False, use_cpu=True, report_to="none")
        trainer = trainer_class(str(folder), args=args, train_dataset=Dataset.from_list(rows))
        logps = []
        for batch in trainer.get_eval_dataloader(trainer.train_dataset):
            chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
            logps.append(torch.stack((chosen, rejected), 1))
    return trainer.train_dataset, torch.cat(logps)


@torch.no_grad()
def our_logps(folder, rows):
    """The same of train.py, float32 (B, 2)."""
    pairs = []
    for row in rows:
        ids = [row[name] for name in ID_COLUMNS]
        pairs.append(Pair(row["id"], row["form"], row["first_pit"], *ids))
    return torch.stack(pair_logps(GPT.from_pretrained(folder), pairs), 1)


def check_pairs(trainer_class, folder, rows):
    """Compare trl with train.py on `rows` of pairs.jsonl. Returns whether they agree."""
    ours = our_logps(folder, rows)
    dataset, logps = trl_logps(trainer_class, folder, rows)
    changed = 0
    for row, seen in zip(rows, dataset, strict=True):
        changed += any(row[name] != seen[name] for name in ID_COLUMNS)
    difference = (logps - ours).abs().max().item()
    name = trainer_class.__name__
    print(f"{name}: {changed} of {len(rows)} pairs changed, largest difference {difference:.1e}")
    return torch.allclose(logps, ours, rtol=TOLERANCE, atol=TOLERANCE)


def stepwise_rows(folder):
    """The steps of values.jsonl as trl's stepwise supervision: {prompt, completions, labels}.

    The label of a step is Q > 0. A solution is cut before its first step without a value. trl puts
    a newline behind each step, so none is left in the texts.
    """
    tokenizer = Tokenizer.from_pretrained(folder)
    prompt_format = read_json(folder.parent / "config.json")["prompt"]
    questions = {row["id"]: row["question"] for row in read_rows(folder.parent / "data.jsonl")}
    rows = []
    for s in read_rows(folder / "values.jsonl"):
        parts = [tokenizer.encode_prompt(prompt_format, questions[s["id"]])]
        parts += [s["ids"][start:end] for start, end in pairwise([0, *s["ends"]])]
        prompt, *steps = tokenizer.texts(parts)
        valued = [*s["q_values"], None].index(None)
        completions = [step.rstrip("\n") for step in steps[:valued]]
        labels = [q > 0 for q in s["q_values"][:valued]]
        rows.append(dict(prompt=prompt, completions=completions, labels=labels))
    return rows


def main():
    if len(sys.argv) != 2:
        raise UserError("name one folder with a model and its pairs.jsonl, such as runs/x/pos")
    folder = Path(sys.argv[1])
    pairs = read_rows(folder / "pairs.jsonl")[:PAIRS]
    if not pairs:
        raise UserError(f"{folder}: there is no pairs.jsonl with pairs")
    print(f"trl {trl.__version__}, transformers {transformers.__version__}")
    check_pairs(DPOTrainer, folder, pairs)
    if not check_pairs(IdsTrainer, folder, pairs):
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
