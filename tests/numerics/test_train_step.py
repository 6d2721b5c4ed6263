"""TrainStep against torch's own training loop in float64: losses, weights, optimizer state, bytes moved, errors."""

from __future__ import annotations

import copy
import dataclasses
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lm
from hetero.opencl import TrainStep
from hetero.opencl.errors import CompileError, NoOpenCLError, OutOfDeviceMemory, UnsupportedOperationError
from hetero.opencl.program import open_device

if TYPE_CHECKING:
    from collections.abc import Callable

# Losses of float32 and float64 runs over some steps, lr <= 0.05: a few hundred roundings of numbers around 1.
LOSS_TOLERANCE = 3e-5
# Weights: Adam divides by a root of second moments, so that a relative error of a small gradient counts whole; models
# here have no gradients that are zero in theory.
WEIGHT_TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def _has_device() -> None:
    try:
        open_device("opencl:0")
    except NoOpenCLError as error:
        pytest.skip(f"no OpenCL here: {error.remedy}")


class Centre(nn.Module):
    """Subtracts a running mean, which it changes in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.mean


class Net(nn.Module):
    """Odd shapes, a tied matrix, a frozen one, a parameter that isn't used, a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 19)
        self.centre = Centre(19)
        self.frozen = nn.Linear(19, 19).requires_grad_(False)
        self.down = nn.Linear(19, 7, bias=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.centre(torch.tanh(self.up(self.table(tokens))))
        return self.down(torch.sigmoid(self.frozen(x))) @ self.table.weight.T


def _batch(seed: int, rows: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(13, (rows,), generator=generator), torch.randint(13, (rows,), generator=generator)


def _two_groups(module: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "lr": 0.02},
    ]


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(_two_groups(m), lr=0.01, betas=(0.8, 0.95)),
    "adam": lambda m: torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=0.01, weight_decay=0.01),
    "adam, maximize": lambda m: torch.optim.Adam([p for p in m.parameters() if p.requires_grad], maximize=True),
    "sgd": lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, weight_decay=0.01),
    "sgd, momentum": lambda m: torch.optim.SGD(_two_groups(m), lr=0.05, momentum=0.9, dampening=0.1),
    "sgd, nesterov": lambda m: torch.optim.SGD(_two_groups(m), lr=0.05, momentum=0.9, nesterov=True),
}


class Pair:
    """The same module and optimizer twice: float32 on the device, float64 in eager torch."""

    def __init__(
        self, kind: str = "adamw", *, clip_norm: float | None = None, memory: str | None = None, n_microbatches: int = 1
    ) -> None:
        self.module = Net()
        self.reference = copy.deepcopy(self.module).double()
        self.optimizer, self.oracle = OPTIMIZERS[kind](self.module), OPTIMIZERS[kind](self.reference)
        self.clip_norm = clip_norm
        self.step = TrainStep(
            self.module,
            nn.functional.cross_entropy,
            self.optimizer,
            n_microbatches=n_microbatches,
            clip_norm=clip_norm,
            memory=memory,
        )

    def advance(self, seed: int, rows: int = 11) -> None:
        """One step of both; their losses have to agree."""
        x, y = _batch(seed, rows)
        value = self.step(x, y)
        self.oracle.zero_grad()
        expected = nn.functional.cross_entropy(self.reference(x), y)
        expected.backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.reference.parameters(), self.clip_norm)
        self.oracle.step()
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert float(value) == pytest.approx(float(expected.detach()), abs=LOSS_TOLERANCE)

    def compare(self) -> None:
        """Weights, buffers and optimizer state."""
        _assert_states_agree(self.step.state_dict(), self.reference.state_dict())
        mine, theirs = self.optimizer.state_dict()["state"], self.oracle.state_dict()["state"]
        assert mine.keys() == theirs.keys()
        for i in theirs:
            _assert_states_agree(mine[i], theirs[i])


def _assert_states_agree(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        if expected is None:
            assert mine[name] is None
            continue
        torch.testing.assert_close(
            mine[name].double(), expected.double(), rtol=WEIGHT_TOLERANCE, atol=WEIGHT_TOLERANCE, msg=name
        )


@pytest.mark.parametrize("memory", [None, "copy"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_equal_torchs(kind: str, memory: str | None) -> None:
    pair = Pair(kind, clip_norm=0.3 if kind in ("adamw", "sgd, momentum") else None, memory=memory)
    counts, op = open_device("opencl:0").counts, "adam" if "adam" in kind else "sgd"
    before = counts[op]
    for seed in range(5):
        pair.advance(seed)
    pair.compare()
    assert counts[op] > before


@pytest.mark.parametrize("memory", [None, "copy"])
def test_gradients_of_micro_batches_add_up(memory: str | None) -> None:
    torch.manual_seed(0)
    config = lm.ModelConfig(n_layer=1, d_model=24, n_head=3, vocab_size=17, seq_len=11, tie_embeddings=True)
    model = lm.Transformer(config, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(model).double()
    step = TrainStep(
        model, lm.loss, torch.optim.SGD(model.parameters(), lr=0.1), n_microbatches=3, clip_norm=0.5, memory=memory
    )
    oracle = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        tokens = torch.randint(17, (6, 12))
        value = step(tokens[:, :-1], tokens[:, 1:])
        oracle.zero_grad()
        expected = lm.loss(reference(tokens[:, :-1]), tokens[:, 1:])
        expected.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        oracle.step()
        assert float(value) == pytest.approx(float(expected.detach()), abs=LOSS_TOLERANCE)
    _assert_states_agree(step.state_dict(), reference.state_dict())


def test_weights_are_packed_once_for_all_micro_batches() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    reference = copy.deepcopy(module).double()
    step = TrainStep(module, nn.functional.mse_loss, torch.optim.SGD(module.parameters(), lr=0.5), n_microbatches=3)
    oracle = torch.optim.SGD(reference.parameters(), lr=0.5)
    x, y = torch.randn(3 * 801, 64), torch.randn(3 * 801, 64)
    for _ in range(2):
        value = step(x, y)
        expected = nn.functional.mse_loss(reference(x.double()), y.double())
        oracle.zero_grad()
        expected.backward()
        oracle.step()
        assert float(value) == pytest.approx(float(expected.detach()), abs=LOSS_TOLERANCE)
    _assert_states_agree(step.state_dict(), reference.state_dict())
    (program,) = step._programs
    packings = [sum(k == "gemm_pack_b" for k in prepared.kernels) for prepared in program._prepared]
    assert packings[0] == 3  # both layers forward, the second one backward
    assert packings[2] == 0


def test_a_batch_that_can_not_be_divided_is_refused() -> None:
    with pytest.raises(CompileError, match="equal micro-batches"):
        Pair(n_microbatches=3).advance(0)


def test_clipping_leaves_small_gradients_alone_and_bounds_large_ones() -> None:
    for clip_norm in (1e-3, 1e3):
        pair = Pair("sgd", clip_norm=clip_norm)
        pair.advance(0)
        pair.compare()


def test_a_step_moves_the_batch_in_and_the_loss_out() -> None:
    pair, device = Pair(memory="copy"), open_device("opencl:0")
    pair.advance(0)
    before = dict(device.bytes_moved)
    pair.advance(1)
    moved = {way: n - before[way] for way, n in device.bytes_moved.items()}
    assert moved == {"h2d": 2 * 11 * 8, "d2h": 4}


def test_on_shared_memory_nothing_is_copied_and_the_module_is_always_current() -> None:
    pair, device = Pair(), open_device("opencl:0")
    before = dict(device.bytes_moved)
    pair.advance(0)
    assert dict(device.bytes_moved) == before
    torch.testing.assert_close(
        pair.module.down.weight.double(), pair.reference.down.weight, atol=WEIGHT_TOLERANCE, rtol=WEIGHT_TOLERANCE
    )


def test_a_new_geometry_goes_on_with_the_same_state() -> None:
    pair = Pair(clip_norm=0.5)
    for seed, rows in enumerate((11, 5, 11, 17)):
        pair.advance(seed, rows)
    pair.compare()


@pytest.mark.parametrize("memory", [None, "copy"])
def test_hyperparameters_are_read_at_every_step(memory: str | None) -> None:
    pair = Pair(memory=memory)
    for seed, lr in enumerate((0.01, 0.001, 0.05)):
        for group in (*pair.optimizer.param_groups, *pair.oracle.param_groups):
            group["lr"], group["weight_decay"] = lr, lr
        pair.advance(seed)
    pair.compare()


@pytest.mark.parametrize("memory", [None, "copy"])
def test_it_goes_on_from_an_optimizers_state_and_hands_it_back(memory: str | None) -> None:
    pair = Pair("adamw", memory=memory)
    pair.advance(0)
    pair.step.close()
    pair.step = TrainStep(pair.module, nn.functional.cross_entropy, pair.optimizer, memory=memory)
    pair.advance(1)
    pair.step.close()
    loss = nn.functional.cross_entropy(pair.module(_batch(2)[0]), _batch(2)[1])
    loss.backward()
    pair.optimizer.step()  # torch's own code takes over
    expected = nn.functional.cross_entropy(pair.reference(_batch(2)[0]), _batch(2)[1])
    pair.oracle.zero_grad()
    expected.backward()
    pair.oracle.step()
    _assert_states_agree(pair.module.state_dict(), pair.reference.state_dict())


def test_a_closed_step_leaves_parameters_with_memory_of_their_own() -> None:
    pair = Pair()
    pair.advance(0)
    with pair.step:
        pass
    for parameter in pair.module.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    with pytest.raises(CompileError, match="closed"):
        pair.step(*_batch(0))


@pytest.mark.parametrize("memory", [None, "copy"])
def test_weights_can_be_loaded_between_steps(memory: str | None) -> None:
    pair = Pair(memory=memory)
    start = copy.deepcopy(pair.module.state_dict())
    pair.advance(0)
    pair.step.load_state_dict(start)
    pair.reference.load_state_dict({name: t.double() if t.is_floating_point() else t for name, t in start.items()})
    pair.advance(1)
    _assert_states_agree(pair.step.state_dict(), pair.reference.state_dict())


def test_on_shared_memory_changes_of_parameters_are_seen() -> None:
    pair = Pair()
    pair.advance(0)
    value = torch.full_like(pair.module.down.weight, 0.25)
    with torch.no_grad():
        pair.module.up.bias.copy_(torch.ones(19))  # in place
        pair.reference.up.bias.copy_(torch.ones(19))
    pair.module.down.weight.data = value  # moved
    pair.reference.down.weight.data = value.double()
    pair.advance(1)
    pair.compare()


def test_one_tensor_as_two_arguments_does_not_bind_later_calls_to_it() -> None:
    module = nn.Linear(3, 3)
    reference = copy.deepcopy(module).double()
    step = TrainStep(module, nn.functional.mse_loss, torch.optim.SGD(module.parameters(), lr=0.1))
    oracle = torch.optim.SGD(reference.parameters(), lr=0.1)
    torch.manual_seed(0)
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    for a, b in ((x, x), (x, y)):
        value = step(a, b)
        expected = nn.functional.mse_loss(reference(a.double()), b.double())
        oracle.zero_grad()
        expected.backward()
        oracle.step()
        assert float(value) == pytest.approx(float(expected.detach()), abs=LOSS_TOLERANCE)


def test_a_gpt_with_tied_embeddings_follows_float64() -> None:
    config = lm.ModelConfig(n_layer=2, d_model=24, n_head=3, vocab_size=17, seq_len=11, tie_embeddings=True)
    model = lm.Transformer(config, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(model).double()
    step = TrainStep(model, lm.loss, torch.optim.AdamW(model.parameters(), lr=1e-2), clip_norm=1.0)
    oracle = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        tokens = torch.randint(17, (3, 12), generator=generator)
        value = step(tokens[:, :-1], tokens[:, 1:])
        oracle.zero_grad()
        expected = lm.loss(reference(tokens[:, :-1]), tokens[:, 1:])
        expected.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        oracle.step()
        assert float(value) == pytest.approx(float(expected.detach()), abs=LOSS_TOLERANCE)
    memory = step.memory()
    assert memory is not None
    assert memory.memory_bytes > 4 * sum(p.nbytes for p in model.parameters())


def test_dropout_follows_the_generator_and_not_the_memory_mode() -> None:
    def losses(memory: str | None, seed: int) -> list[float]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 1))
        step = TrainStep(
            module,
            nn.functional.mse_loss,
            torch.optim.SGD(module.parameters(), lr=0.0),
            generator=torch.Generator().manual_seed(seed),
            memory=memory,
        )
        return [float(step(torch.ones(3, 5), torch.ones(3, 1))) for _ in range(3)]

    first = losses(None, 1)
    assert len(set(first)) == 3
    assert losses(None, 1) == first
    assert losses("copy", 1) == first
    assert losses(None, 2) != first


def _with_limits(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    device = open_device("opencl:0")
    monkeypatch.setattr(device, "capabilities", dataclasses.replace(device.capabilities, **limits))


@pytest.mark.parametrize("memory", [None, "copy"])
def test_buffers_are_cut_where_the_device_limits_them(memory: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_limits(monkeypatch, max_allocation_bytes=2048)
    pair = Pair(clip_norm=0.5, memory=memory)
    for seed in range(3):
        pair.advance(seed)
    pair.compare()


def test_what_does_not_fit_is_refused_with_sizes_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_limits(monkeypatch, memory_bytes=4000)
    with pytest.raises(OutOfDeviceMemory, match=r"frozen\.weight"):
        Pair()
    _with_limits(monkeypatch, memory_bytes=20_000)
    pair = Pair()
    with pytest.raises(
        OutOfDeviceMemory, match=r"bytes on opencl:0, which has 20000[\s\S]* of (table|up|down|frozen|centre|Net)"
    ):
        pair.step(*_batch(0, rows=500))


# --- what may change between calls ------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A setting, a buffer and two layers, of which `deep` decides about the second one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.scale = 1.0
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x: torch.Tensor, deep: bool = True) -> torch.Tensor:
        y = torch.tanh(self.first(x)) * self.scale + self.shift
        return self.second(y) if deep else y


class Regression:
    """`Scaled` trained twice, by TrainStep and by torch in float64."""

    def __init__(self, *, memory: str | None = None) -> None:
        self.module = Scaled()
        self.reference = copy.deepcopy(self.module).double()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.05)
        self.oracle = torch.optim.AdamW(self.reference.parameters(), lr=0.05)
        self.step = TrainStep(self.module, nn.functional.mse_loss, self.optimizer, memory=memory)
        torch.manual_seed(1)
        self.x, self.y = torch.randn(5, 3), torch.randn(5, 3)

    def advance(self, *, deep: bool = True) -> None:
        value = self.step(self.x, deep, self.y)
        self.oracle.zero_grad()
        expected = nn.functional.mse_loss(self.reference(self.x.double(), deep), self.y.double())
        expected.backward()
        self.oracle.step()
        assert float(value) == pytest.approx(float(expected.detach()), abs=LOSS_TOLERANCE)

    def compare(self) -> None:
        _assert_states_agree(self.step.state_dict(), self.reference.state_dict())


def _freeze(module: Scaled) -> None:
    module.first.weight.requires_grad_(False)


def _set_scale(module: Scaled) -> None:
    module.scale = 3.0


@pytest.mark.parametrize("change", [_freeze, _set_scale])
def test_a_changed_setting_makes_another_program(change: Callable[[Scaled], None]) -> None:
    pair = Regression()
    pair.advance()
    change(pair.module)
    change(pair.reference)
    pair.advance()
    pair.advance()
    pair.compare()


@pytest.mark.parametrize("memory", [None, "copy"])
def test_programs_may_train_different_parts_of_the_module(memory: str | None) -> None:
    pair = Regression(memory=memory)
    for deep in (True, False, True, True, False):
        pair.advance(deep=deep)
    pair.compare()


def _double(module: Scaled) -> None:
    module.double()


def _reshape(module: Scaled) -> None:
    module.first.weight.data = torch.zeros(7, 3)


def _replace(module: Scaled) -> None:
    module.first.weight = nn.Parameter(torch.zeros(3, 3))


def _replace_buffer(module: Scaled) -> None:
    module.shift = torch.ones(3)


@pytest.mark.parametrize("change", [_double, _reshape, _replace, _replace_buffer])
def test_a_module_with_other_tensors_is_refused(change: Callable[[Scaled], None]) -> None:
    pair = Regression()
    pair.advance()
    change(pair.module)
    with pytest.raises(CompileError, match="of the module has been"):
        pair.step(pair.x, True, pair.y)


def test_a_parameter_moved_to_other_strides_keeps_its_values() -> None:
    pair = Regression()
    pair.advance()
    for module in (pair.module, pair.reference):
        module.first.weight.data = module.first.weight.data.t().contiguous().t()
    pair.advance()
    pair.compare()


@pytest.mark.parametrize("memory", [None, "copy"])
def test_module_and_optimizer_load_and_give_their_states(memory: str | None) -> None:
    pair = Regression(memory=memory)
    pair.advance()
    states = [copy.deepcopy(part.state_dict()) for part in (pair.module, pair.optimizer)]
    pair.advance()
    pair.module.load_state_dict(states[0])
    pair.optimizer.load_state_dict(states[1])
    fresh = Regression()
    fresh.advance()
    pair.reference, pair.oracle = fresh.reference, fresh.oracle
    pair.advance()
    pair.compare()


def test_a_changed_optimizer_is_refused() -> None:
    module = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step = TrainStep(module, nn.functional.mse_loss, optimizer)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(CompileError, match="optimizer has been changed"):
        step(torch.ones(2, 3), torch.ones(2, 3))


def test_schedulers_count_its_steps() -> None:
    pair = Regression()
    scheduler = torch.optim.lr_scheduler.StepLR(pair.optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.advance()
        scheduler.step()
    assert pair.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def test_an_infinite_norm_makes_no_step_of_finite_gradients() -> None:
    module = nn.Linear(200, 200)
    before = module.weight.detach().clone()
    step = TrainStep(module, lambda y, t: (y * t).sum(), torch.optim.SGD(module.parameters(), lr=1.0), clip_norm=1.0)
    x = torch.zeros(1, 200)
    x[0, 0] = 1e25
    step(x, torch.ones(1, 200))
    assert torch.equal(module.weight, before)  # as torch: the factor is 1 / inf


def test_inference_mode_outside_does_not_get_in() -> None:
    pair = Regression()
    pair.advance()
    with torch.inference_mode():
        pair.step.close()
    nn.functional.mse_loss(pair.module(pair.x), pair.y).backward()
    pair.optimizer.step()


def test_another_thread_may_compile_meanwhile() -> None:
    done = []

    def compile_other() -> None:
        module = nn.Linear(5, 5)
        done.append(torch.compile(module, backend="opencl")(torch.ones(2, 5)).shape)

    def train() -> None:
        pair = Regression()
        pair.advance()
        done.append(pair.x.shape)

    threads = [threading.Thread(target=work, daemon=True) for work in (compile_other, train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(done) == 2


def test_a_loss_of_one_element_and_a_batch_with_gradients_are_taken() -> None:
    module = nn.Linear(3, 1)
    step = TrainStep(module, lambda y, t: (y * t).sum(0), torch.optim.SGD(module.parameters(), lr=0.1))
    x = torch.ones(2, 3, requires_grad=True)
    assert step(x, torch.ones(2, 1)).shape == ()
    assert x.grad is None


def test_what_would_be_ignored_is_refused() -> None:
    module = nn.Linear(3, 3)
    hook = module.weight.register_hook(lambda g: g * 0)
    with pytest.raises(CompileError, match=r"hooks[\s\S]*weight"):
        TrainStep(module, nn.functional.mse_loss, torch.optim.SGD(module.parameters()))
    hook.remove()
    outside = nn.Parameter(torch.ones(3))
    step = TrainStep(module, lambda y, t: (y * outside - t).sum(), torch.optim.SGD(module.parameters()))
    with pytest.raises(CompileError, match="not the module's"):
        step(torch.ones(2, 3), torch.ones(2, 3))


def test_a_closed_step_refuses_everything() -> None:
    pair = Regression()
    pair.step.close()
    pair.step.close()
    for use in (pair.step.state_dict, pair.step.write_back, pair.step.upload):
        with pytest.raises(CompileError, match="closed"):
            use()


def test_what_it_is_not_for_is_refused_by_name() -> None:
    module = nn.Linear(3, 3)
    for optimizer, message in (
        (torch.optim.RMSprop(module.parameters()), "RMSprop"),
        (torch.optim.AdamW(module.parameters(), amsgrad=True), "amsgrad"),
        (torch.optim.AdamW([module.weight]), "bias"),
        (torch.optim.AdamW([*module.parameters(), nn.Parameter(torch.ones(5))]), r"\(5,\)"),
    ):
        with pytest.raises(CompileError, match=message):
            TrainStep(module, nn.functional.mse_loss, optimizer)
    with pytest.raises(CompileError, match="clip_norm"):
        TrainStep(module, nn.functional.mse_loss, torch.optim.SGD(module.parameters()), clip_norm=0.0)
    double = nn.Linear(2, 2).double()
    with pytest.raises(CompileError, match="float32"):
        TrainStep(double, nn.functional.mse_loss, torch.optim.SGD(double.parameters()))


def test_a_loss_that_is_no_number_or_has_no_gradient_is_an_error() -> None:
    module = nn.Linear(3, 3)
    step = TrainStep(module, lambda y, t: y - t, torch.optim.SGD(module.parameters()))
    with pytest.raises(CompileError, match="one number"):
        step(torch.ones(2, 3), torch.ones(2, 3))
    step = TrainStep(module, lambda y, t: t.sum(), torch.optim.SGD(module.parameters()))
    with pytest.raises(CompileError, match="no gradient"):
        step(torch.ones(2, 3), torch.ones(2, 3))


def test_an_operation_without_kernel_is_named_with_its_module() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(2, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.convolution(x)

    module = Images()
    step = TrainStep(module, nn.functional.mse_loss, torch.optim.SGD(module.parameters()))
    with pytest.raises(UnsupportedOperationError, match=r"convolution.*convolution"):
        step(torch.ones(1, 2, 5), torch.ones(1, 2, 3))
