"""The rules of the house, read from the source: who imports whom, who makes groups, what no module may do.

Every checker is a function from one parsed file to its faults, and is shown a planted fault before it is trusted.
"""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("data", "kernels", "models")  # top-level folders, importable through symlinks in megatron_ds
LIBRARY = ("megatron_ds", *LINKED)
PROGRAMS = ("examples", "tools")

# From the bottom up. A module imports from its own area and from those on lower lines, never sideways or up.
ORDER = (
    ("errors",),
    ("files",),
    ("host", "kernels", "mesh", "shard"),
    ("comm", "config", "rng"),
    ("checkpoint", "data", "deepspeed_json", "layers", "optim", "pipeline"),
    ("models", "zero"),
    ("advice", "convert"),
    ("inference", "planner", "train"),
    ("engine",),
    ("integrations", "testing"),
    PROGRAMS,
)
# Tighter than the order: what these areas may import besides themselves.
ONLY = {
    "data": {"errors", "files"},  # it gets dp_rank and dp_size as numbers
    "deepspeed_json": {"errors", "files", "config"},  # from one kind of settings to another
    "kernels": {"errors"},
    "layers": {"errors", "kernels", "mesh", "shard", "comm", "rng"},  # sizes and a group, not the config of the run
}
# What no order says: these get the model as an argument.
NEVER = {"train": {"models", "layers"}, "zero": {"models", "layers"}, "pipeline": {"models", "layers"}}
# But for recipes, which the run's precision gives to the layers of whatever model it got.
EXCEPT = {("train", f"megatron_ds.layers.float8_{what}") for what in ("layers", "recipe")}

Checker = Callable[[str, ast.Module], Iterator[str]]


def sources(*folders: str) -> list[str]:
    """Paths of Python files below the folders, from the root, each once: a symlinked folder counts as what it is."""
    found = []
    for folder in folders:
        for parent, directories, files in os.walk(ROOT / folder):  # does not follow symlinks
            directories[:] = [d for d in directories if d != "__pycache__"]
            found += [str((Path(parent) / file).relative_to(ROOT)) for file in files if file.endswith(".py")]
    return sorted(found)


def area(path_or_module: str) -> str:
    """``zero`` for ``megatron_ds/zero/flat.py``, ``megatron_ds.zero.flat``; ``data`` for ``data/order.py``."""
    parts = path_or_module.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if parts[0] == "megatron_ds" and len(parts) > 1 else parts[0]


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module) of every import wherever it stands; ``from megatron_ds import comm`` counts as its submodule."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import in full"
            module = node.module or ""
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


# --- the checkers -----------------------------------------------------------------------------------------------


def layering(path: str, tree: ast.Module) -> Iterator[str]:
    own = area(path)
    if own == "__init__":
        return
    height = {name: line for line, names in enumerate(ORDER) for name in names}
    if own not in height:
        yield f"{path}: say in tests/test_policy.py where {own!r} stands in ORDER"
        return
    for line, module in imports(tree):
        other = area(module)
        if not module.startswith("megatron_ds.") or other == own:
            continue
        allowed = other in ONLY[own] if own in ONLY else height.get(other, 99) < height[own]
        excepted = any(own == who and f"{module}.".startswith(f"{what}.") for who, what in EXCEPT)
        if not excepted and (not allowed or other in NEVER.get(own, ())):
            yield f"{path}:{line}: {own} must not import {module}"


def data_knows_no_process_group(path: str, tree: ast.Module) -> Iterator[str]:
    if area(path) == "data":
        for line, module in imports(tree):
            if module.startswith("torch.distributed"):
                yield f"{path}:{line}: data gets dp_rank and dp_size as numbers, not {module}"


GROUP_MAKERS = {
    "DeviceMesh",
    "init_device_mesh",
    "init_process_group",
    "new_group",
    "new_subgroups",
    "new_subgroups_by_enumeration",
    "split_group",
}


def groups_come_from_the_mesh(path: str, tree: ast.Module) -> Iterator[str]:
    if path in ("megatron_ds/mesh.py", "megatron_ds/testing.py") or path.startswith("tools/benchmark/"):
        return  # the benchmark runs the peers, which make their own
    from_mesh = {module.rsplit(".", 1)[1] for _, module in imports(tree) if module.startswith("megatron_ds.mesh.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            # A dry run's group stands for no other process.
            fake = any(isinstance(a, ast.Constant) and a.value == "fake" for a in node.args)
            if name in GROUP_MAKERS and not fake and not (isinstance(function, ast.Name) and name in from_mesh):
                yield f"{path}:{node.lineno}: {name}() belongs in megatron_ds/mesh.py"


MUTATORS = {
    *("append", "extend", "insert", "remove", "pop", "popitem", "clear", "sort", "reverse"),
    *("add", "discard", "update", "setdefault", "appendleft", "popleft", "__setitem__"),
}
CONTAINERS = {"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict", "WeakKeyDictionary"}


def _is_container(value: ast.expr | None) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    if isinstance(value, ast.Call):
        function = value.func
        return (function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")) in CONTAINERS
    return False


def no_module_state(path: str, tree: ast.Module) -> Iterator[str]:
    """Module-level containers are constants: named as such, and never changed in their file. No ``global``."""
    names = set()
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and _is_container(statement.value):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for name in (t.id for t in targets if isinstance(t, ast.Name)):
                names.add(name)
                if name != name.upper() and name != "__all__":
                    yield f"{path}:{statement.lineno}: {name} is module state; make it an argument, or a CONSTANT"
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.stmt | ast.expr)):
        changed: ast.expr | None = None
        if isinstance(node, ast.Global):
            yield f"{path}:{node.lineno}: `global {', '.join(node.names)}`"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            changed = node.func.value
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed = node.value
        elif isinstance(node, ast.AugAssign):
            changed = node.target
        if isinstance(changed, ast.Name) and changed.id in names:
            yield f"{path}:{node.lineno}: the constant {changed.id} is changed"


def no_environment_inside_a_model(path: str, tree: ast.Module) -> Iterator[str]:
    if area(path) not in ("layers", "models", "optim", "pipeline", "zero"):
        return
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Attribute | ast.Name)):
        if (node.attr if isinstance(node, ast.Attribute) else node.id) in ("environ", "getenv"):
            yield f"{path}:{node.lineno}: the environment is read at the program's edge, not here"


def no_bare_imports(path: str, tree: ast.Module) -> Iterator[str]:
    for line, module in imports(tree):
        if module.split(".")[0] in LINKED:
            yield f"{path}:{line}: import megatron_ds.{module}: the bare name may be another package"


PICKLED_MESSAGES = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "send_object_list",
    "recv_object_list",
}
EXECUTABLE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
OTHERS_PICKLES = ("megatron_ds/convert/folder.py", "megatron_ds/integrations/deepspeed/their_checkpoint.py")
WRITES_PICKLES = "megatron_ds/integrations/deepspeed/utils/zero_to_fp32.py"


def nothing_executable_is_loaded(path: str, tree: ast.Module) -> Iterator[str]:
    if path == "megatron_ds/testing.py":
        return  # results of its own child processes
    for line, module in imports(tree):
        if module.split(".")[0] in EXECUTABLE or module in ("torch.load", "torch.save"):
            yield f"{path}:{line}: {module} can run code that a file holds"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            yield f"{path}:{node.lineno}: {node.func.id}()"
        weights_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        if path in OTHERS_PICKLES and weights_only:
            continue  # files that others publish in no other form, by the reader that runs none of their code
        if ast.unparse(node.func).split(".")[-1] in PICKLED_MESSAGES and area(path) != "tools":
            yield f"{path}:{node.lineno}: {ast.unparse(node.func)}() is a pickle; use comm.together.exchange"
        if path == WRITES_PICKLES and ast.unparse(node.func) == "torch.save":
            continue  # the tensors of pytorch_model.bin, for programs that read nothing else
        if ast.unparse(node.func) in ("torch.load", "torch.save", "torch.jit.load"):
            yield f"{path}:{node.lineno}: {ast.unparse(node.func)}() is a pickle"
        if any(k.arg == "allow_pickle" and not _is_false(k.value) for k in node.keywords):
            yield f"{path}:{node.lineno}: allow_pickle"


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


# Autograd functions whose backward is made of differentiable operations alone, so that second derivatives are right:
# the first two are tested in tests/kernels/interpreted_cases.py; the third passes gradients on.
TWICE_DIFFERENTIABLE = {"_Rotary", "_DropoutAdd", "AfterBackward"}


def second_derivatives_are_decided(path: str, tree: ast.Module) -> Iterator[str]:
    """A backward pass written by hand refuses to be differentiated, or is known to be right."""
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        if not any(ast.unparse(base).split(".")[-1] == "Function" for base in node.bases):
            continue
        methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
        marks = [ast.unparse(d) for m in ("backward", "vjp") if m in methods for d in methods[m].decorator_list]
        if node.name not in TWICE_DIFFERENTIABLE and marks != ["staticmethod", "first_derivative_only"]:
            yield f"{path}:{node.lineno}: mark {node.name}.backward with @first_derivative_only (kernels/autograd.py)"


# What only one kind of machine gains by, and the one package that asks it.
DOORS = {"megatron_ds/comm/local": "megatron_ds/comm"}


def one_door(path: str, tree: ast.Module) -> Iterator[str]:
    """Outside of such a folder nobody names what it defines; the package above it imports the folder itself alone."""
    for folder, neighbours in DOORS.items():
        door = folder.replace("/", ".")
        if path.startswith(f"{folder}/"):
            continue
        for line, module in imports(tree):
            through = path.startswith(f"{neighbours}/") and module == door
            if f"{module}.".startswith(f"{door}.") and not through:
                yield f"{path}:{line}: {module} is behind {neighbours}: ask that"
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.Name | ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in _classes_in(folder):
                yield f"{path}:{node.lineno}: {name} is behind {neighbours}: ask that"


CPU_ONLY = {"mkldnn", "mallopt", "malloc_trim"}


def cpu_routes_have_one_home(path: str, tree: ast.Module) -> Iterator[str]:
    """oneDNN's private products and the allocator's settings are asked for in kernels/cpu alone."""
    if not path.startswith("kernels/cpu/"):
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.Attribute)):
            if node.attr in CPU_ONLY:
                yield f"{path}:{node.lineno}: {node.attr} belongs in kernels/cpu"


MOST_LINES, MOST_ARGUMENTS = 60, 10
# Whose arguments another library names, or the schema of an operator, which knows no objects.
NAMED_ELSEWHERE = {
    "auto_values",
    "kernels/triton/adamw.py:adamw_",
    "kernels/triton/norm_backward.py:norm_backward",
    "kernels/triton/sparse_attention.py:backward",
    "megatron_ds/integrations/deepspeed/start.py:initialize",
    "variable",
}


def functions_are_short(path: str, tree: ast.Module) -> Iterator[str]:
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
        lines = (node.end_lineno or 0) - node.lineno + 1
        if lines > MOST_LINES:
            yield f"{path}:{node.lineno}: {node.name} has {lines} lines, more than {MOST_LINES}: name its parts"


def argument_lists_are_short(path: str, tree: ast.Module) -> Iterator[str]:
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
        if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
            continue  # a kernel has no objects
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
        if count > MOST_ARGUMENTS and not NAMED_ELSEWHERE & {node.name, f"{path}:{node.name}"}:
            yield f"{path}:{node.lineno}: {node.name} takes {count} arguments, more than {MOST_ARGUMENTS}: name a group"


@functools.cache
def _classes_in(folder: str) -> set[str]:
    trees = [ast.parse((ROOT / path).read_text()) for path in sources(folder)]
    names = (node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    return {name for name in names if not name.startswith("_")}


EVERYWHERE = (*LIBRARY, *PROGRAMS)
RULES: list[tuple[Checker, tuple[str, ...]]] = [
    (layering, EVERYWHERE),
    (data_knows_no_process_group, EVERYWHERE),
    (groups_come_from_the_mesh, EVERYWHERE),
    (no_module_state, LIBRARY),
    (no_environment_inside_a_model, LIBRARY),
    (no_bare_imports, (*EVERYWHERE, "tests")),
    (nothing_executable_is_loaded, EVERYWHERE),
    (second_derivatives_are_decided, EVERYWHERE),
    (one_door, EVERYWHERE),
    (cpu_routes_have_one_home, LIBRARY),
    (functions_are_short, EVERYWHERE),
    (argument_lists_are_short, LIBRARY),
]


@pytest.mark.parametrize(("rule", "folders"), RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_sources_keep_the_rule(rule: Checker, folders: tuple[str, ...]) -> None:
    paths = sources(*folders)
    assert len(paths) > 30, f"only {len(paths)} files found below {ROOT}: the rule was not checked"
    faults = [fault for path in paths for fault in rule(path, ast.parse((ROOT / path).read_text()))]
    assert not faults, "\n".join(faults)


PLANTED = [
    (layering, "megatron_ds/zero/flat.py", "from megatron_ds.models.gpt import GPT", "zero must not import"),
    (layering, "megatron_ds/pipeline/stage.py", "import megatron_ds.layers.norms", "pipeline must not import"),
    (
        layering,
        "megatron_ds/train/step.py",
        "def f():\n    from megatron_ds.models import gpt",
        "train must not import",
    ),
    (layering, "megatron_ds/layers/mlp.py", "from megatron_ds import config", "layers must not import"),
    (layering, "megatron_ds/mesh.py", "from megatron_ds import comm", "mesh must not import"),
    (layering, "data/loader.py", "from megatron_ds.mesh import Mesh", "data must not import"),
    (layering, "kernels/norm.py", "from megatron_ds.comm import Pending", "kernels must not import"),
    (layering, "models/gpt.py", "from megatron_ds.train import step", "models must not import"),
    (layering, "megatron_ds/newcomer.py", "", "where 'newcomer' stands"),
    (data_knows_no_process_group, "data/loader.py", "from torch import distributed", "not torch.distributed"),
    (
        groups_come_from_the_mesh,
        "megatron_ds/comm/collectives.py",
        "import torch\ntorch.distributed.new_group()",
        "new_group()",
    ),
    (
        groups_come_from_the_mesh,
        "models/gpt.py",
        "from torch.distributed import init_process_group\ninit_process_group('gloo')",
        "init_process_group()",
    ),
    (no_module_state, "megatron_ds/comm/collectives.py", "_cache = {}", "_cache is module state"),
    (no_module_state, "megatron_ds/comm/collectives.py", "_seen: set[int] = set()", "_seen is module state"),
    (
        no_module_state,
        "megatron_ds/comm/collectives.py",
        "TABLE = {}\ndef f():\n    TABLE['a'] = 1",
        "TABLE is changed",
    ),
    (
        no_module_state,
        "megatron_ds/comm/collectives.py",
        "NAMES = []\ndef f():\n    NAMES.append(1)",
        "NAMES is changed",
    ),
    (no_module_state, "megatron_ds/comm/collectives.py", "N = 0\ndef f():\n    global N\n    N = 1", "`global N`"),
    (no_environment_inside_a_model, "models/gpt.py", "import os\nx = os.environ['A']", "program's edge"),
    (no_bare_imports, "examples/demo.py", "from models.gpt import GPT", "import megatron_ds.models.gpt"),
    (no_bare_imports, "tests/test_x.py", "import kernels", "import megatron_ds.kernels"),
    (nothing_executable_is_loaded, "megatron_ds/checkpoint/load.py", "import torch\ntorch.load('x')", "torch.load()"),
    (nothing_executable_is_loaded, "megatron_ds/convert/folder.py", "torch.load('x')", "torch.load()"),
    (nothing_executable_is_loaded, OTHERS_PICKLES[1], "torch.load('x', weights_only=False)", "torch.load()"),
    (nothing_executable_is_loaded, WRITES_PICKLES, "torch.load('x', weights_only=True)", "torch.load()"),
    (nothing_executable_is_loaded, "data/cache.py", "import pickle", "pickle can run code"),
    (nothing_executable_is_loaded, "megatron_ds/zero/gatherer.py", "dist.all_gather_object(a, b)", "is a pickle"),
    (nothing_executable_is_loaded, "data/cache.py", "np.load('x', allow_pickle=True)", "allow_pickle"),
    (
        second_derivatives_are_decided,
        "kernels/x.py",
        "class _Own(autograd.Function):\n    @staticmethod\n    def backward(ctx, grad):\n        return grad",
        "mark _Own.backward",
    ),
    (functions_are_short, "data/x.py", "def f():\n" + "    a = 1\n" * 60, "f has 61 lines"),
    (argument_lists_are_short, "data/x.py", f"def f({', '.join(f'a{i}' for i in range(11))}): ...", "11 arguments"),
    (argument_lists_are_short, "kernels/triton/x.py", f"def f({', '.join('abcdefghijk')}): ...", "11 arguments"),
    (one_door, "megatron_ds/zero/flat.py", "from megatron_ds.comm import local", "is behind megatron_ds/comm"),
    (one_door, "models/gpt.py", "from megatron_ds.comm.local.tokens import PipeOffer", "is behind megatron_ds/comm"),
    (one_door, "megatron_ds/comm/buffers.py", "from megatron_ds.comm.local import arena", "is behind"),
    (one_door, "megatron_ds/train/step.py", "def f(x):\n    return isinstance(x, LocalBuffers)", "LocalBuffers"),
    (cpu_routes_have_one_home, "kernels/norm.py", "torch.ops.mkldnn._linear_pointwise(x, w, b)", "in kernels/cpu"),
    (one_door, "megatron_ds/mesh.py", "import x\nx.arena.SharedArena.create(1, axis)", "SharedArena"),
]


@pytest.mark.parametrize(("rule", "path", "source", "fault"), PLANTED)
def test_each_rule_finds_a_planted_fault(rule: Checker, path: str, source: str, fault: str) -> None:
    found = list(rule(path, ast.parse(source)))
    assert any(fault in text for text in found), found


INNOCENT = [
    (layering, "megatron_ds/train/step.py", "from megatron_ds.zero.optimizer import ZeroOptimizer"),
    (layering, "examples/demo.py", "from megatron_ds.models.gpt import GPT\nfrom megatron_ds.train import step"),
    (
        groups_come_from_the_mesh,
        "megatron_ds/train/launch.py",
        "from megatron_ds.mesh import init_process_group\ninit_process_group('gloo', 0, 1, store)",
    ),
    (
        no_module_state,
        "megatron_ds/comm/collectives.py",
        "TABLE = {'a': 1}\ndef f():\n    own = []\n    own.append(TABLE['a'])",
    ),
    (one_door, "megatron_ds/comm/buffers.py", "from megatron_ds.comm import local\nlocal.open_buffers(a, b, c)"),
    (one_door, "megatron_ds/comm/local/arena.py", "from megatron_ds.comm.local.tokens import Tokens"),
    (cpu_routes_have_one_home, "kernels/cpu/onednn.py", "torch.ops.mkldnn._linear_pointwise(x, w, b)"),
    (nothing_executable_is_loaded, "megatron_ds/x.py", "module.eval()\nnp.load('x', allow_pickle=False)"),
]


@pytest.mark.parametrize(("rule", "path", "source"), INNOCENT)
def test_no_rule_accuses_the_innocent(rule: Checker, path: str, source: str) -> None:
    assert list(rule(path, ast.parse(source))) == []


# --- rules about files ------------------------------------------------------------------------------------------


def test_no_file_hides_a_second_idea() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in sources(*EVERYWHERE)}
    long = {path: n for path, n in lengths.items() if n > 400}
    assert not long, f"over 400 lines: {long}"


# Modules that are named for what DeepSpeed calls them, for a section of the configuration, or for an op's twin.
SAME_BY_DESIGN = ("kernels/triton/", "megatron_ds/config/", "megatron_ds/integrations/deepspeed/")


def test_no_two_modules_have_one_name() -> None:
    own = [path for path in sources(*LIBRARY) if not path.startswith(SAME_BY_DESIGN)]
    homes: dict[str, list[str]] = {}
    for path in own:
        homes.setdefault(Path(path).name, []).append(path)
    twice = {name: paths for name, paths in homes.items() if len(paths) > 1 and name != "__init__.py"}
    assert not twice, f"a search finds the wrong one: {twice}"


def test_linked_folders_are_relative_symlinks_without_init() -> None:
    for folder in LINKED:
        link = ROOT / "megatron_ds" / folder
        assert link.is_symlink() and os.readlink(link) == f"../{folder}", f"{link} must be a symlink to ../{folder}"
        assert (ROOT / folder).is_dir()
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would make the bare name importable"


def test_test_files_have_names_of_their_own() -> None:
    # Without packages, pytest imports test files by their bare name: two alike would hide one another.
    # (A conftest.py it knows to be one of several.)
    names = Counter(Path(path).name for path in sources("tests") if Path(path).name != "conftest.py")
    assert max(names.values()) == 1, [name for name, count in names.items() if count > 1]


BLOCKED_IMPORTS = """
import importlib, importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers", "starlette", "uvicorn", "prometheus_client"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for name in sys.argv[1:]:
    importlib.import_module(name)
print("imported", len(sys.argv) - 1)
"""


A_STEP = """
import sys
import torch
import megatron_ds
import megatron_ds.inference.llm
import megatron_ds.models.families
import megatron_ds.train.loop
from megatron_ds.config import RunConfig, from_dict, validate
from megatron_ds.mesh import Mesh
from megatron_ds.models.gpt import GPTTask
from megatron_ds.train.build import build

settings = {
    "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "vocab_size": 16, "max_positions": 4},
    "train": {"global_batch": 1, "micro_batch": 1, "sequence_length": 4},
    "data": {"synthetic": True},
}
config = from_dict(RunConfig, settings, "a step")
parts = build(config, Mesh.create(validate(config, 1), torch.device("cpu")), GPTTask(config))
tokens = torch.zeros(1, 4, dtype=torch.int64)
batch = {"tokens": tokens, "labels": tokens, "position_ids": tokens, "loss_mask": tokens == 0}
parts.step([{**batch, "sample_index": tokens[0, :1]}])

engine = megatron_ds.initialize(torch.nn.Linear(2, 1), {"device": "cpu"})
engine.backward(engine(torch.ones(1, 2)).sum())
engine.step()
print(*sorted({"torch._dynamo", "torch._inductor", "triton", "sympy"} & set(sys.modules)))
"""


def test_a_run_that_compiles_nothing_imports_no_compiler() -> None:
    """It comes with 150 MB for every rank, and with seconds at the start; sympy alone with 34 MB."""
    done = subprocess.run([sys.executable, "-c", A_STEP], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == [], done.stderr or done.stdout


def test_everything_imports_without_triton_transformers_and_a_server() -> None:
    # These are about nothing else.
    needed = ("kernels/triton/", "megatron_ds/integrations/", "megatron_ds/inference/openai_server.py")
    paths = [path for path in sources(*LIBRARY) if not path.startswith(needed)]
    modules = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]
    modules = [name if name.startswith("megatron_ds") else f"megatron_ds.{name}" for name in modules]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORTS, *modules], capture_output=True, text=True, cwd="/", timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"imported {len(modules)}"
