"""Who may import whom: downwards only, nothing heavy before it is needed, nothing that is not declared."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import staged

Figure = Callable[[str, str], None]

PACKAGE = Path(staged.__file__).parent
PROJECT = PACKAGE.parent / "pyproject.toml"

# From the bottom. A module imports from the layers below its own only; but see BESIDE.
LAYERS: list[set[str]] = [
    {"errors"},
    {"paths", "model", "urls", "_waitout"},
    {"pinning", "states", "planning", "records", "driver", "observers"},
    {"control"},
    {"staging", "commit"},
    {"recovery"},
    {"lifecycle"},
    {"store"},
    {"mirroring"},
    {"arrow", "progress"},
    {"sync"},
    {"cli", "demo", "__main__", "__init__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
FACES = LAYERS[-3] | LAYERS[-2] | LAYERS[-1]

# Imports that are not downwards, each for a reason; one that is no longer there is to be struck off.
BESIDE = {
    ("lifecycle", "arrow"): "the methods that need it load it on use, and name what it hands out",
    ("cli", "demo"): "`staged demo` runs it",
    ("demo", "cli"): "it shows the status as the command does",
    ("__main__", "cli"): "it is the command",
}
# What is imported within functions; all else is imported at the top of a module.
ON_USE = {
    ("pinning", "fcntl"),
    ("lifecycle", "staged.arrow"),
    ("_waitout", "asyncio"),
    ("_waitout", "trio"),
    ("cli", "staged.demo"),
    ("cli", "click"),
    ("cli", "rich"),
}
DRIVERS_MAY = {"driver", "model", "paths", "errors"}
PYARROW_MAY = {"arrow", "demo"}
# Third parties of the modules below the faces, and the extra that brings those of each face.
CORE = {"anyio", "msgspec"}


@dataclass(frozen=True)
class Import:
    """One import: who, what by its full name, where it stands, and whether only a type checker sees it."""

    module: str
    name: str
    line: int
    on_use: bool = False
    for_types: bool = False

    @property
    def ours(self) -> str | None:
        """The name within the package, where it is one of ours."""
        return self.name.removeprefix("staged.") if self.name.startswith("staged.") else None

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name}"


MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
}


def _names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0 and node.module is not None, "imports are absolute"
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        yield inner if inner.removeprefix("staged.") in MODULES else node.module


def _imports(module: str, tree: ast.AST, on_use: bool = False, for_types: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in _names(node):
                if name != "__future__":
                    yield Import(
                        module, name if name != "staged" else "staged.__init__", node.lineno, on_use, for_types
                    )
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(module, node, on_use, True)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(module, node, on_use or inside, for_types)


IMPORTS = [
    found for module, path in MODULES.items() for found in _imports(module, ast.parse(path.read_text(), str(path)))
]


def _downwards(found: Import) -> bool:
    """Whether one of the core's or a face's imports of ours is allowed by its layer."""
    assert found.ours is not None
    return found.ours in LEVEL and LEVEL[found.ours] < LEVEL[found.module]


def test_every_module_has_a_layer_and_every_layer_its_modules() -> None:
    plain = {module for module in MODULES if "." not in module}
    assert plain == set(LEVEL)
    assert {module.partition(".")[0] for module in MODULES if "." in module} == {"drivers", "testing"}


def test_imports_run_downwards_only(figure: Figure) -> None:
    ours = [found for found in IMPORTS if found.ours and found.module in LEVEL]
    other = [found for found in ours if not _downwards(found)]
    assert [str(found) for found in other if (found.module, found.ours) not in BESIDE] == []
    assert {(found.module, found.ours) for found in other} == set(BESIDE), "an exception is no longer needed"
    figure("architecture", f"{len(IMPORTS)} imports of {len(MODULES)} modules, {len(other)} not downwards, by name")
    assert len(ours) > 60


def test_the_independent_modules_import_nothing_of_ours() -> None:
    for module in ("errors", "_waitout"):
        assert [str(found) for found in IMPORTS if found.module == module and found.ours] == []


# Drivers that are another one under other rules.
EXTENDS = {
    ("drivers.onelake", "drivers.adls"),
    ("drivers.open_mirroring", "drivers.adls"),
    ("drivers.open_mirroring", "drivers.onelake"),
}


def test_drivers_import_the_interface_and_their_own_helpers_only() -> None:
    seen = 0
    for found in IMPORTS:
        if found.module.startswith("drivers.") and found.ours and (found.module, found.ours) not in EXTENDS:
            seen += 1
            assert found.ours in DRIVERS_MAY or found.ours == "drivers" or found.ours.startswith("drivers._"), str(
                found
            )
    assert seen > 8
    helpers = {found.module for found in IMPORTS if found.module.startswith("drivers._") and found.ours}
    assert all(
        found.ours in DRIVERS_MAY or str(found.ours).startswith("drivers._")
        for found in IMPORTS
        if found.module in helpers and found.ours
    )


def test_no_module_but_tests_imports_a_driver() -> None:
    bound = [
        str(found)
        for found in IMPORTS
        if not found.module.startswith(("drivers.", "testing.")) and str(found.ours).startswith("drivers")
    ]
    assert bound == []


def test_the_store_names_drivers_that_exist() -> None:
    named = re.findall(r'"staged\.(drivers\.\w+)", "(\w+)"', MODULES["store"].read_text())
    assert named
    for module, name in named:
        classes = [node.name for node in ast.parse(MODULES[module].read_text()).body if isinstance(node, ast.ClassDef)]
        assert name in classes


def test_what_is_shipped_for_testing_stays_below_the_faces() -> None:
    for found in IMPORTS:
        if found.module.startswith("testing"):
            assert found.ours not in FACES, str(found)
        else:
            assert not str(found.ours).startswith("testing"), str(found)


def test_only_the_arrow_face_and_the_demo_import_pyarrow() -> None:
    using = {found.module for found in IMPORTS if found.package == "pyarrow"}
    assert {module for module in using if not module.startswith("testing")} == PYARROW_MAY


def test_what_is_loaded_on_use_is_known_by_name() -> None:
    found = {
        (found.module, found.name if found.ours else found.package)
        for found in IMPORTS
        if found.on_use and found.module in LEVEL
    }
    assert found == ON_USE


def test_types_alone_are_imported_by_the_faces_only_but_for_those_that_arrow_hands_out() -> None:
    below = {
        (found.module, found.ours) for found in IMPORTS if found.for_types and found.module in LEVEL.keys() - FACES
    }
    assert below == {("lifecycle", "arrow")}


def test_only_the_synchronous_face_crosses_from_a_thread_into_the_loop() -> None:
    assert {found.module for found in IMPORTS if found.name == "anyio.from_thread"} == {"sync"}
    assert not [path for path in MODULES.values() if "from anyio import from_thread" in path.read_text()]


def _declared(extra: str | None = None) -> set[str]:
    """The packages that the project declares for its core, or for an extra with what that includes."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    found: set[str] = set()
    for line in lines:
        name, extras = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", line).groups()  # type: ignore[union-attr]
        for included in (extras or "").split(",") if name == "staged" else ():
            found |= _declared(included)
        found.add(name.replace("-", "_"))
    return found - {"staged"}


@pytest.mark.skipif(not PROJECT.exists(), reason="the project's declarations are not installed")
def test_every_third_party_that_is_imported_is_declared() -> None:
    assert _declared() == CORE
    brings = {"arrow": "arrow", "cli": "cli", "__main__": "cli", "demo": "demo"}
    brings |= {
        f"drivers.{name}": "adls"
        for name in ("adls", "onelake", "open_mirroring", "_lake", "_azure", "_blobs", "_cloud")
    }
    brings |= {f"drivers.{name}": "blob" for name in ("azure_blob", "_container", "_blobs", "_azure")}
    brings |= {f"drivers.{name}": "s3" for name in ("s3", "_bucket")}
    brings |= {f"drivers.{name}": "gcs" for name in ("gcs", "_gcs")}
    missing = []
    for found in IMPORTS:
        if found.package in sys.stdlib_module_names or found.ours or found.for_types:
            continue
        extra = "testing" if found.module.startswith("testing") else brings.get(found.module)
        allowed = CORE | (_declared(extra) if extra else set())
        allowed |= {"botocore"} if "boto3" in allowed else set()
        allowed |= {"google"} if "google_cloud_storage" in allowed else set()
        # The packages of one publisher share a namespace.
        allowed |= {name.partition("_")[0] for name in allowed if name.startswith("azure_")}
        # Trio is imported only where it runs already.
        if found.package not in allowed and (found.module, found.package) != ("_waitout", "trio"):
            missing.append(str(found))
    assert missing == []


HEAVY = {
    *("pyarrow", "click", "rich", "trio", "pandas", "polars", "duckdb", "numpy", "fsspec", "opentelemetry"),
    *("aiofiles", "pytest", "hypothesis"),
}


def _loaded(statement: str) -> list[str]:
    """The modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent, timeout=60
    )
    names: list[str] = json.loads(done.stdout)
    return names


def test_importing_the_package_loads_nothing_heavy_and_no_driver(figure: Figure) -> None:
    loaded = _loaded("import staged")
    assert "staged.store" in loaded
    heavy = [name for name in loaded if name.partition(".")[0] in HEAVY or name.startswith("staged.drivers")]
    assert heavy == []
    ours = [name for name in loaded if name.startswith("staged.")]
    assert not {name.removeprefix("staged.") for name in ours} & (FACES - {"__init__"})
    figure("import staged", f"{len(loaded)} modules, {len(ours)} of them ours")


def test_the_command_starts_without_pyarrow_and_without_a_driver() -> None:
    loaded = _loaded("import staged.cli, staged.__main__")
    assert not [name for name in loaded if name.startswith(("pyarrow", "trio", "staged.drivers"))]


def test_opening_a_store_loads_its_own_driver_only() -> None:
    loaded = _loaded("import staged; staged.open_store('memory://x')")
    public = [name for name in loaded if re.fullmatch(r"staged\.drivers\.[a-z]\w*", name)]
    assert public == ["staged.drivers.memory"]


def test_benchmarks_of_the_overhead_run_without_what_other_parts_compare_with() -> None:
    without = """
import runpy, sys
sys.modules |= dict.fromkeys(["aiofiles", "fsspec", "deltalake", "matplotlib", "pyarrow"])
sys.argv = ["benchmarks", "--help"]
try:
    runpy.run_path("benchmarks", run_name="__main__")
finally:
    sys.path.insert(0, "benchmarks")
    import overhead
"""
    ended = subprocess.run(
        [sys.executable, "-c", without], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0 and "{overhead,moves,tables,lakes,s3,gcs,blob}" in ended.stdout, ended.stderr
