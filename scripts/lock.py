"""Keeps the committed `uv.lock` free of download addresses, so that it works behind any package index.

    python3 scripts/lock.py            lock, and stage the index-neutral form for the next commit
    python3 scripts/lock.py --check    does what is staged or committed lock what pyproject.toml
    asks for?

uv writes the addresses of the index it used into `uv.lock`. The committed copy holds file names
instead. `uv run` and `uv sync` take its versions, resolve the addresses again, and write the full
form into the working tree, where it stays: it is never committed. Needs uv and git, and nothing
else.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "uv.lock"
PROJECT = "siglip-port"


def neutral(lock: str) -> str:
    """Takes the addresses out of a lock, and the project itself, which is what makes uv resolve again."""
    lock = re.sub(r'registry = "[^"]*"', 'registry = "pypi"', lock)
    lock = re.sub(r'url = "[^"]*/([^"/]+)"', r'path = "\1"', lock)
    head, *packages = re.split(r"(?m)^(?=\[\[package\]\]$)", lock)
    return head + "".join(
        package for package in packages if f'\nname = "{PROJECT}"\n' not in package
    )


def contents(lock: str) -> set[tuple[str, str, frozenset[str]]]:
    """What a lock fixes: every package's name, version and file hashes."""
    fixed = set()
    for package in tomllib.loads(lock)["package"]:
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        fixed.add(
            (package["name"], package.get("version", ""), frozenset(file["hash"] for file in files))
        )
    return fixed


def run(*command: str) -> str:
    """Runs a command in the project's folder; returns what it prints."""
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def write() -> int:
    """Locks and stages the neutral form."""
    run("uv", "lock", "--quiet")
    LOCK.write_text(neutral(LOCK.read_text(encoding="utf-8")), encoding="utf-8")
    run("git", "add", "uv.lock")
    print("uv.lock: index-neutral form staged")
    return 0


def check() -> int:
    """Compares the staged lock with what uv makes of it."""
    staged = run("git", "show", ":uv.lock")
    if "://" in staged:
        print(
            "uv.lock as staged or committed holds addresses; run: python3 scripts/lock.py",
            file=sys.stderr,
        )
        return 1
    before = LOCK.read_text(encoding="utf-8") if LOCK.exists() else None
    LOCK.write_text(staged, encoding="utf-8")
    try:
        run("uv", "lock", "--quiet")
        resolved = neutral(LOCK.read_text(encoding="utf-8"))
    finally:
        if before is not None:
            LOCK.write_text(before, encoding="utf-8")
    if difference := contents(staged) ^ contents(resolved):
        names = ", ".join(sorted({name for name, _, _ in difference}))
        print(
            f"uv.lock does not lock what pyproject.toml asks for ({names}); run: python3 "
            "scripts/lock.py",
            file=sys.stderr,
        )
        return 1
    print(f"uv.lock: {len(contents(staged))} packages, versions and hashes as resolved")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 where the lock is stale"
    )
    sys.exit(check() if parser.parse_args().check else write())
