"""The experiments at their smallest: the whole path of each script, its files, its resume, and the statistics that all
of them share. Each docstring names the bug it guards."""

import csv
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import lab
from rollout import entry

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run(name, monkeypatch, out):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--budget", "smoke", "--jobs", "1", "--out", str(out)])
    entry(importlib.import_module(name).main)


@pytest.mark.parametrize("name", ["scaling", "positives", "credit", "star", "smollm", "theorem"])
def test_every_script_runs_and_says_what_it_found(name, tmp_path, monkeypatch, capsys):
    """A script that nobody ran since the modules changed; a result without seeds, verdicts or where it came from."""
    run(name, monkeypatch, tmp_path)
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["command"] == f"python experiments/{name}.py --budget smoke" and result["summary"]
    assert {"commit", "torch", "device_name", "process_seconds"} <= set(result) and result["cells"]
    assert len(list(csv.DictReader(open(tmp_path / f"{name}.csv", newline="")))) > 1
    for cell in result["cells"]:
        for arm in cell.get("arms", {}).values():
            if "accuracy" in arm:
                assert arm["accuracy"] == pytest.approx(arm["correct"].count("1") / len(arm["correct"]), abs=1e-3)
    assert not list(ROOT.glob("experiments/results/*smoke*"))


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Cells made again (hours), or a result that depends on whether the sweep was stopped."""
    run("scaling", monkeypatch, tmp_path)
    before = json.loads((tmp_path / "scaling.json").read_text())
    cells = sorted(tmp_path.glob("*/cell.json"))
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    stamp = cells[1].stat().st_mtime_ns
    cells[0].unlink()  # the sweep was killed before this cell ended
    run("scaling", monkeypatch, tmp_path)
    assert cells[1].stat().st_mtime_ns == stamp
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")} == weights
    after = json.loads((tmp_path / "scaling.json").read_text())
    assert after["summary"] == before["summary"]


def test_the_multiplier_is_read_off_the_curve():
    """Interpolation on the wrong axis; a bound reported as a measurement; more data held against SFT."""
    sizes = [100, 200, 400, 800]
    errors = np.array([0.8, 0.4, 0.2, 0.1])  # error ~ 1 / size
    assert lab.multiplier(sizes, errors, 100, 0.4) == pytest.approx((2.0, False))
    value, bound = lab.multiplier(sizes, errors, 100, 0.4 / np.sqrt(2))
    assert value == pytest.approx(2 * np.sqrt(2)) and not bound
    assert lab.multiplier(sizes, errors, 200, 0.05) == (4.0, True)
    assert lab.multiplier(sizes, errors, 200, 0.9) == (0.5, False)
    bumpy = np.array([0.8, 0.4, 0.5, 0.1])
    assert lab.multiplier(sizes, bumpy, 100, 0.45)[0] < 2
    assert float(lab.slope(sizes, errors[:, None])[0]) == pytest.approx(-1.0)


def test_the_bootstrap_pairs_the_arms():
    """Arms resampled apart: a difference that is the same on every problem and seed would get an interval."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, (3, 200))
    both = np.stack([a, a])
    drawn = lab.resampled({"a": both[0], "b": 1 - both[1]})
    np.testing.assert_allclose(drawn["a"] + drawn["b"], 1.0)
    assert drawn["a"][0] == pytest.approx(1 - a.mean()) and drawn["a"][1:].std() > 0.01
    assert lab.spread([0.5, 0.5, 0.5]) == [0.5, 0.5, 0.5]
    mean, low, high = lab.spread([0.4, 0.5, 0.6])
    assert (low, high) == pytest.approx((0.5 - 0.2484, 0.5 + 0.2484), abs=1e-3)
