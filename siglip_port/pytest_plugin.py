"""pytest plugin: `pytest --parity-report DIR` reports every comparison of `assert_parity`.

pytest loads it wherever this package is installed, so nothing heavy is imported until a test calls
`assert_parity`. Works with pytest-xdist.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from siglip_port import parity_log

OPTION = "--parity-report"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("parity").addoption(
        OPTION,
        metavar="DIR",
        type=Path,
        help="Write JSON, Markdown and JUnit reports of all assert_parity calls, and a badge.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Activate the plugin if the option is given."""
    folder = config.getoption(OPTION)
    if folder is not None:
        config.pluginmanager.register(ParityReport(config, Path(folder).absolute()))


class ParityReport:
    """Collector of the comparisons of a test run.

    Attributes:
        config: Configuration of the run.
        folder: Output folder.
        reports: JSON reports by test.
    """

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.reports: list[tuple[str, dict[str, Any]]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        """Record the comparisons of a test, in the process that runs it."""
        with parity_log.recorded() as reports:
            item.stash[REPORTS] = reports
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach them to the test's report, which xdist sends to the main process."""
        report = yield
        if call.when == "call":
            vars(report)["parity"] = item.stash.get(REPORTS, [])
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect the comparisons of a test, in the main process."""
        for comparison in getattr(report, "parity", []):
            self.reports.append((report.nodeid, comparison))

    def pytest_sessionfinish(self) -> None:
        """Write the reports."""
        if hasattr(self.config, "workerinput") or not self.reports:
            return
        from siglip_port.parity.report.combined import combine, write_reports

        write_reports(self.folder, combine(self.reports))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the verdicts."""
        if not self.reports:
            terminalreporter.write_line(f"{OPTION}: no test called assert_parity; nothing written")
            return
        terminalreporter.section("parity")
        for line in summary_lines(self.reports):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"reports: {self.folder}")


REPORTS = pytest.StashKey[list[dict[str, Any]]]()


def summary_lines(reports: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Return the verdict of each comparison that is not equal, and the counts."""
    lines = []
    for test, report in reports:
        if not report["equal"]:
            lines.append(f"{test}: {report['verdict']}")
    equal = len(reports) - len(lines)
    lines.append(f"comparisons: {len(reports)}, of which equal: {equal}")
    return lines
