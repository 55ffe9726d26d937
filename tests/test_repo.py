"""The house rules: who may import whom, sizes, configs that load, and a home for every array."""

import ast
import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from ml_collections import ConfigDict

from nca_jax import axes
from nca_jax.config import flatten
from nca_jax.config_check import check_config
from nca_jax.flags import parse_flags
from nca_jax.losses import LOSSES
from nca_jax.model_config import MODELS, TARGETS
from nca_jax.models.decoder import Model
from nca_jax.models.formats import names
from nca_jax.models.lora import Lora
from nca_jax.train_step import TrainState

ROOT = Path(__file__).parent.parent
FOLDERS = ("nca_jax", "configs", "docs", "experiments", "tests", ".ci")
MODULES = sorted((ROOT / "nca_jax").rglob("*.py"))
CONFIG_FILES = sorted((ROOT / "configs").glob("*.py"))

# Every module is in one layer, by its name or its folder's, and imports its own layer and those
# below it. The groups do not know each other; commands are imported by nobody.
GROUPS = ("models", "data", "rewards", "infra", "compiled")
COMMANDS = (
    "train",
    "rounds",
    "precompute",
    "logps",
    "evaluate",
    "generate",
    "inspect",
    "export",
    "prepare",
    "score",
    "aot",
    "lm_eval",
)
LEAVES = (
    "axes",
    "batch",
    "callable",
    "checks",
    "chips",
    "compat",
    "config_arg",
    "field",
    "files",
    "flops",
    "other_names",
    "protocols",
    "signals",
)
LAYERS = (  # from the bottom
    (*LEAVES, "model_config"),
    GROUPS,
    (
        "advice",
        "comparison",
        "evaluators",
        "logprobs",
        "losses",
        "metrics",
        "sampling",
        "train_step",
        "values",
        "wins",
    ),
    ("config", "config_check", "config_doc", "fields", "saved_config", "auto", "flags"),
    ("build",),
    ("params",),
    ("programs", "propose"),
    ("reference", "fit", "reward_model", "rollout"),
    ("start", "one_round", "harness"),
    COMMANDS,
)
MAX_LINES, MAX_LEAVES = 400, 97  # leaves of a config of rounds, which has a section more

FILES_ARGUMENT = {"torch_parity.py": "rows"}  # elsewhere "files"
# Of configs that do not take all of them.
ALGOS = {
    "sft.py": ["likelihood"],
    "reward_model.py": [name for name, loss in LOSSES.items() if "ref_logps" in loss.reads],
}
ONE_LOSS = {"sft.py"}  # of these the config that has no algo

# Layers


def imports(path: Path) -> set[str]:
    """Returns the dotted names of all that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(path: Path) -> set[str]:
    """Returns the modules and groups of nca_jax that a file imports: {"checks", "data"}."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("nca_jax.")}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "nca_jax").parts[0].removesuffix(".py")


def layer_of(part: str) -> int:
    return next(n for n, layer in enumerate(LAYERS) if part in layer)


def test_every_module_is_in_one_layer_of_the_table():
    table = [part for layer in LAYERS for part in layer]
    found = {part_of(path) for path in MODULES} - {"__init__", "__main__"}  # the front doors
    assert sorted(table) == sorted(found)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    part, found = part_of(path), parts_imported(path)
    if part in ("__init__", "__main__"):  # they import what is asked for
        return
    assert not found & set(COMMANDS), "commands are imported by nobody"
    assert max(map(layer_of, found), default=0) <= layer_of(part)
    if part in GROUPS:
        assert not found & set(GROUPS) - {part}, "groups do not know each other"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_data_never_imports_jax_and_flax_stays_in_models(path):
    libraries = {name.split(".")[0] for name in imports(path)}
    assert part_of(path) != "data" or not libraries & {"jax", "jaxlib", "flax"}
    assert part_of(path) == "models" or "flax" not in libraries


# Files


def files_of_the_project() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    paths = [*inside, *ROOT.glob("*")]
    ours = [path for path in paths if path.is_file() and path.name != ".git"]  # of a worktree
    return [path for path in ours if "__pycache__" not in path.parts]


def test_no_file_of_code_or_text_is_two_rooms():
    rooms = [path for path in files_of_the_project() if path.suffix in (".py", ".md")]
    sizes = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in rooms}
    assert {name: size for name, size in sizes.items() if size > MAX_LINES} == {}


def test_no_file_names_a_path_of_one_machine():
    machine_paths = re.compile(rb"(?<![\w.}])/(work|tmp|root|home)/")
    found = [path for path in files_of_the_project() if machine_paths.search(path.read_bytes())]
    assert found == []


# Configs


def load_config(path: Path, arg: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize(
    ("path", "algo"),
    [
        pytest.param(path, algo, id=f"{path.name}-{algo}")
        for path in CONFIG_FILES
        for algo in ALGOS.get(path.name, LOSSES)
    ],
)
def test_every_config_loads_with_every_loss(path, algo):
    files = FILES_ARGUMENT.get(path.name, "files")
    arg = f"{files}=x.jsonl" + ("" if path.name in ONE_LOSS else f",algo={algo}")
    config = load_config(path, arg)
    if not config.model.init_from:
        config.model.name = config.model.name or "tiny"  # for the user to say
    assert config.loss.name == algo
    assert len(flatten(config)) <= MAX_LEAVES
    check_config(config)


@functools.cache
def documented_lines() -> dict[str, list[str]]:
    """Returns {file: lines} of all that tells a user what to type, continued lines joined."""
    documents = [ROOT / "README.md", *CONFIG_FILES, *(ROOT / "nca_jax").glob("*.py")]
    documents += [*(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").rglob("*.md")]
    return {
        str(path.relative_to(ROOT)): re.sub(r"\\\n\s*", " ", path.read_text()).splitlines()
        for path in documents
    }


@functools.cache
def documented_commands() -> list[tuple[str, ...]]:
    """Returns the --config flags of every command line in the docs that names a config file."""
    commands = []
    for lines in documented_lines().values():
        for line in lines:
            flags = re.findall(r"--config(?:\.[\w.]+)?=[^\s`'\"]+", line)
            flags = [flag.rstrip(".,;:)") for flag in flags]
            if any(re.match(r"--config=configs/[a-z]", flag) for flag in flags):
                commands.append(tuple(flags))
    return sorted(set(commands))


@pytest.mark.parametrize("command", documented_commands(), ids=" ".join)
def test_every_documented_config_loads(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, _ = parse_flags(["prog", *command])
    assert len(flatten(config)) <= MAX_LEAVES


def test_every_documented_command_and_flag_exists():
    """`python -m NAME --flag=...`: the module is there, and its source names the flag."""
    wrong = []
    for document, lines in documented_lines().items():
        for line in lines:
            for name, rest in re.findall(
                r"python3? -m ((?:nca_jax|experiments)\.[\w.]+)(.*)", line
            ):
                spec = importlib.util.find_spec(name.rstrip("."))
                source = Path(spec.origin).read_text() if spec else ""
                flags = re.findall(r"\s--(\w+)[= ]", rest.split(" -- ")[0])
                lacks = [x for x in flags if x != "config" and not re.search(rf"\b{x}\b", source)]
                if not spec or lacks:
                    wrong.append((document, name, lacks))
            wrong += [
                (document, file)
                for file in re.findall(r"\bexperiments/[\w/]+\.(?:py|sh|txt|md)\b", line)
                if not (ROOT / file).exists()
            ]
    assert wrong == []


# Arrays

DECODERS = MODELS | {
    "tiny with the head of a reward model": dataclasses.replace(MODELS["tiny"], num_labels=1),
    "tiny with biases": dataclasses.replace(MODELS["tiny"], qkv_bias=True),
    "tiny_moe with biases": dataclasses.replace(MODELS["tiny_moe"], qkv_bias=True),
    "smollm2_135m with biases": dataclasses.replace(MODELS["smollm2_135m"], qkv_bias=True),
}
ADAPTERS = {
    "tiny": Lora(4, 4.0, TARGETS, dora=True),
    "tiny_moe": Lora(4, 4.0, TARGETS),
}


@functools.cache
def train_state_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of the parameters, AdamW's moments and step of a decoder."""
    params = Model(DECODERS[name], ADAPTERS.get(name)).abstract_params()
    opt_state = jax.eval_shape(optax.adamw(1e-5).init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
    return {path: x.shape for path, x in axes.flatten_paths(state).items()}


@pytest.mark.parametrize("name", DECODERS)
def test_every_array_of_a_train_state_has_a_rule(name):
    shapes = train_state_shapes(name)
    specs = {path: axes.param_spec(path, shape) for path, shape in shapes.items()}
    for path, spec in specs.items():
        _, inside, param = path.partition("/mu/")
        if inside:  # a moment lives where its parameter does
            assert spec == specs[f"params/{param}"]


def test_every_rule_is_used():
    used = set()
    for name in DECODERS:
        quantised = axes.flatten_paths(Model(DECODERS[name]).abstract_nf4())
        quantised = {path: x.shape for path, x in quantised.items()}
        for path, shape in (train_state_shapes(name) | quantised).items():
            if shape:
                used.add(next(rule for rule, _ in axes.PARAM_RULES if re.search(rule, path)))
    assert used == {rule for rule, _ in axes.PARAM_RULES}


def test_an_array_without_a_rule_is_refused_by_name():
    with pytest.raises(ValueError, match=r"No rule for 'layers/x/kernel' of shape \(2, 4\)"):
        axes.param_spec("layers/x/kernel", (2, 4))


@pytest.mark.parametrize("name", DECODERS)
def test_the_table_of_names_has_every_parameter(name):
    abstract = axes.flatten_paths(Model(DECODERS[name]).abstract_params())
    assert names.param_shapes(DECODERS[name]) == {path: x.shape for path, x in abstract.items()}
