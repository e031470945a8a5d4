"""Tables of results: what they tell of scans before and after a repair."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from digits import digit_case
from tacext import repair, scan
from tacext.scan_report import Depth
from tacext.tables import repair_table


def test_a_repair_tells_how_deep_its_scans_looked_where_that_differs() -> None:
    case = digit_case()
    reports = {d: scan(case.backdoored, case.data.defender, depth=d) for d in ("norms", "thorough")}
    result = repair(
        case.backdoored,
        case.data.defender,
        reports["thorough"],
        method="patch",
        max_accuracy_drop=1,
    )
    assert result.report_after is not None

    def told(before: Depth, limited: tuple[int, ...]) -> str:
        assert result.report_after is not None
        after = replace(result.report_after, limited=limited)
        console = Console(width=300)
        with console.capture() as capture:
            console.print(
                repair_table(replace(result, report_before=reports[before], report_after=after))
            )
        return next(line for line in capture.get().splitlines() if line.startswith("scan: "))

    target, p = result.targets[0], reports["norms"].p_value
    assert result.report_after.limited == result.targets
    assert told("thorough", ()).startswith("scan: backdoored (p = ")
    assert told("norms", ()).startswith(f"scan: backdoored (norms, p = {p:.2g}) -> ")
    assert "(thorough, p = " in told("norms", ())
    norm = f"norm of class {target}: {float(reports['norms'].norm[target]):.3g} -> "
    assert norm in told("norms", ())
    assert "limit" not in told("norms", ())
    assert told("norms", (target,)).endswith(", which lies behind the limit and does not move")
