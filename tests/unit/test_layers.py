"""A module imports only from modules above it in the reading order of cnn_ray/__init__.py."""

import ast
from pathlib import Path

import cnn_ray

PACKAGE = Path(cnn_ray.__file__).parent
HEAVY = {"ray", "tensorflow", "keras", "openvino", "boto3", "obstore", "fastapi"}


def reading_order() -> list[str]:
    lines = (cnn_ray.__doc__ or "").splitlines()
    return [line.split()[0].removesuffix(".py") for line in lines if line.startswith("    ") and ".py" in line]


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "cnn_ray":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cnn_ray."):
            names.add(str(node.module).removeprefix("cnn_ray."))
    return names


def test_every_module_is_in_the_reading_order():
    assert sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__") == sorted(reading_order())


def test_modules_import_only_from_above():
    order = reading_order()
    for number, name in enumerate(order):
        below = imported_modules(ast.parse((PACKAGE / f"{name}.py").read_text())) & set(order[number:])
        assert not below, f"{name} imports from below: {sorted(below)}"


def test_heavy_packages_are_imported_inside_functions():
    for path in set(PACKAGE.glob("*.py")) - {
        PACKAGE / "serve.py"
    }:  # a deployment is decorated with Ray's own decorator
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {
            (alias.name if isinstance(n, ast.Import) else str(n.module)).split(".")[0] for n in top for alias in n.names
        }
        assert not names & HEAVY, f"{path.name} imports {sorted(names & HEAVY)} at its top"
