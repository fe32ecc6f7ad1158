import dataclasses
import os
import signal
import weakref

import pytest
import torch
from torch import nn

from copgen_fast.errors import NonFiniteError
from copgen_fast.runtime import interrupts
from copgen_fast.training import loop
from copgen_fast.training.loop import Plan, StepResult
from copgen_fast.training.metrics import read_rows


class Problem:
    """Least squares by SGD with momentum; the data of step i depends on i alone."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.seen = []
        self.before = lambda index: None

    def data(self, index):
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(index))

    def step(self, index, x):
        self.before(index)
        self.seen.append(index)
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return StepResult({"loss": loss}, {"inputs": x})

    def run(self, plan, **options):
        state = {"model": self.model, "optimizer": self.optimizer}
        return loop.run(self.step, self.data, state, plan, **options)


@pytest.fixture
def plan(tmp_path):
    return Plan("test", tmp_path / "run", steps=20, batch=4, log_every=3, save_every=5)


def weights(problem):
    return torch.cat([value.flatten() for value in problem.model.state_dict().values()])


def uninterrupted(plan):
    problem = Problem()
    plan = dataclasses.replace(plan, folder=plan.folder.with_name("whole"))
    problem.run(plan)
    return weights(problem), (plan.folder / "metrics.jsonl").read_bytes()


class Killed(BaseException):
    pass


def test_metrics_that_wait_to_be_logged_keep_no_graph_of_their_step(plan):
    problem, graphs = Problem(), []

    def step(index, x):
        problem.model.zero_grad()
        loss = problem.model(x).square().mean()
        kept = torch.ones(())
        loss = loss * kept.requires_grad_()  # the graph holds it
        graphs.append(weakref.ref(kept))
        del kept
        assert [number for number, graph in enumerate(graphs[:-1]) if graph() is not None] == []
        return StepResult({"loss": loss}, {"loss": loss})

    loop.run(step, problem.data, {"model": problem.model}, plan)
    assert len(graphs) == 20


def kill_at(step):
    def before(index):
        if index == step:
            raise Killed

    return before


def test_killed_twice_it_ends_bit_equal(plan):
    for step in (8, 16):
        problem = Problem()
        problem.before = kill_at(step)
        with pytest.raises(Killed):
            problem.run(plan)
    problem = Problem()
    summary = problem.run(plan)
    expected, log = uninterrupted(plan)
    assert problem.seen[0] == 12, "goes on from the last checkpoint"
    assert torch.equal(weights(problem), expected)
    assert (plan.folder / "metrics.jsonl").read_bytes() == log
    assert (summary["steps"], summary["samples"]) == (20, 80)


def test_a_finished_run_does_nothing_more(plan):
    Problem().run(plan)
    problem = Problem()
    assert problem.run(plan)["steps"] == 20
    assert problem.seen == []
    assert torch.equal(weights(problem), uninterrupted(plan)[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_leave(plan, number):
    problem = Problem()
    problem.before = lambda index: os.kill(os.getpid(), number) if index == 7 else None
    with interrupts.handle_signals(), pytest.raises(interrupts.Interrupted, match="stopped at step 8, state saved"):
        problem.run(plan)
    again = Problem()
    again.run(plan)
    assert again.seen == list(range(8, 20)), "nothing is done twice"
    assert torch.equal(weights(again), uninterrupted(plan)[0])


def test_a_nan_names_step_and_tensor_and_keeps_the_last_good_checkpoint(plan):
    problem = Problem()
    problem.data = lambda index: torch.full((4, 3), float("nan")) if index == 13 else Problem.data(problem, index)
    with pytest.raises(NonFiniteError, match="NaN or infinity in inputs at step 13"):
        problem.run(plan)
    healed = Problem()
    healed.run(plan)
    assert healed.seen[0] == 12
    assert torch.equal(weights(healed), uninterrupted(plan)[0])


def test_a_diverged_loss_is_named(plan):
    problem = Problem()
    problem.optimizer.param_groups[0]["lr"] = 1e25
    with pytest.raises(NonFiniteError, match="in loss at step"):
        problem.run(plan)


def test_the_stop_rule_is_looked_at_on_its_cadence(plan):
    problem = Problem()
    summary = problem.run(plan, stop=lambda row: row["step"] >= 7)
    assert summary["steps"] == 9  # step 8 is the first look at or after step 7
    assert Problem().run(plan)["steps"] == 9, "stays finished"


def test_rows_carry_the_samples_before_their_step(plan):
    Problem().run(plan)
    rows = read_rows(plan.folder / "metrics.jsonl")
    assert [(row["step"], row["samples"]) for row in rows] == [(step, 4 * step) for step in range(20)]
