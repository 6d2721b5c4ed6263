"""Mutated configurations end as a configuration or as an error that names a place, never otherwise."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import config_file
from experiments.errors import ConfigError

SOURCES = [
    "name: a\nseeds: [0, 1]\nmodel: {n_layer: 2, d_model: 64}\n"
    "train:\n  steps: 10\n  learning_rate: {baseline: 1e-3}\n",
    "name: b\nquantum:\n  unit: block0.mlp\n  n_qubits: 4\n  shots: null\nplan:\n  devices: [cpu, 'opencl:0', aer]\n"
    "sweep:\n  train.steps: [1, 2]\n  model.n_head:\n  - 2\n  - 4\ndata: {split: [0.8, 0.1, 0.1]}\n",
]
TOKENS = [
    "&a", "*a", "<<: *a", "!!python/object/apply:os.system ['true']", "!!binary QQ==", "!!set {a}", "---", "...",
    "%YAML 9.9", "\t", "\0", "\ud800", "é", "- ", "? ", ": ", "{", "}", "[", "]", "|", ">", "'", '"', "# ", "1e999",
    ".nan", ".inf", "0x1F", "1_000", "9" * 5000, "~", "true", "no", "2026-01-01", "=", "\n", "  ", "\r", "\u2028",
    "a" * 2000, "[" * 50, "- - - - - -", "!<tag:x,1:y> 1", "??", "@x", "`x", "? [a, b]\n: 1\n", "sweep: {a: [1]}",
    "[key]", "<number>: 1", "{<mapping>: 1}",
]  # fmt: skip
OVERRIDES = [
    "model.n_layer=3", "train.learning_rate=1e999", "a.b.c=1", "=", "x", "seeds=", "quantum.shots=[", "seeds=[1,2",
    "seeds.x=1", "model=3", "sweep=3", "sweep.train.steps=[1]", "train.learning_rate.hybrid=1", "..=1", "data=null",
]  # fmt: skip
PLACE = re.compile(r"^(fuzz\.yaml(:\d+:\d+)?|override '.*'(:\d+:\d+)?): .", re.DOTALL)


def mutate(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 6)):
        kind, p = rng.randrange(5), rng.randrange(len(text) + 1)
        q = min(len(text), p + rng.randrange(12))
        if kind == 0:
            text = text[:p] + rng.choice(TOKENS) + text[p:]
        elif kind == 1:
            text = text[:p] + text[q:]
        elif kind == 2:
            text = text[:p] + text[p:q] * rng.randint(2, 4) + text[q:]
        elif kind == 3:
            text = text[:p] + chr(rng.choice([rng.randrange(128), rng.randrange(0x500)])) + text[p + 1 :]
        else:
            lines = text.split("\n")
            lines.insert(rng.randrange(len(lines)), rng.choice(lines))
            text = "\n".join(lines)
    return text


def check(rng: random.Random) -> bool:
    """Whether the mutation is still a configuration; anything but that or a placed error fails."""
    text = mutate(rng.choice(SOURCES), rng)
    overrides = [rng.choice(OVERRIDES)] if rng.random() < 0.2 else []
    try:
        loaded = config_file.parse(text, "fuzz.yaml", overrides)
    except ConfigError as error:
        message = error.message
    else:
        again = config_file.parse(config_file.resolved_yaml(loaded.config), "again.yaml").config
        assert again == loaded.config
        return True
    assert PLACE.match(message), (message, text)
    return False


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32))
def test_a_mutated_configuration_never_escapes(seed):
    rng = random.Random(seed)
    for _ in range(8):
        check(rng)


@settings(deadline=None, max_examples=25)
@given(st.text(max_size=60), st.text(max_size=20))
def test_any_text_never_escapes(text, override):
    with pytest.raises(ConfigError) as caught:
        config_file.parse("name: [" + text, "fuzz.yaml", [override])
    assert PLACE.match(caught.value.message)


@pytest.mark.slow
def test_thirty_thousand_mutations_never_escape():
    rng = random.Random(1)
    valid = sum(check(rng) for _ in range(30_000))
    assert 0 < valid < 30_000


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@settings(deadline=None, max_examples=25)
@given(
    NAMES,
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5, unique=True),
    st.floats(1e-9, 1e3),
    st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable()),
)
def test_resolved_yaml_reads_back_to_the_same(name, seeds, rate, path):
    settings_ = {"name": name, "seeds": seeds, "train": {"learning_rate": rate, "tuning": path}}
    config = config_file.load(settings_).config
    assert config_file.parse(config_file.resolved_yaml(config), "again.yaml").config == config
