"""The shape of the package: arrows point one way, nothing goes in a circle, every module says what it offers."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitfold

ROOT = Path(bitfold.__file__).parent
LARGEST_FILE = 450


def module_name(file: Path) -> str:
    parts = ("bitfold", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}
MODULES = list(FILES)


def imported(name: str) -> Iterator[str]:
    """Modules of bitfold that a module imports, inside functions too, unless for type checkers only."""
    for node in nodes(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            assert node.module is not None
            # `from package import module` needs the module, `from package import thing` the package.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n in FILES else node.module for n in inner]
        else:
            continue
        yield from (n for n in names if n in FILES)


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from nodes(node)


GRAPH = {name: sorted(set(imported(name)) - {name}) for name in MODULES}


def test_the_graph_is_read_right() -> None:
    """Else everything below would hold of nothing."""
    assert "bitfold.numerics" in GRAPH["bitfold.pipeline.block"]
    assert "bitfold.export.native" in GRAPH["bitfold.export"]
    assert sum(map(len, GRAPH.values())) > 200


def test_no_import_goes_in_a_circle() -> None:
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in finished:
            for other in GRAPH[name]:
                visit(other, (*path, name))
            finished.add(name)

    for name in MODULES:
        visit(name, ())


def reachable(start: str) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        for other in GRAPH[waiting.pop()]:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in (f"bitfold.{p}" for p in packages))


# package: what it may reach of bitfold, directly or through others; only what is listed.
MAY_REACH = {
    "errors": (),
    "part": (),
    "version": (),
    "numerics": ("errors",),
    "statistics": ("part",),
    "ranges": ("errors", "numerics", "part"),
    "corrections": ("errors", "numerics", "part", "statistics"),
    "rounding": ("statistics", "errors", "numerics", "part"),
    "transforms": ("errors", "models", "numerics", "part", "statistics"),
    "distillation": ("errors", "numerics", "part"),
    "methods": ("errors", "numerics"),
    "checked": ("errors",),
    "scheme_text": ("checked", "errors", "numerics"),
}
# package: what it must not reach.
MUST_NOT_REACH = {
    "recipe": ("pipeline", "cli", "data", "evaluate", "export", "runtime", "report"),
    "models": ("pipeline", "cli", "report", "recipe", "transforms", "ranges", "rounding"),
    "runtime": ("pipeline", "cli", "report", "recipe", "transforms", "ranges", "rounding"),
    "allocation": (
        *("pipeline", "cli", "report", "recipe", "transforms", "corrections", "rounding"),
        *("export", "data"),
    ),
    "export": (
        *("pipeline", "cli", "report", "recipe", "transforms", "ranges", "rounding", "data"),
        *("evaluate", "runtime"),
    ),
    "data": ("pipeline", "cli", "report", "recipe", "models"),
    "evaluate": ("pipeline", "cli", "report", "recipe"),
    "training": ("cli", "report", "engines"),
    "pipeline": ("cli", "report", "engines"),
    "engines": ("cli", "report"),
}


@pytest.mark.parametrize("package", MAY_REACH)
def test_what_a_package_may_reach(package: str) -> None:
    for name in MODULES:
        if within(name, package):
            others = sorted(
                o for o in reachable(name) if not within(o, package, *MAY_REACH[package])
            )
            assert not others, f"{name} reaches {others}"


@pytest.mark.parametrize("package", MUST_NOT_REACH)
def test_what_a_package_must_not_reach(package: str) -> None:
    for name in MODULES:
        if within(name, package):
            others = sorted(o for o in reachable(name) if within(o, *MUST_NOT_REACH[package]))
            assert not others, f"{name} reaches {others}"


def test_every_package_has_its_rule() -> None:
    """A new one says where it stands; the command line and what it prints may reach everything."""
    packages = {name.split(".")[1] for name in MODULES if name != "bitfold"}
    free = {"cli", "report", "assets", "__main__"}
    assert packages - free <= MAY_REACH.keys() | MUST_NOT_REACH.keys()


@pytest.mark.parametrize("name", MODULES)
def test_all_is_there_and_true(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name} does not say what it is"
    if name == "bitfold.__main__" or len(tree.body) == 1:
        return  # nothing but a docstring, or nothing to import
    module = importlib.import_module(name)
    offered = module.__all__
    assert len(set(offered)) == len(offered)
    assert list(offered) == sorted(offered, key=_isort), f"{name}.__all__ is not sorted"
    for entry in offered:
        assert hasattr(module, entry), f"{name} offers {entry}, which it has not"
    classes_and_functions = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert classes_and_functions <= set(offered), f"{name} has public names that it does not offer"


def _isort(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest: ruff's order of `__all__`."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name


@pytest.mark.parametrize("name", MODULES)
def test_nothing_private_is_imported(name: str) -> None:
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitfold"):
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not private, f"{name} imports {private} of {node.module}"


def test_no_file_is_too_long() -> None:
    lengths = {name: len(file.read_text("utf-8").splitlines()) for name, file in FILES.items()}
    assert not {name: n for name, n in lengths.items() if n > LARGEST_FILE}
