"""Keeps the committed `uv.lock` free of download addresses: it works behind any package index.

    python3 scripts/lock.py            lock, and stage the index-neutral form for the next commit
    python3 scripts/lock.py --check    is what pyproject.toml asks for staged or committed?

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
    """Take the addresses out of a lock, and the project itself: this makes uv resolve again."""
    lock = re.sub(r'registry = "[^"]*"', 'registry = "pypi"', lock)
    lock = re.sub(r'url = "[^"]*/([^"/]+)"', r'path = "\1"', lock)
    head, *packages = re.split(r"(?m)^(?=\[\[package\]\]$)", lock)
    others = [package for package in packages if f'\nname = "{PROJECT}"\n' not in package]
    return head + "".join(others)


def contents(lock: str) -> set[tuple[str, str, frozenset[str]]]:
    """Return what a lock fixes: every package's name, version and file hashes."""
    fixed = set()
    for package in tomllib.loads(lock)["package"]:
        files = list(package.get("wheels", []))
        if "sdist" in package:
            files.append(package["sdist"])
        hashes = frozenset(file["hash"] for file in files)
        fixed.add((package["name"], package.get("version", ""), hashes))
    return fixed


def run(*command: str) -> str:
    """Run a command in the project's folder; return what it prints."""
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def write() -> int:
    """Lock, and stage the neutral form."""
    run("uv", "lock", "--quiet")
    LOCK.write_text(neutral(LOCK.read_text(encoding="utf-8")), encoding="utf-8")
    run("git", "add", "uv.lock")
    print("uv.lock: index-neutral form staged")
    return 0


def check() -> int:
    """Compare the staged lock with what uv makes of it."""
    staged = run("git", "show", ":uv.lock")
    if "://" in staged:
        print(
            "uv.lock as staged or committed holds addresses; run: python3 scripts/lock.py",
            file=sys.stderr,
        )
        return 1
    resolved = resolve(staged)
    difference = contents(staged) ^ contents(resolved)
    if difference:
        names = ", ".join(sorted({name for name, _, _ in difference}))
        print(
            f"uv.lock does not lock what pyproject.toml asks for ({names}); run: python3 "
            "scripts/lock.py",
            file=sys.stderr,
        )
        return 1
    print(f"uv.lock: {len(contents(staged))} packages, versions and hashes as resolved")
    return 0


def resolve(staged: str) -> str:
    """Return what uv makes of a lock; the file in the working tree stays as it is."""
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
        "--check", action="store_true", help="change nothing; exit 1 where the lock is stale"
    )
    sys.exit(check() if parser.parse_args().check else write())
