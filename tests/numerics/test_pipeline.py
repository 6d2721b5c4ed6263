"""A placed model computes what the unplaced one computes: bit by bit where torch runs every stage."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lm
from experiments import measure, planning
from hetero.backends import all_backends, cpu
from hetero.device import Device
from hetero.discovery import discover
from hetero.errors import DeviceError, PlacementError, StageError
from hetero.planner.plans import Plan, PlanStage
from hetero.runtime import Stage, place, place_stages, token_cross_entropy, turns
from hetero.runtime.pipeline import split
from hetero.schedule import work_order
from hetero.topology import Topology

B, T, V = 8, 12, 17
N_LAYERS = 6


@pytest.fixture(autouse=True)
def _one_thread():
    """The reference runs in the test's thread: with one torch thread, like a device of one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def topology(monkeypatch):
    """Two devices of one core each: the cpu and a second one like it under a foreign runtime's name."""
    monkeypatch.setitem(all_backends(), "fake", cpu)
    cores = cpu.host_cores()
    return Topology(
        (
            Device("cpu", "cpu", "cpu", 2**30, cores=cores[:1], memory_pool="host"),
            Device("fake:0", "cpu", "fake", 2**30, cores=cores[-1:], memory_pool="host"),
        )
    )


def make_model(**settings: Any) -> lm.Transformer:
    config = lm.ModelConfig(n_layer=2, d_model=16, n_head=2, vocab_size=V, seq_len=T, **settings)
    return lm.Transformer(config, generator=torch.Generator().manual_seed(7))


def make_batch(rows: int = B, *, context: dict[str, Tensor] | None = None) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(V, (rows, T + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100  # micro-batches weigh differently
    return SimpleNamespace(inputs=tokens[:, :-1].contiguous(), targets=targets, context=context or {})


def reference_step(model: nn.Module, batch: SimpleNamespace, n_microbatches: int) -> float:
    """The same step in plain torch: a loop over the micro-batches."""
    n_all, total = int((batch.targets != -100).sum()), 0.0
    for rows in torch.arange(batch.inputs.shape[0]).tensor_split(n_microbatches):
        targets = batch.targets[rows]
        n = int((targets != -100).sum())
        if n == 0:
            continue
        context = {key: value[rows] for key, value in batch.context.items()}
        loss = lm.loss(model(batch.inputs[rows], context), targets)
        (loss * (n / n_all)).backward()
        total += n / n_all * loss.item()
    return total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


CUTS = {
    "one stage": [("cpu", 0, 5)],
    "two stages": [("cpu", 0, 2), ("fake:0", 3, 5)],
    "a stage of one layer": [("fake:0", 0, 0), ("cpu", 1, 5)],
    "a device twice": [("cpu", 0, 1), ("fake:0", 2, 3), ("cpu", 4, 5)],
    "both devices twice": [("cpu", 0, 0), ("fake:0", 1, 2), ("cpu", 3, 4), ("fake:0", 5, 5)],
}


@pytest.mark.parametrize("stages", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("n_microbatches", [1, 4, 5, 8])
def test_a_placed_step_equals_the_unplaced_one_bit_for_bit(topology, stages, n_microbatches):
    model, batch = make_model(), make_batch()
    expected_loss = reference_step(model, batch, n_microbatches)
    expected = gradients(model)
    with place_stages(model, stages, topology, loss=lm.loss, n_microbatches=n_microbatches) as placed:
        assert placed.step(batch) == expected_loss
    assert len(expected) == len(list(model.parameters()))
    assert_same_bits(gradients(model), expected)


ONE_STAGE_A_DEVICE = ["one stage", "two stages", "a stage of one layer"]


@pytest.mark.parametrize("cut", ONE_STAGE_A_DEVICE)
@pytest.mark.parametrize("n_microbatches", [1, 2, 4, 5, 8])
def test_a_1f1b_step_equals_the_unplaced_one_bit_for_bit(topology, cut, n_microbatches):
    model, batch, stages = make_model(), make_batch(), CUTS[cut]
    expected_loss = reference_step(model, batch, n_microbatches)
    expected = gradients(model)
    with place_stages(model, stages, topology, loss=lm.loss, n_microbatches=n_microbatches, schedule="1f1b") as placed:
        assert placed.step(batch) == expected_loss
        events = placed.last_events
    assert_same_bits(gradients(model), expected)
    for index in range(len(stages)):
        own = [(e.phase, e.microbatch) for e in events if e.stage == index]
        planned = work_order([device for device, _, _ in stages], n_microbatches, schedule="1f1b")[stages[index][0]]
        assert own == [(work.phase, work.microbatch) for work in planned]


@pytest.mark.parametrize("n_microbatches", [1, 3, 8])
def test_1f1b_keeps_few_micro_batches_in_flight(topology, monkeypatch, n_microbatches):
    held: dict[int, list[int]] = {0: [], 1: []}
    original = Stage.forward

    def forward(self, slot, x, context):
        y = original(self, slot, x, context)
        held[self.index].append(len(self._slots))
        return y

    monkeypatch.setattr(Stage, "forward", forward)
    with place_stages(
        make_model(), CUTS["two stages"], topology, loss=lm.loss, n_microbatches=n_microbatches, schedule="1f1b"
    ) as placed:
        placed.step(make_batch())
    assert [max(held[stage]) for stage in (0, 1)] == [min(n_microbatches, 2 - stage) for stage in (0, 1)]


def test_1f1b_leaves_frozen_stages_without_a_backward_pass(topology):
    model, batch = make_model(), make_batch()
    for _, unit in model.layers()[:3]:
        unit.requires_grad_(False)
    expected_loss = reference_step(model, batch, 4)
    expected = gradients(model)
    with place_stages(model, CUTS["two stages"], topology, loss=lm.loss, n_microbatches=4, schedule="1f1b") as placed:
        assert placed.step(batch) == expected_loss
        assert {e.stage for e in placed.last_events if e.phase == "backward"} == {1}
        nats, n_targets = placed.evaluate(batch)
    assert nats / n_targets == expected_loss
    assert_same_bits(gradients(model), expected)


def test_a_failure_in_a_1f1b_step_is_named_and_the_next_step_works(topology, monkeypatch):
    model, batch = make_model(), make_batch()
    expected_loss = reference_step(model, batch, 4)
    gradients(model)
    with place_stages(model, CUTS["two stages"], topology, loss=lm.loss, n_microbatches=4, schedule="1f1b") as placed:
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "backward", lambda *_: 1 / 0)
            with pytest.raises(StageError, match=r"stage 1 .*failed in the backward pass of micro-batch 0"):
                placed.step(batch)
        model.zero_grad()
        assert placed.step(batch) == expected_loss


@pytest.mark.parametrize(
    ("cut", "schedule", "message"),
    [("a device twice", "1f1b", "no order for 'cpu'"), ("two stages", "zigzag", "unknown schedule 'zigzag'")],
)
def test_a_schedule_without_an_order_for_the_stages_is_refused_at_once(topology, cut, schedule, message):
    with pytest.raises(PlacementError, match=message):
        place_stages(make_model(), CUTS[cut], topology, loss=lm.loss, n_microbatches=4, schedule=schedule)


def test_gradients_add_up_over_steps_as_in_torch(topology):
    model, batch = make_model(), make_batch()
    reference_step(model, batch, 4)
    reference_step(model, batch, 2)
    expected = gradients(model)
    with place_stages(model, CUTS["two stages"], topology, loss=lm.loss, n_microbatches=4) as placed:
        placed.step(batch)
        placed.step(batch, n_microbatches=2)
    assert_same_bits(gradients(model), expected)


def test_repeated_steps_are_equal_bit_for_bit(topology):
    model, batch = make_model(), make_batch()
    with place_stages(model, CUTS["both devices twice"], topology, loss=lm.loss, n_microbatches=8) as placed:
        first_loss, first = placed.step(batch), gradients(model)
        for _ in range(5):
            assert placed.step(batch) == first_loss
            assert_same_bits(gradients(model), first)


@pytest.mark.parametrize(
    ("rows", "n_microbatches", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (9, 8, [2, 1, 1, 1, 1, 1, 1, 1]), (8, 5, [2, 2, 2, 1, 1]), (3, 5, [1, 1, 1])],
)
def test_a_batch_is_cut_into_as_many_even_parts_as_there_are_micro_batches(rows, n_microbatches, sizes):
    batch = SimpleNamespace(inputs=torch.arange(rows), targets=torch.arange(rows), context={"row": torch.arange(rows)})
    parts = split(batch, n_microbatches)
    assert [len(part.inputs) for part in parts] == [part.n_targets for part in parts] == sizes
    for key in ("row", "targets"):
        assert torch.equal(torch.cat([part.context[key] for part in parts]), batch.inputs)


class Noting(nn.Module):
    """A linear map that notes the threads it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)
        self.threads: set[int] = set()

    def forward(self, x: Tensor, context: Any) -> Tensor:
        self.threads.add(threading.get_ident())
        return torch.tanh(self.map(x))


class Chained(nn.Module):
    """Any modules as a model."""

    def __init__(self, *units: nn.Module) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def layers(self) -> list[tuple[str, nn.Module]]:
        return [(f"unit{i}", unit) for i, unit in enumerate(self.units)]

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x, {})
        return x


def squared(y: Tensor, targets: Tensor) -> Tensor:
    return ((y - targets) ** 2).mean()


def test_four_forward_passes_run_before_the_first_backward_pass_in_one_thread_a_device(topology):
    model = Chained(Noting(), Noting())
    generator = torch.Generator().manual_seed(0)
    batch = SimpleNamespace(
        inputs=torch.randn(8, 4, generator=generator), targets=torch.randn(8, 4, generator=generator), context={}
    )
    loss = squared(model(batch.inputs), batch.targets)
    loss.backward()
    expected = gradients(model)
    for unit in model.units:
        unit.threads.clear()
    with place_stages(model, [("cpu", 0, 0), ("fake:0", 1, 1)], topology, loss=squared, n_microbatches=4) as placed:
        assert placed.step(batch) == pytest.approx(loss.item(), rel=1e-6)
        events = placed.last_events
    for stage in (0, 1):
        forwards = [e.end_s for e in events if e.stage == stage and e.phase == "forward"]
        backwards = [e.start_s for e in events if e.stage == stage and e.phase == "backward"]
        assert len(forwards) == len(backwards) == 4
        assert max(forwards) <= min(backwards)
    threads = [unit.threads for unit in model.units]
    assert all(len(found) == 1 for found in threads)
    assert len(set.union(*threads, {threading.get_ident()})) == 3
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7)


def test_events_tell_device_stage_and_micro_batch_in_order(topology):
    model, batch = make_model(), make_batch()
    with place_stages(model, CUTS["two stages"], topology, loss=lm.loss, n_microbatches=4) as placed:
        placed.step(batch)
        events = placed.last_events
    assert len(events) == 2 * 2 * 4
    assert {(e.device, e.stage) for e in events} == {("cpu", 0), ("fake:0", 1)}
    for phase, first, second in (("forward", 0, 1), ("backward", 1, 0)):
        ends = {(e.stage, e.microbatch): e for e in events if e.phase == phase}
        for i in range(4):
            assert ends[first, i].end_s <= ends[second, i].start_s  # nothing starts before its input is there
        assert [e.microbatch for e in events if e.phase == phase and e.stage == first] == [0, 1, 2, 3]


def test_an_event_ends_when_its_device_is_done(topology, monkeypatch):
    monkeypatch.setattr(Stage, "sync", lambda _: time.sleep(0.02))  # a device that goes on after the call
    with place_stages(make_model(), [("cpu", 0, 5)], topology, loss=lm.loss, n_microbatches=2) as placed:
        placed.step(make_batch())
        assert len(placed.last_events) == 4
        assert all(event.end_s - event.start_s >= 0.02 for event in placed.last_events)


def test_the_loss_is_the_mean_over_all_targets_that_count(topology):
    model, batch = make_model(), make_batch()
    logits = model.double()(batch.inputs)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
    with place_stages(model, CUTS["two stages"], topology, loss=lm.loss, n_microbatches=4) as placed:
        assert placed.step(batch) == pytest.approx(expected, rel=1e-12)
        nats, n_targets = placed.evaluate(batch)
    assert n_targets == int((batch.targets != -100).sum())
    assert nats / n_targets == pytest.approx(expected, rel=1e-12)


def test_a_micro_batch_without_targets_changes_nothing(topology):
    model, batch = make_model(), make_batch()
    batch.targets[2:4] = -100  # one micro-batch of four
    expected_loss = reference_step(model, batch, 4)
    expected = gradients(model)
    with place_stages(model, CUTS["two stages"], topology, loss=lm.loss, n_microbatches=4) as placed:
        assert placed.step(batch) == expected_loss
    assert_same_bits(gradients(model), expected)


def test_a_batch_without_any_target_is_refused(topology):
    model, batch = make_model(), make_batch()
    batch.targets[:] = -100
    with (
        place_stages(model, CUTS["two stages"], topology, loss=lm.loss) as placed,
        pytest.raises(ValueError, match="no target"),
    ):
        placed.step(batch)


def test_the_context_reaches_every_stage_cut_like_the_batch(topology):
    model = make_model(dropout=0.5)
    batch = make_batch(context={"dropout": torch.arange(B) * 1_000_003 + 5})
    expected_loss = reference_step(model, batch, 4)
    expected = gradients(model)
    plain_loss = reference_step(model, make_batch(), 4)
    model.zero_grad()
    with place_stages(model, CUTS["both devices twice"], topology, loss=lm.loss, n_microbatches=4) as placed:
        assert placed.step(batch) == expected_loss
    assert expected_loss != plain_loss  # the counters did something
    assert_same_bits(gradients(model), expected)


def test_frozen_stages_have_no_backward_pass(topology):
    model, batch = make_model(), make_batch()
    for _, unit in model.layers()[:3]:
        unit.requires_grad_(False)
    reference_step(model, batch, 4)
    expected = gradients(model)
    with place_stages(model, CUTS["two stages"], topology, loss=lm.loss, n_microbatches=4) as placed:
        placed.step(batch)
        assert {e.stage for e in placed.last_events if e.phase == "backward"} == {1}
    assert_same_bits(gradients(model), expected)


def test_a_wholly_frozen_model_still_gives_its_loss(topology):
    model, batch = make_model().requires_grad_(False), make_batch()
    with place_stages(model, CUTS["two stages"], topology, loss=lm.loss, n_microbatches=2) as placed:
        loss = placed.step(batch)
        nats, n_targets = placed.evaluate(batch)
    assert loss == nats / n_targets


def test_calling_a_placed_model_is_plain_autograd(topology):
    model, batch = make_model(), make_batch()
    lm.loss(model(batch.inputs), batch.targets).backward()
    expected = gradients(model)
    with place_stages(model, CUTS["a device twice"], topology, loss=lm.loss) as placed:
        lm.loss(placed(batch.inputs), batch.targets).backward()
    assert_same_bits(gradients(model), expected)


def test_evaluation_leaves_no_gradients(topology):
    model, batch = make_model(), make_batch()
    with place_stages(model, CUTS["two stages"], topology, loss=lm.loss, n_microbatches=4) as placed:
        placed.evaluate(batch)
    assert gradients(model) == {}


def test_state_dict_is_the_unplaced_models(topology):
    model, other = make_model(), make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    with place_stages(model, CUTS["two stages"], topology, loss=lm.loss, n_microbatches=2) as placed:
        assert_same_bits(dict(placed.state_dict()), dict(make_model().state_dict()))
        placed.load_state_dict(other.state_dict())
        found = placed.step(make_batch())
    assert found == reference_step(other, make_batch(), 2)
    assert_same_bits(dict(model.state_dict()), dict(other.state_dict()))


def test_an_optimizer_made_before_or_after_placement_trains_the_same_model(topology):
    losses = []
    for is_early in (True, False):
        model, batch = make_model(), make_batch()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if is_early else None
        with place_stages(model, CUTS["two stages"], topology, loss=lm.loss, n_microbatches=4) as placed:
            optimizer = optimizer or torch.optim.AdamW(placed.parameters(), lr=1e-2)
            for _ in range(4):
                optimizer.zero_grad()
                loss = placed.step(batch)
                optimizer.step()
        losses.append(loss)
    assert losses[0] == losses[1] < 2.7


def test_a_step_with_an_opencl_stage_equals_torchs_within_rounding():
    """The error of the whole gradient, relative to its norm, stays below 100 float32 roundings."""
    try:
        topology = discover(["cpu", "opencl:0"])
    except DeviceError as error:
        pytest.skip(f"no OpenCL device: {error.remedy}")
    model, batch = make_model(), make_batch()
    expected_loss = reference_step(model.double(), batch, 4)
    expected = torch.cat([grad.flatten() for grad in gradients(model).values()])
    model.float()
    results = []
    with place_stages(model, [("cpu", 0, 2), ("opencl:0", 3, 5)], topology, loss=lm.loss, n_microbatches=4) as placed:
        for _ in range(3):
            loss = placed.step(batch)
            results.append((loss, torch.cat([grad.flatten() for grad in gradients(model).values()])))
        nats, n_targets = placed.evaluate(batch)
        assert placed.launches()["opencl:0"]
    for loss, grads in results:
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert (grads.double() - expected).norm() < 100 * torch.finfo(torch.float32).eps * expected.norm()
        assert loss == results[0][0]
        assert torch.equal(grads, results[0][1])  # repeats are equal bit by bit there, too
    assert nats / n_targets == pytest.approx(expected_loss, rel=1e-6)


def greedy(decoder: Any, *, steps: int) -> tuple[Tensor, Tensor]:
    """Tokens and logits of a prompt of 3 tokens in two rows, continued by the likeliest token."""
    tokens, logits, cache = make_batch(2).inputs[:, :3], [], decoder.new_cache(2)
    new, position = tokens, 0
    for _ in range(steps):
        out, cache = decoder.decode(new, cache, torch.tensor(position))
        position += new.shape[1]
        new = out[:, -1].argmax(-1, keepdim=True)
        logits.append(out[:, -1].detach())
        tokens = torch.cat([tokens, new], 1)
    return tokens, torch.stack(logits)


def test_a_placed_model_decodes_on_its_devices():
    model = make_model()
    expected = greedy(model, steps=T - 3)
    chosen = discover(["cpu", "opencl:0"])
    with place_stages(model, [("cpu", 0, 1), ("opencl:0", 2, 5)], chosen, loss=lm.loss) as placed:
        before = Counter(placed.launches().get("opencl:0", {}))
        tokens, logits = greedy(placed, steps=T - 3)
        launched = Counter(placed.launches()["opencl:0"]) - before
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=1e-5, atol=1e-5)
    products = {
        name: sum(n for op, n in launched.items() if op.split("+")[0] == name) / (T - 3)
        for name in ("addmm", "bmm", "mm")
    }
    # A token: two linear maps of each of two MLPs and of the attention, which has four products inside; the head.
    assert products == {"addmm": 6, "bmm": 4, "mm": 1}, launched


def test_a_model_that_can_not_decode_says_which_layer(topology):
    model = Chained(Noting(), Noting())
    placed = place_stages(model, [("cpu", 0, 1)], topology, loss=squared)
    with placed, pytest.raises(StageError, match="layer 'unit0' can't decode"):
        placed.new_cache(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; needs an NVIDIA GPU and torch with CUDA")
def test_a_step_with_a_cuda_stage_equals_torchs_within_rounding():
    topology = discover(["cpu", "cuda:0"])
    model, batch = make_model(), make_batch()
    expected_loss = reference_step(model, batch, 4)
    expected = torch.cat([grad.flatten() for grad in gradients(model).values()])
    with place_stages(
        model, [("cpu", 0, 1), ("cuda:0", 2, 3), ("cpu", 4, 5)], topology, loss=lm.loss, n_microbatches=4
    ) as placed:
        assert placed.step(batch) == pytest.approx(expected_loss, rel=1e-5)
        found = torch.cat([grad.flatten().cpu() for grad in gradients(model).values()])
        nats, n_targets = placed.evaluate(batch)
    assert {parameter.device.type for parameter in model.layers()[2][1].parameters()} == {"cuda"}
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert nats / n_targets == pytest.approx(expected_loss, rel=1e-5)


class Elsewhere:
    """A runtime whose tensors are not the host's: torch's device without memory."""

    def torch_device(self, name: str) -> str:
        return "meta"


class Moved(nn.Module):
    """Notes where it is moved to; there is no way back from "meta"."""

    def to(self, where: torch.device) -> None:
        self.where = where.type


def test_a_stage_moves_its_units_to_its_device_and_back_to_the_host(topology, monkeypatch):
    monkeypatch.setitem(all_backends(), "fake", Elsewhere())
    unit, linear = Moved(), nn.Linear(2, 2)
    for name, where in (("fake:0", "meta"), ("cpu", "cpu")):
        Stage(["unit"], [unit], topology.device(name))
        assert unit.where == where
    Stage(["linear"], [linear], topology.device("fake:0"))
    assert linear.weight.device.type == "meta"


def test_placements_that_are_measured_in_turn_have_a_model_each(topology, monkeypatch):
    models = []
    original = turns.place_stages
    monkeypatch.setattr(
        turns, "place_stages", lambda model, *a, **k: (models.append(model), original(model, *a, **k))[1]
    )
    monkeypatch.setattr(planning.arms, "build", lambda *_: make_model())
    monkeypatch.setattr(planning, "example_batch", lambda *_: make_batch())
    setting = SimpleNamespace(
        config=SimpleNamespace(seeds=[0]),
        corpus=SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=V)),
        topology=topology,
    )
    arrangements = [turns.Arrangement((("cpu", 0, 5),)), turns.Arrangement((("fake:0", 0, 5),))]
    plan = make_plan(make_model(), CUTS["one stage"])
    assert list(measure._interleaved(setting, "baseline", plan, arrangements, 1, {})) == arrangements
    assert len({id(model) for model in models}) == 2
    batches = [gradients(model) for model in models]
    assert_same_bits(batches[0], batches[1])
    reference_step(models[0], make_batch(), 4)
    assert_same_bits(batches[0], gradients(models[0]))  # of the last step alone


def make_plan(
    model: lm.Transformer, stages: list[tuple[str, int, int]], cores: tuple[int, ...] = (), schedule: str = "gpipe"
) -> Plan:
    names = [name for name, _ in model.layers()]
    planned = tuple(PlanStage(d, i, j, tuple(names[i : j + 1]), 1.0, 1.0, 0.1, 0, cores) for d, i, j in stages)
    return Plan(planned, 4, "train_step", schedule, 1.0, 1.0, 0.0, "optimal", "", 0.0, "", (1.0, 1.0), (), (), "")


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_plan_is_placed_with_its_stages_micro_batches_and_schedule(topology, schedule):
    model, batch = make_model(), make_batch()
    plan = make_plan(model, CUTS["two stages"], schedule=schedule)
    with place(model, plan, topology=topology, loss=lm.loss) as placed:
        assert [stage.device.name for stage in placed.stages] == ["cpu", "fake:0"]
        assert placed.schedule == schedule
        assert placed.step(batch) == reference_step(make_model(), batch, 4)
        assert {event.microbatch for event in placed.last_events} == {0, 1, 2, 3}


@pytest.mark.parametrize("is_given", [True, False])
def test_a_plan_runs_on_the_cores_for_which_it_was_priced(is_given):
    host = Topology((Device("cpu", "cpu", "cpu", 2**30, cores=cpu.host_cores()),))
    cores = cpu.host_cores()[-1:]
    plan = make_plan(make_model(), [("cpu", 0, 5)], cores)
    with place(make_model(), plan, topology=host if is_given else None) as placed:
        assert placed.stages[0].device.cores == cores
        assert [worker.call(lambda: os.sched_getaffinity(0)) for worker in placed._workers.values()] == [set(cores)]


@pytest.mark.parametrize("cores", [(10**6,), (*cpu.host_cores(), 10**6)])
def test_a_plan_for_cores_that_are_not_here_is_refused(cores):
    plan = make_plan(make_model(), [("cpu", 0, 5)], cores)
    with pytest.raises(PlacementError, match=r"(?s)other cores of 'cpu'.*expected: cores .*1000000"):
        place(make_model(), plan)


def test_a_plan_for_other_layers_is_refused(topology):
    model = make_model()
    plan = make_plan(model, [("cpu", 0, 4)])
    with pytest.raises(PlacementError, match="another model"):
        place(model, plan, topology=topology)


def test_the_default_loss_is_cross_entropy_over_the_last_dimension():
    model, batch = make_model(), make_batch()
    logits = model(batch.inputs)
    assert torch.equal(token_cross_entropy(logits, batch.targets), lm.loss(logits, batch.targets))
