"""Shadow prices and "why not" against exhaustive search over changed inputs that are written here a second time."""

import dataclasses
import itertools
import math

import pytest

from hetero.errors import HeteroError
from hetero.planner import plan
from hetero.planner.sensitivity import sensitivity, why
from tests.property.test_planner_exact import Instance, every_price, random_instance

TOLERANCE = 1e-9
MORE_BYTES = 17
MORE_BANDWIDTH = 150.0


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    """The instances have layers of a few bytes, and hand-overs of a hundred bytes a second."""
    monkeypatch.setattr("hetero.planner.sensitivity.GIB", MORE_BYTES)
    monkeypatch.setattr("hetero.planner.sensitivity.GB", MORE_BANDWIDTH)


def best(x: Instance) -> float:
    return every_price(x)[0]


def more_memory(x: Instance, place: str) -> Instance:
    devices = []
    for device in x.topology.devices:
        home = device.memory_pool or device.name
        devices.append(dataclasses.replace(device, memory_bytes=device.memory_bytes + MORE_BYTES * (home == place)))
    limits = dict(x.max_memory)
    if place in limits:
        has = next(d.memory_bytes for d in devices if d.name == place)
        limits[place] = min(limits[place] + MORE_BYTES, has)
    return dataclasses.replace(x, topology=dataclasses.replace(x.topology, devices=tuple(devices)), max_memory=limits)


def faster(x: Instance, name: str) -> Instance:
    """Pairs with measured times are links of their own; the others are the topology's."""
    ends = set(name.split(" - "))
    if any(set(pair.split("->")) == ends for pair in x.costs.transfers):
        transfers = {
            pair: (latency, bandwidth + MORE_BANDWIDTH * (set(pair.split("->")) == ends))
            for pair, (latency, bandwidth) in x.costs.transfers.items()
        }
        return dataclasses.replace(x, costs=dataclasses.replace(x.costs, transfers=transfers))
    links = tuple(
        dataclasses.replace(link, bandwidth=link.bandwidth + MORE_BANDWIDTH * ({link.source, link.target} == ends))
        for link in x.topology.links
    )
    return dataclasses.replace(x, topology=dataclasses.replace(x.topology, links=links))


def one_more(x: Instance, name: str, alike: list[str]) -> Instance:
    """The device once more: cores 90 and up, the same costs, links and measured times."""
    twin, original = f"another {name}", x.topology.device(name)
    rename = {name: twin}
    devices = (
        *x.topology.devices,
        dataclasses.replace(original, name=twin, cores=tuple(90 + core for core in original.cores)),
    )
    links = [
        dataclasses.replace(
            link, source=rename.get(link.source, link.source), target=rename.get(link.target, link.target)
        )
        for link in x.topology.links
        if name in (link.source, link.target)
    ]
    own = [link for link in x.topology.links if name in (link.source, link.target)]
    same = [link for link in own if {link.source, link.target} - {name} <= set(alike)]
    if same:
        first = min(same, key=lambda link: x.topology.names.index(({link.source, link.target} - {name}).pop()))
        links.append(dataclasses.replace(first, source=name, target=twin))
    elif own and not original.memory_pool:
        links.append(dataclasses.replace(min(own, key=lambda link: link.bandwidth), source=name, target=twin))
    measured = {pair: time for pair, time in x.costs.transfers.items() if name in pair.split("->")}
    transfers = {"->".join(rename.get(end, end) for end in pair.split("->")): t for pair, t in measured.items()}
    if measured:
        to_kin = [measured[f"{name}->{kin}"] for kin in alike if f"{name}->{kin}" in measured]
        between = to_kin[0] if to_kin else min(measured.values(), key=lambda figures: figures[1])
        transfers |= {f"{name}->{twin}": between, f"{twin}->{name}": between}
    layers = tuple(
        dataclasses.replace(layer, times=layer.times | ({twin: layer.times[name]} if name in layer.times else {}))
        for layer in x.costs.layers
    )
    overheads = dict(x.costs.overheads)
    if name in overheads:
        overheads[twin] = dataclasses.replace(overheads[name], crew=None)
    limits = x.max_memory | ({twin: x.max_memory[name]} if name in x.max_memory else {})
    costs = dataclasses.replace(x.costs, layers=layers, overheads=overheads, transfers=x.costs.transfers | transfers)
    topology = dataclasses.replace(x.topology, devices=devices, links=(*x.topology.links, *links))
    return dataclasses.replace(x, costs=costs, topology=topology, max_memory=limits)


def made(x: Instance):
    """The plan; None: there is none."""
    options = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
    try:
        return plan(options.pop("costs"), options.pop("topology"), **options)
    except HeteroError:
        return None


def agrees(answer, expected: float, base: float) -> None:
    if expected == math.inf:
        assert answer.value is None
        assert answer.reason
        assert answer.proof == "optimal"
        return
    assert answer.value == pytest.approx(expected, rel=TOLERANCE, abs=1e-12)
    assert answer.change == pytest.approx(expected - base, rel=1e-6, abs=1e-8 * max(base, 1.0))
    assert answer.proof == "optimal"
    assert answer.lower_bound == pytest.approx(expected, rel=TOLERANCE, abs=1e-12)


def check(seed: int) -> dict[str, int]:
    """All answers about one instance are right; how many of each kind there were, and how many weren't zero."""
    x = random_instance(seed)
    if len(x.costs.layers) > 3:  # with one more device there are too many placements to try them all
        x = dataclasses.replace(x, recompute="never", contiguous=True)
    if seed % 3 == 0:  # every memory just enough or too small by a layer or two
        tight = tuple(dataclasses.replace(d, memory_bytes=min(d.memory_bytes, 45)) for d in x.topology.devices)
        x = dataclasses.replace(x, topology=dataclasses.replace(x.topology, devices=tight), max_memory={})
    found = made(x)
    counts = dict.fromkeys(("memory", "link", "device", "layer", "moved", "impossible"), 0)
    if found is None or found.proof != "optimal":
        return counts
    options = {"max_memory": x.max_memory, "pins": x.pins, "colocate": x.colocate, "recompute": x.recompute}
    answers = sensitivity(x.costs, x.topology, found, **options)
    for answer in answers.memories:
        agrees(answer, best(more_memory(x, answer.subject)), found.value)
    for answer in answers.links:
        agrees(answer, best(faster(x, answer.subject)), found.value)
    names = [answer.subject for answer in answers.devices]
    assert len(set(names)) == len(names)
    for answer in answers.devices:
        kin = [name for name in x.topology.names if name != answer.subject and is_twin(x, answer.subject, name)]
        agrees(answer, best(one_more(x, answer.subject, kin)), found.value)
    for answer in answers.layers:
        layer, device = answer.subject.split("=")
        wanted = {**x.pins, layer: device}
        expected = math.inf if wanted != wanted | x.pins else best(dataclasses.replace(x, pins=wanted))
        agrees(answer, expected, found.value)
        assert why(x.costs, x.topology, found, layer, device, **options) == answer
        counts["impossible"] += answer.value is None
    for answer in (*answers.memories, *answers.links, *answers.devices, *answers.layers):
        counts[answer.kind] += 1
        counts["moved"] += bool(answer.change)
    return counts


def is_twin(x: Instance, a: str, b: str) -> bool:
    """Whether two devices are of one class: as the planner sees it, which tests of their own cover."""
    from hetero.planner.symmetry import classes

    problem = x.problem()
    if not {a, b} <= set(problem.devices):
        return False
    of = classes(problem).of
    return bool(of[problem.devices.index(a)] == of[problem.devices.index(b)])


def test_every_answer_is_the_difference_that_exhaustive_search_finds():
    total = dict.fromkeys(("memory", "link", "device", "layer", "moved", "impossible"), 0)
    for seed in range(40):
        for kind, n in check(seed).items():
            total[kind] += n
    assert min(total.values()) > 4, total


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_every_answer_is_the_difference_that_exhaustive_search_finds_a_thousand_times(block):
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        check(seed)


def test_the_answers_survive_json():
    x = next(x for x in map(random_instance, itertools.count()) if made(x) is not None)
    answers = sensitivity(
        x.costs, x.topology, made(x), max_memory=x.max_memory, pins=x.pins, colocate=x.colocate, recompute=x.recompute
    )
    assert type(answers).from_json(answers.to_json()) == answers
