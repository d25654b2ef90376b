"""Keeps download URLs out of the committed `uv.lock`, so that it works behind any package index.

    python3 scripts/lock.py            lock, and stage the index-neutral form for the next commit
    python3 scripts/lock.py --check    check that the staged lock matches pyproject.toml

uv writes the URLs of its package index into `uv.lock`. The committed copy has file names instead.
`uv run` and `uv sync` keep its versions, resolve the URLs again, and write the full form to the
working tree, which is never committed. Requires uv and git only.
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
    """Remove URLs from a lock, and the project's own entry, so that uv resolves it again."""
    lock = re.sub(r'registry = "[^"]*"', 'registry = "pypi"', lock)
    lock = re.sub(r'url = "[^"]*/([^"/]+)"', r'path = "\1"', lock)
    head, *packages = re.split(r"(?m)^(?=\[\[package\]\]$)", lock)
    others = [package for package in packages if f'\nname = "{PROJECT}"\n' not in package]
    return head + "".join(others)


def contents(lock: str) -> set[tuple[str, str, frozenset[str]]]:
    """Return name, version and file hashes of every package in a lock."""
    packages = set()
    for package in tomllib.loads(lock)["package"]:
        files = list(package.get("wheels", []))
        if "sdist" in package:
            files.append(package["sdist"])
        hashes = frozenset(file["hash"] for file in files)
        packages.add((package["name"], package.get("version", ""), hashes))
    return packages


def run(*command: str) -> str:
    """Run a command in the root of the repository; return its output."""
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def write() -> int:
    """Lock and stage the index-neutral form."""
    run("uv", "lock", "--quiet")
    LOCK.write_text(neutral(LOCK.read_text(encoding="utf-8")), encoding="utf-8")
    run("git", "add", "uv.lock")
    print("uv.lock: index-neutral form staged")
    return 0


def check() -> int:
    """Check that the staged lock is index-neutral and that uv resolves it to the same contents."""
    staged = run("git", "show", ":uv.lock")
    if "://" in staged:
        print(
            "uv.lock, as staged or committed, contains URLs; run: python3 scripts/lock.py",
            file=sys.stderr,
        )
        return 1
    resolved = resolve(staged)
    difference = contents(staged) ^ contents(resolved)
    if difference:
        names = ", ".join(sorted({name for name, _, _ in difference}))
        print(
            f"uv.lock does not match pyproject.toml ({names}); run: python3 scripts/lock.py",
            file=sys.stderr,
        )
        return 1
    print(f"uv.lock: {len(contents(staged))} packages, versions and hashes match pyproject.toml")
    return 0


def resolve(staged: str) -> str:
    """Return what uv resolves a staged lock to; restore uv.lock in the working tree."""
    before = None
    if LOCK.exists():
        before = LOCK.read_text(encoding="utf-8")
    LOCK.write_text(staged, encoding="utf-8")
    try:
        run("uv", "lock", "--quiet")
        return neutral(LOCK.read_text(encoding="utf-8"))
    finally:
        if before is not None:
            LOCK.write_text(before, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="Change nothing; exit with 1 if the lock is stale."
    )
    sys.exit(check() if parser.parse_args().check else write())
