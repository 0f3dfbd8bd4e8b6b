"""The rules of the house, checked from the syntax tree of the module."""

from __future__ import annotations

import ast
import builtins
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields as fields_of
from functools import lru_cache
from pathlib import Path

import pytest
from conftest import HERE, PROGRAM

import zbackup

CHAPTERS = ["SETTINGS", "ERRORS", "RECORDS", "DISK", "KEYS", "WIRE", "STORE", "KEEP", "NODE", "SWEEP"]
CHAPTERS += ["RESTORE", "REPORT", "COMMANDS"]
BANNER = re.compile(r"# ==== (\d+)\. ([A-Z]+): (.+) ====")
SOURCE = PROGRAM.read_text()
TREE = ast.parse(SOURCE)
Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Comprehension = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


# ---- what the rules are checked with ----


@lru_cache(maxsize=1)
def list_banners() -> list[tuple[int, int, str]]:
    """Return line, number and name of each banner."""
    matches = ((i, BANNER.fullmatch(line)) for i, line in enumerate(SOURCE.splitlines(), 1))
    return [(line, int(match[1]), match[2]) for line, match in matches if match]


def chapter_of(line: int) -> str:
    """Return the name of the chapter that a line stands in; "" before the first."""
    return max(((at, name) for at, _, name in list_banners() if at <= line), default=(0, ""))[1]


def names_bound_by(node: ast.AST) -> set[str]:
    """Return the names that one node binds in its scope."""
    if isinstance(node, (*Function, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return {node.id}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ExceptHandler) and node.name:
        return {node.name}
    return {node.arg} if isinstance(node, ast.arg) else set()


def walk_scope(nodes: list[ast.AST]) -> Iterator[ast.AST]:
    """Yield all nodes of one scope, and the heads of the scopes in it."""
    for node in nodes:
        yield node
        if not isinstance(node, (*Function, ast.ClassDef, ast.Lambda, *Comprehension)):
            yield from walk_scope(list(ast.iter_child_nodes(node)))


def list_bound(nodes: list[ast.AST]) -> set[str]:
    """Return the names that a scope with these nodes binds."""
    return {name for node in walk_scope(nodes) for name in names_bound_by(node)}


def find_free(node: ast.AST, bound: frozenset[str]) -> Iterator[tuple[str, int]]:
    """Yield name and line of each use, in `node`, of a name that `bound` lacks."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in bound:
        yield node.id, node.lineno
    if isinstance(node, (*Function, ast.Lambda)):
        body = node.body if isinstance(node.body, list) else [node.body]
        arguments = list(ast.walk(node.args))
        inside = bound | list_bound([*body, *(a for a in arguments if isinstance(a, ast.arg))])
        head: list[ast.AST] = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        head += [a.annotation for a in arguments if isinstance(a, ast.arg) and a.annotation]
        if isinstance(node, Function):
            head += [*node.decorator_list, *filter(None, [node.returns])]
        for part in head:
            yield from find_free(part, bound)
        for part in body:
            yield from find_free(part, inside)
    elif isinstance(node, ast.ClassDef):
        own = bound | list_bound([*node.body])
        for part in [*node.bases, *node.keywords, *node.decorator_list]:
            yield from find_free(part, bound)
        for part in node.body:
            # A method does not see the names of its class; its annotations and defaults do.
            yield from find_free(part, bound if isinstance(part, Function) else own)
    elif isinstance(node, Comprehension):
        inside = bound | list_bound([generator.target for generator in node.generators])
        for part in ast.iter_child_nodes(node):
            yield from find_free(part, inside)
    else:
        for part in ast.iter_child_nodes(node):
            yield from find_free(part, bound)


@lru_cache(maxsize=1)
def list_definitions() -> dict[str, ast.stmt]:
    """Return the statement at module level that first defines each name."""
    found: dict[str, ast.stmt] = {}
    for statement in TREE.body:
        for name in list_bound([statement]):
            found.setdefault(name, statement)
    return found


@lru_cache(maxsize=1)
def list_uses() -> list[tuple[ast.stmt, str, int]]:
    """Return each use of a module-level name: the statement around it, the name, the line."""
    known = list_definitions()
    return [
        (statement, name, line)
        for statement in TREE.body
        for name, line in find_free(statement, frozenset())
        if name in known
    ]


def find_upward(source: str) -> list[str]:
    """Return the uses of names that are defined at or below the use, as the rule would report them."""
    tree = ast.parse(source)
    first: dict[str, ast.stmt] = {}
    for statement in tree.body:
        for name in list_bound([statement]):
            first.setdefault(name, statement)
    offenders = []
    for statement in tree.body:
        for name, line in find_free(statement, frozenset()):
            itself = first.get(name) is statement and isinstance(statement, (*Function, ast.ClassDef))
            if name in first and first[name].lineno >= statement.lineno and not itself:
                offenders.append(f"line {line}: {name} is defined in line {first[name].lineno}")
    return offenders


def list_functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return all functions and methods, those inside others as well."""
    return [node for node in ast.walk(TREE) if isinstance(node, Function)]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def uses_of_chapter(user: str, owners: set[str]) -> list[str]:
    """Return the uses, in one chapter, of names that others define."""
    known = list_definitions()
    return [
        f"line {line}: {name} of {chapter_of(known[name].lineno)}"
        for statement, name, line in list_uses()
        if chapter_of(statement.lineno) == user and chapter_of(known[name].lineno) in owners
    ]


# ---- the checker itself ----


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    return g()\ndef g(): pass",
        "x: later = 1\nclass later: pass",
        "def f(a: later) -> None: pass\nclass later: pass",
        "def f(a=later): pass\nlater = 1",
        "class A:\n    def f(self):\n        return [later for x in y]\ny = later = 1",
        "class A:\n    later = 1\n    def f(self):\n        return later\nlater = 1",
        "@later\ndef f(): pass\ndef later(f): return f",
        "f = lambda: later\nlater = 1",
        "x = x\n",
    ],
)
def test_checker_finds_upward_use(source: str) -> None:
    assert find_upward(source)


@pytest.mark.parametrize(
    "source",
    [
        "def g(): pass\ndef f():\n    return g()",
        "def f(n):\n    return f(n - 1)",
        "class A:\n    def f(self) -> A:\n        return A()",
        "def f(later):\n    return later\nlater = 1",
        "def f():\n    later = 1\n    return lambda: later\nlater = 1",
        "def f():\n    return [later for later in ()]\nlater = 1",
        "def f():\n    import later\n    return later\nlater = 1",
        "class A:\n    later = 1\n    x = later\nlater = 1",
        "def f(x):\n    return x.later\nlater = 1",
    ],
)
def test_checker_lets_downward_use_pass(source: str) -> None:
    assert find_upward(source) == []


# ---- chapters ----


def test_chapters_in_order_and_once() -> None:
    assert [(number, name) for _, number, name in list_banners()] == list(enumerate(CHAPTERS, 1))
    assert SOURCE.count("# ====") == len(CHAPTERS)


def test_chapters_in_docstring() -> None:
    listed = re.findall(r"^ +(\d+)\. ([A-Z]+) +\S", ast.get_docstring(TREE, clean=False) or "", re.M)
    assert [(int(number), name) for number, name in listed] == list(enumerate(CHAPTERS, 1))


def test_chapters_use_only_those_above() -> None:
    order = ["", *CHAPTERS]
    known = list_definitions()
    pairs = ((line, name, chapter_of(line), chapter_of(known[name].lineno)) for _, name, line in list_uses())
    offenders = [f"line {line}: {name} of {owner}" for line, name, user, owner in pairs if is_below(order, owner, user)]
    assert offenders == []


def is_below(order: list[str], one: str, other: str) -> bool:
    return order.index(one) > order.index(other)


def test_names_used_below_their_definition() -> None:
    assert find_upward(SOURCE) == []


def test_names_all_defined() -> None:
    known = list_definitions().keys() | set(dir(builtins)) | {"__name__", "__file__"}
    unknown = [
        f"line {line}: {name}" for s in TREE.body for name, line in find_free(s, frozenset()) if name not in known
    ]
    assert unknown == []


def test_prints_only_in_commands() -> None:
    lines = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id in ("print", "input"))
            or re.search(r"\bstd(out|err)\b.*\bwrite", ast.unparse(node.func))
        )
    ]
    assert lines and [line for line in lines if chapter_of(line) != "COMMANDS"] == []


def test_clock_only_in_commands() -> None:
    offenders = []
    for node in ast.walk(TREE):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            wrong = "time" in modules
        else:
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            wrong = bool(re.fullmatch(r"time\.\w+|(datetime\.)?(datetime|date)\.(now|utcnow|today)", text))
        if wrong and chapter_of(node.lineno) != "COMMANDS":
            offenders.append(node.lineno)
    assert offenders == []


def test_wire_knows_no_store() -> None:
    assert uses_of_chapter("WIRE", {"STORE", "KEEP"}) == []


def test_node_knows_no_store() -> None:
    assert uses_of_chapter("NODE", {"STORE", "KEEP"}) == []


def test_sweep_knows_no_node() -> None:
    assert uses_of_chapter("SWEEP", {"NODE"}) == []


def test_store_imports_no_zmq() -> None:
    for node in ast.walk(TREE):
        named = isinstance(node, ast.Name) and "zmq" in node.id.lower()
        imported = isinstance(node, (ast.Import, ast.ImportFrom)) and "zmq" in ast.unparse(node)
        if (named or imported) and chapter_of(node.lineno) in ("STORE", "KEEP"):
            pytest.fail(f"line {node.lineno} of STORE or KEEP knows zmq")
    assert uses_of_chapter("STORE", {"WIRE"}) == []


# ---- sizes ----


def test_functions_short() -> None:
    lengths = sorted(map(length, list_functions()))
    assert [f"line {f.lineno}: {f.name}" for f in list_functions() if length(f) > 60] == []
    assert lengths[int(len(lengths) * 0.9)] <= 32
    assert statistics.median(lengths) <= 11


def test_functions_take_few_parameters() -> None:
    offenders = []
    for function in list_functions():
        given = function.args
        all_of_them = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, [given.vararg, given.kwarg])]
        if len([a for a in all_of_them if a.arg not in ("self", "cls")]) > 5:
            offenders.append(f"line {function.lineno}: {function.name}")
    assert offenders == []


def test_classes_short() -> None:
    classes = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
    assert [f"line {c.lineno}: {c.name}" for c in classes if length(c) >= 250] == []


# ---- words and manners ----


def list_undocumented(body: list[ast.stmt], above: str = "") -> Iterator[str]:
    """Yield what is public in a body and lacks a docstring that starts with one sentence."""
    for node in body:
        if isinstance(node, (*Function, ast.ClassDef)) and not node.name.startswith("_"):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if not re.fullmatch(r"[A-Z`].*[^.]\.", first) or re.search(r"\. [A-Z]", first):
                yield f"line {node.lineno}: {above}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from list_undocumented(node.body, f"{node.name}.")


def test_public_functions_and_classes_documented() -> None:
    flat = [node for node in TREE.body if isinstance(node, Function)]
    classes = [node for node in TREE.body if isinstance(node, ast.ClassDef)]
    alone = [ast.ClassDef(c.name, [], [], c.body[:1], [], lineno=c.lineno) for c in classes]
    assert list(list_undocumented([*flat, *alone])) == []


def test_public_methods_documented() -> None:
    classes: list[ast.stmt] = [node for node in TREE.body if isinstance(node, ast.ClassDef)]
    assert list(list_undocumented(classes)) == []


def test_no_bare_except_global_or_assert() -> None:
    offenders = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, (ast.Global, ast.Assert)) or (isinstance(node, ast.ExceptHandler) and node.type is None)
    ]
    assert offenders == []


def test_dataclasses_frozen() -> None:
    found = 0
    for node in ast.walk(TREE):
        if isinstance(node, ast.ClassDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            dataclasses = [text for text in decorators if "dataclass" in text]
            found += len(dataclasses)
            assert all("frozen=True" in text for text in dataclasses), f"line {node.lineno}: {node.name}"
    assert found > 10


def list_defaults() -> dict[str, object]:
    """Return the constants of SETTINGS under "Defaults of flags"."""
    part = SOURCE.partition("# Defaults of flags.\n")[2].partition("# ====")[0]
    names = re.findall(r"^([A-Z_]+) = ", part, re.M)
    return {name: getattr(zbackup, name) for name in names}


def test_settings_are_defaults_of_flags() -> None:
    defaults = list_defaults()
    assert len(defaults) > 15
    helps = [get_help(name) for name in ("server", "node", "drill")]
    sources = {
        statement.target.id: ast.unparse(statement.value)
        for settings in TREE.body
        if isinstance(settings, ast.ClassDef) and settings.name in ("ServerSettings", "NodeSettings")
        for statement in settings.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value
    }
    flags = {"NETWORK": "--network", "EVERY": "--every", "FILE": "--file", "GRACE": "--grace"}  # no fields of settings
    flags.update(MAX_REPACK="--max-repack", DRILL_FILES="--sample", PUBLIC_FILE="--server-key")
    for field, text in sources.items():
        flags.setdefault(text, "--" + field.replace("_", "-"))
    for name, value in defaults.items():
        assert name in flags, f"{name} is the default of no flag"
        told = next(filter(None, (find_default(text, flags[name]) for text in helps)), "").replace(", if there", "")
        assert told in list_spellings(value), f"{flags[name]} has the default {told!r}, {name} is {value!r}"


def list_spellings(value: object) -> set[str]:
    """Return the ways in which a help may write a default."""
    if isinstance(value, str):
        return {value}
    number = float(str(value))
    spans = {f"{number / length:g}{unit}" for unit, length in zbackup.SPANS.items()}
    sizes = {f"{int(number) >> 10 * i}{unit}" for i, unit in enumerate(("", "KiB", "MiB", "GiB", "TiB"))}
    return {str(value), f"{number:g}", f"{number:g} s", *spans, *sizes}


def find_default(text: str, flag: str) -> str:
    """Return the default that a help tells of a flag."""
    match = re.search(rf"^  {flag}\b(?!-).*?(?=^  -|^\S|\Z)", text, re.M | re.S)
    words = " ".join(match[0].split()) if match else ""
    told = re.search(r"\(default:? ([^)]*)\)", words)
    return told[1] if told else ""


def test_settings_fields_are_flags() -> None:
    for settings, role in ((zbackup.ServerSettings, "server"), (zbackup.NodeSettings, "node")):
        text = get_help(role)
        special = {"latest": "--no-latest", "create": "--no-create", "files": "--file"}
        for field in fields_of(settings):
            flag = special.get(field.name, "--" + field.name.replace("_", "-"))
            assert re.search(rf"^  {flag}\b", text, re.M), f"{role} has no {flag}"


# ---- the file as a whole ----


@lru_cache(maxsize=8)
def get_help(command: str) -> str:
    run = subprocess.run([sys.executable, str(PROGRAM), command, "--help"], capture_output=True, text=True, check=True)
    return run.stdout


def test_help_imports_little() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}  # it imports sqlite3
    command = [sys.executable, "-X", "importtime", str(PROGRAM), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in run.stderr.splitlines()}
    assert "argparse" in modules
    assert modules & {"zmq", "sqlite3", "asyncio"} == set()


def test_import_does_nothing() -> None:
    script = """
import ast, importlib, sys, threading, types
path = sys.argv[1]
source = open(path).read()
for node in ast.parse(source).body:  # what it imports may open files; that is not its doing
    if isinstance(node, ast.Import):
        for alias in node.names:
            importlib.import_module(alias.name)
    elif isinstance(node, ast.ImportFrom):
        importlib.import_module(node.module)
code = compile(source, path, "exec", dont_inherit=True)
module = types.ModuleType("zbackup")
sys.modules["zbackup"] = module
events = []
watched = ("open", "socket", "subprocess", "os.", "import", "sqlite3", "_thread")
sys.addaudithook(lambda event, args: events.append((event, args)) if event.startswith(watched) else None)
exec(code, module.__dict__)
threads = threading.active_count()
events = [event for event in events if not (event[0] == "import" and event[1][0] in sys.modules)]
sys.stdout.write(f"{threads} {events} {callable(module.main)}")
"""
    run = subprocess.run([sys.executable, "-c", script, str(PROGRAM)], capture_output=True, text=True, check=True)
    assert run.stdout == "1 [] True"


def test_source_is_python_3_9() -> None:
    ast.parse(SOURCE, feature_version=(3, 9))


def test_top_level_of_repository() -> None:
    run = subprocess.run(["git", "ls-files"], cwd=HERE.parent, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in run.stdout.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible - {"build_pyz.sh", "README.md"} == {"zbackup.py", "tests", "LICENSE"}


# ---- tests/run.sh ----

STUB = """#!/bin/sh
case "$0 $*" in
*pytest*) echo "$*" >> calls; read -r code < codes; sed -i 1d codes; exit "$code" ;;
esac
"""


@pytest.mark.parametrize(
    ("codes", "code", "lots"),
    [
        ((0, 0), 0, ["-n 3", "-m alone"]),
        ((1, 0, 0), 0, ["-n 3", "--last-failed", "-m alone"]),
        ((1, 1), 1, ["-n 3", "--last-failed"]),
        ((1, 5), 5, ["-n 3", "--last-failed"]),
        ((2,), 2, ["-n 3"]),
        ((0, 1), 1, ["-n 3", "-m alone"]),
    ],
    ids=["all pass", "pass alone", "fail again", "none to run again", "not begun", "memory"],
)
def test_run_sh_tries_once_more_what_failed_beside_others(
    tmp_path: Path, codes: tuple[int, ...], code: int, lots: list[str]
) -> None:
    """A copy of it, with programs that end with these codes in place of pytest and the others."""
    for folder in ("tests", "venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("python", "ruff", "mypy"):
        (tmp_path / "venv/bin" / name).write_text(STUB)
        (tmp_path / "venv/bin" / name).chmod(0o700)
    for name in ("tests/run.sh", "tests/requirements.txt", "venv/requirements.done"):
        shutil.copy(HERE / (name[6:] if name.startswith("tests") else "requirements.txt"), tmp_path / name)
    (tmp_path / "codes").write_text("".join(f"{number}\n" for number in codes))
    env = {**os.environ, "ZBACKUP_VENV": "venv"}
    done = subprocess.run(["sh", tmp_path / "tests/run.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [lot in call for lot, call in zip(lots, calls)] == [True] * len(calls) == [True] * len(lots)
    assert all(("-n 3" in call) == (lot == "-n 3") for lot, call in zip(lots, calls))
    assert ("once more, one at a time" in done.stderr) == ("--last-failed" in lots)
