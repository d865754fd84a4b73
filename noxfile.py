"""Sessions: `nox` tests on the current interpreter; `nox -l` tells of the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "venv"

PYPROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *groups: str) -> None:
    """The project and the dependency groups of pyproject.toml."""
    session.install("-e", ".[adls,blob,gcs,s3,demo,testing]", *nox.project.dependency_groups(PYPROJECT, *groups))


def install_azurite(session: nox.Session) -> None:
    """The server of Azure Blob Storage, where node and npm are there; without it its tests are skipped, and say so."""
    if not (shutil.which("node") and shutil.which("npm")):
        session.log("Without node and npm nothing is tested against Azurite.")
        return
    wanted, installed = (
        Path("tests/azurite", name) for name in ("package-lock.json", "node_modules/.package-lock.json")
    )
    if not installed.exists() or installed.stat().st_mtime < wanted.stat().st_mtime:
        arguments = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", "tests/azurite"]
        session.run("npm", *arguments, external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that must hold, on the current interpreter, in a few minutes."""
    install(session, "test")
    install_azurite(session)
    session.run("pytest", "--numprocesses=2", *session.posargs)


@nox.session
@nox.parametrize("scheduler", ["dagster", "prefect"], ids=["dagster", "prefect"])
def recipes(session: nox.Session, scheduler: str) -> None:
    """The recipes for Dagster and for Prefect, each in an environment of its own."""
    # Prefect 3.8 admits versions of FastAPI that it fails to start with.
    needs = {"dagster": ["dagster>=1.9"], "prefect": ["prefect>=3", "fastapi<0.151"]}[scheduler]
    session.install("-e", ".[arrow]", "polars>=2", "pytest>=8", "blockbuster>=1.5", *needs)
    quiet = {"DAGSTER_DISABLE_TELEMETRY": "yes", "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    home = {"PREFECT_HOME": session.create_tmp()}
    # What they warn of is their own affair.
    session.run("pytest", "-W", "ignore", f"tests/test_recipe_{scheduler}.py", env=quiet | home)


@nox.session
def soak(session: nox.Session) -> None:
    """Kills, losses of power and real processes under strace, a hundred times as many; hours."""
    install(session, "test")
    soaked = ["tests/test_kills.py", "tests/test_syncs.py"]
    session.run("pytest", *(session.posargs or soaked), env={"STAGED_SOAK": "100"})


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    install(session, "test", "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("pyright")


@nox.session
def mutants(session: nox.Session) -> None:
    """Take away, one at a time, the checks that the promises rest on: which test notices?"""
    install(session, "test")
    session.run("python", "tests/mutants.py", *session.posargs)


@nox.session
def map(session: nox.Session) -> None:
    """Explore, and draw what came of it: tests/map.png."""
    install(session, "pictures")
    session.run("python", "tests/map.py", "tests/map.png")


@nox.session
def bench(session: nox.Session) -> None:
    """Ours beside everything else, in a few hours on a quiet machine; `-- --quick` for a first look."""
    install(session, "bench")
    install_azurite(session)
    session.run("python", "benchmarks", *session.posargs)
