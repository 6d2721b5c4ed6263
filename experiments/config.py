"""What an experiment is: one frozen tree of settings, and the rules that span several of them.

Reading it from YAML with places, overrides and all errors at once: `experiments/config_file.py`. Field docstrings
become the descriptions in the JSON schema (`heteroq schema`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from collections.abc import Iterator

Arm = Literal["baseline", "hybrid", "twin", "frozen", "identity"]
ARMS: tuple[str, ...] = get_args(Arm)

Whole = Annotated[int, Field(strict=True)]
Real = Annotated[float, Field(strict=True)]
Fraction = Annotated[Real, Field(ge=0, lt=1)]
Seed = Annotated[Whole, Field(ge=0, lt=2**31)]
Rate = Annotated[Real, Field(gt=0, le=1e12)]
DeviceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}$")]


class Section(BaseModel):
    """Settings that belong together: unknown keys and non-finite numbers are errors, nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Data(Section):
    """The text to learn."""

    name: str | None = None
    """A known text; `topics`, which every CPython carries, when neither name nor path is given."""
    path: str | None = None
    """A UTF-8 text file; relative to the configuration's folder, else to the working directory."""
    tokenizer: Literal["char", "byte"] = "char"
    """One token a character, or one a byte."""
    split: Annotated[tuple[Fraction, Fraction, Fraction], Field(description="Shares: train, validation, test.")] = (
        0.9,
        0.05,
        0.05,
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") is None and data.get("path") is None:
            return {**data, "name": "topics"}
        return data


class Model(Section):
    """The transformer."""

    family: Literal["gpt", "llama"] = "gpt"
    """gpt: learned positions, LayerNorm, GELU; llama: rotary positions, RMSNorm, SwiGLU, no biases."""
    n_layer: Annotated[Whole, Field(ge=1, le=256)] = 2
    """Blocks of attention and MLP."""
    d_model: Annotated[Whole, Field(ge=1, le=16384)] = 64
    """Width of the residual stream."""
    n_head: Annotated[Whole, Field(ge=1, le=256)] = 4
    """Attention heads; divides d_model."""
    n_kv_head: Annotated[Whole, Field(ge=1, le=256)] | None = None
    """Heads of keys and values, each for several of queries; divides n_head; null: n_head."""
    d_ff: Annotated[Whole, Field(ge=1, le=65536)] | None = None
    """Width of the MLP; null: 4 d_model, in llama 8/3 d_model rounded up to a multiple of 8."""
    norm_eps: Annotated[Real, Field(gt=0, le=1)] | None = None
    """Added to the variance by norms; null: 1e-5."""
    rope_base: Annotated[Real, Field(gt=0, le=1e12)] | None = None
    """Base of the wavelengths of llama's rotary positions; null: 10000."""
    seq_len: Annotated[Whole, Field(ge=1, le=65536)] = 64
    """Tokens of context."""
    dropout: Fraction = 0.0
    """Share of activations that training sets to zero."""

    @field_validator("family", mode="before")
    @classmethod
    def _refuse_encoders(cls, family: Any) -> Any:
        if family == "bert":
            raise PydanticCustomError(
                "encoder",
                "an experiment compares losses of the next token, which an encoder doesn't predict; "
                "expected one of gpt, llama (or train it from Python: lm.train)",
            )
        return family


class Quantum(Section):
    """The residual unit that every arm but the baseline replaces, and the circuit that the hybrid puts there."""

    unit: str
    """Name of the replaced unit: block0.attention, block0.mlp, ..."""
    n_qubits: Annotated[Whole, Field(ge=1, le=64)]
    """Qubits of the circuit: the width of the bottleneck."""
    n_circuit_layers: Annotated[Whole, Field(ge=1, le=256)] = 1
    """Repetitions of the trainable part."""
    simulator: Literal["aer", "torch", "qiskit.aer", "lightning.qubit", "default.qubit"] = "aer"
    """What runs the circuits."""
    shots: Annotated[Whole, Field(ge=1, le=10_000_000)] | None = None
    """Measurements a circuit; null: exact expectation values."""
    embedding: Literal["angle"] = "angle"
    """How data enters the circuit."""
    ansatz: Literal["strongly_entangling"] = "strongly_entangling"
    """The trainable part."""


class ArmRates(Section):
    """One learning rate for each arm."""

    baseline: Rate | None = None
    hybrid: Rate | None = None
    twin: Rate | None = None
    frozen: Rate | None = None
    identity: Rate | None = None


# A union's errors carry the name of the branch; these can't be keys of a configuration.
BRANCHES = ("<number>", "<mapping>")


def _branch(value: Any) -> str:
    return BRANCHES[isinstance(value, (dict, ArmRates))]


class Train(Section):
    """AdamW with warm-up and cosine decay."""

    steps: Annotated[Whole, Field(ge=1, le=100_000_000)] = 300
    batch_size: Annotated[Whole, Field(ge=1, le=65536)] = 16
    """Sequences a step."""
    learning_rate: Annotated[
        Annotated[Rate, Tag(BRANCHES[0])] | Annotated[ArmRates, Tag(BRANCHES[1])],
        Discriminator(_branch),
        Field(description="One number, or a mapping from arm to number."),
    ] = 3e-3
    tuning: str | None = None
    """How the learning rates were found, with the budget of each arm; kept in the record."""
    warmup_steps: Annotated[Whole, Field(ge=0)] = 20
    """Steps in which the learning rate rises from 0; a training that is shorter than these never ends to rise."""
    min_lr_ratio: Annotated[Real, Field(ge=0, le=1)] = 0.1
    """Last learning rate over the highest one."""
    weight_decay: Annotated[Real, Field(ge=0, le=10)] = 0.1
    grad_clip: Annotated[Real, Field(gt=0, le=1e6)] | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    eval_every: Annotated[Whole, Field(ge=1)] = 100
    """Steps between validations on the whole split."""
    checkpoint_every: Annotated[Whole, Field(ge=1)] = 100
    """Steps between checkpoints."""

    def rate(self, arm: str) -> float:
        """The learning rate of an arm."""
        rates = self.learning_rate
        return float(getattr(rates, arm)) if isinstance(rates, ArmRates) else rates


class Plan(Section):
    """Where the layers may run, and what a good placement is."""

    devices: Annotated[tuple[DeviceName, ...], Field(min_length=1)] | None = ("cpu", "aer")
    """Names as `heteroq devices` lists them; null, and the default with a topology: all there are."""
    objective: Literal["train_step", "latency", "throughput", "energy", "dollars"] = "train_step"
    schedule: Literal["gpipe", "1f1b"] = "gpipe"
    """Order of a step's passes: 1f1b holds fewer micro-batches in memory."""
    n_microbatches: Annotated[Whole, Field(ge=1, le=1024)] = 4
    """Parts of a batch that are on their way at the same time; divides batch_size."""
    topology: str | None = None
    """A file of devices to plan for instead of those here; simulated ones can't run anything."""
    contiguous: Annotated[bool, Field(strict=True)] | None = None
    """Whether a device takes one run of consecutive layers; null: if such a plan exists, otherwise several runs."""
    pins: dict[str, DeviceName] = {}
    """Layer name -> device it has to run on."""
    colocate: tuple[tuple[str, ...], ...] = ()
    """Groups of layers that belong on one device."""
    recompute: Literal["never", "allowed"] = "never"
    """Whether layers may drop what they save and run again in their backward pass, where memory asks for it."""
    alternative_steps: Annotated[Whole, Field(ge=0, le=10_000)] = 20
    """Steps for which the plan and each single device are measured, in turn, before training; 0: not measured."""

    @model_validator(mode="before")
    @classmethod
    def _take_all_of_a_file(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("topology") is not None and "devices" not in data:
            return {**data, "devices": None}
        return data


class Comparison(Section):
    """What is compared, fixed before the run."""

    metric: Literal["test_loss", "val_loss"] = "test_loss"
    margin: Annotated[Real, Field(gt=0)] | None = None
    """A difference below this counts as none [nat/token]; null: equivalence isn't tested."""
    alpha: Annotated[Real, Field(gt=0, lt=0.5)] = 0.05
    """Probability of a false claim over all comparisons."""


class Config(Section):
    """One experiment, completely."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Names the run folder: letters, digits, '.', '_' and '-'."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=40)] = (0,)
    """Each arm is trained once with each seed; at least ten for a claim."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = ("baseline",)
    """Which models are trained; all five when there is a quantum section."""
    data: Data = Data(name="topics")
    model: Model = Model()
    quantum: Quantum | None = None
    train: Train = Train()
    plan: Plan = Plan()
    comparison: Comparison = Comparison()
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Dotted key -> values; every combination is one run."""

    @model_validator(mode="before")
    @classmethod
    def _fill_arms(cls, data: Any) -> Any:
        if isinstance(data, dict) and "arms" not in data and data.get("quantum") is not None:
            return {**data, "arms": list(ARMS)}
        return data


def layer_names(model: Model) -> list[str]:
    """The names of `lm.Transformer.layers()` for this model."""
    blocks = [f"block{i}.{part}" for i in range(model.n_layer) for part in ("attention", "mlp")]
    return ["embedding", *blocks, "head"]


# A rule yields (paths, text): the settings that it concerns, the one to blame first.
Complaint = tuple[tuple[tuple[str | int, ...], ...], str]


def complaints(config: Config) -> Iterator[Complaint]:
    """What is wrong between settings that are each right by themselves."""
    yield from _duplicates(config)
    yield from _data_rules(config.data)
    yield from _model_rules(config)
    yield from _arm_rules(config)
    yield from _device_rules(config)


def _duplicates(config: Config) -> Iterator[Complaint]:
    lists = ((("seeds",), config.seeds), (("arms",), config.arms), (("plan", "devices"), config.plan.devices or ()))
    for path, values in lists:
        for i, value in enumerate(values):
            if value in values[:i]:
                yield ((*path, i),), f"{value} is listed twice"


def _data_rules(data: Data) -> Iterator[Complaint]:
    if data.name is not None and data.path is not None:
        yield (("data", "path"), ("data", "name")), "both a name and a path are given; leave one out"
    total = sum(data.split)
    if abs(total - 1) > 1e-9 or min(data.split) <= 0:
        yield (("data", "split"),), f"the three shares have to be above 0 and add up to 1, found {total:g}"


def _model_rules(config: Config) -> Iterator[Complaint]:
    model, train, plan = config.model, config.train, config.plan
    if model.d_model % model.n_head:
        paths = (("model", "n_head"), ("model", "d_model"))
        yield paths, f"{model.n_head} heads don't divide d_model = {model.d_model}"
    elif model.family == "llama" and model.d_model // model.n_head % 2:
        text = f"rotary positions need heads of even width, found {model.d_model // model.n_head}"
        yield (("model", "n_head"), ("model", "d_model"), ("model", "family")), text
    if model.n_kv_head is not None and model.n_head % model.n_kv_head:
        paths = (("model", "n_kv_head"), ("model", "n_head"))
        yield paths, f"{model.n_kv_head} heads of keys and values don't divide n_head = {model.n_head}"
    if model.rope_base is not None and model.family != "llama":
        paths = (("model", "rope_base"), ("model", "family"))
        yield paths, f"family '{model.family}' has no rotary positions; 'llama' does"
    if train.batch_size % plan.n_microbatches:
        paths = (("plan", "n_microbatches"), ("train", "batch_size"))
        yield paths, f"{plan.n_microbatches} micro-batches don't divide train.batch_size = {train.batch_size}"


def _arm_rules(config: Config) -> Iterator[Complaint]:
    quantum, rates = config.quantum, config.train.learning_rate
    for i, arm in enumerate(config.arms):
        if arm != "baseline" and quantum is None:
            yield (("arms", i), ("quantum",)), f"'{arm}' needs a quantum section that says what to replace"
        if isinstance(rates, ArmRates) and getattr(rates, arm) is None:
            yield (("train", "learning_rate"), ("arms",)), f"no learning rate for arm '{arm}'"
    if quantum is None:
        return
    units = layer_names(config.model)[1:-1]
    if quantum.unit not in units:
        choices = ", ".join(units[:4]) + (", ..." if len(units) > 4 else "")
        yield (("quantum", "unit"), ("model", "n_layer")), f"no unit '{quantum.unit}'; there are {choices}"
    if quantum.simulator != "aer" and quantum.shots is not None:
        yield (
            (("quantum", "shots"), ("quantum", "simulator")),
            f"simulator '{quantum.simulator}' takes no shots; 'aer' does",
        )


def _device_rules(config: Config) -> Iterator[Complaint]:
    plan, quantum = config.plan, config.quantum
    layers = layer_names(config.model)
    for layer, device in plan.pins.items():
        if layer not in layers:
            yield (("plan", "pins", layer), ("model", "n_layer")), f"no layer '{layer}'; there are {', '.join(layers)}"
        if plan.devices is not None and device not in plan.devices:
            yield (("plan", "pins", layer), ("plan", "devices")), f"'{device}' is not in plan.devices"
    for i, group in enumerate(plan.colocate):
        for layer in group:
            if layer not in layers:
                text = f"no layer '{layer}'; there are {', '.join(layers)}"
                yield (("plan", "colocate", i), ("model", "n_layer")), text
    if quantum is None or not {"hybrid", "frozen"} & set(config.arms):
        return
    needed = "aer" if quantum.simulator in ("aer", "qiskit.aer") else "cpu"
    if plan.topology is None and plan.devices is not None and needed not in plan.devices:
        yield (("plan", "devices"), ("quantum",), ("arms",)), f"circuits need the device '{needed}' in this list"
