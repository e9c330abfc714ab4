"""All drills, by name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.bench.drill import apart, disk, hosts, lost, told
from jobs.bench.drill.runs import Drill, DrillFailed
from jobs.bench.serving_report import Rows, ServingReport
from sam3lora.errors import UserError

DRILLS: dict[str, Callable[[Drill], dict[str, object]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        lost.process_killed,
        lost.worker_killed,
        lost.driver_killed,
        told.sigterm_process,
        told.sigterm_driver,
        told.sigterm_worker,
        disk.disk_full_checkpoint,
        disk.disk_full_adapter,
        disk.disk_full_metrics,
        disk.disk_full_report,
        hosts.host_lost,
        hosts.host_terminated,
        hosts.host_drained,
        hosts.elastic,
        lost.worker_hangs,
        lost.not_finite,
        lost.two_runs,
        apart.sigterm_plain_worker,
        apart.unequal_data,
        apart.stale_listing,
        apart.stale_first,
        apart.stale_for_good,
    )
}
FAILED = "FAILED"


def run_drills(names: Sequence[str] = (), *, keep: Path | None = None) -> ServingReport:
    """Run the named drills, or all; `keep` is a folder in which the runs stay.

    Raises:
        UserError: There is no drill of a name.
    """
    unknown = sorted(set(names) - set(DRILLS))
    if unknown:
        raise UserError(f"no drill {', '.join(unknown)}; there are {', '.join(DRILLS)}")
    with tempfile.TemporaryDirectory(prefix="drill-") as scratch:
        drill = Drill(keep or Path(scratch))
        drill.scratch.mkdir(parents=True, exist_ok=True)
        try:
            rows = [_row(name, drill) for name in names or DRILLS]
        finally:
            drill.end()
    note = (
        "status: of the run, and of the one that resumed it; seconds: from the fault to the first step that was not "
        "done before; adapter: last and best beside those of an undisturbed run. Each step is in metrics.jsonl once."
    )
    columns = ("fault", "status", "steps repeated", "seconds", "adapter")
    table = Rows("drills", [{name: row.get(name) for name in columns} for row in rows], note)
    messages = {row["fault"]: row["message"] for row in rows if row.get("message")}
    return ServingReport("Runs that are disturbed", [table], {"messages": messages})


def _row(name: str, drill: Drill) -> dict[str, object]:
    print(f"{name} ...", flush=True)
    row: dict[str, object] = {"fault": (DRILLS[name].__doc__ or "").strip()}
    try:
        row |= DRILLS[name](drill)
    except DrillFailed as error:
        row |= {"status": FAILED, "message": str(error)}
    print("  " + ", ".join(f"{key}: {value}" for key, value in row.items() if value is not None), flush=True)
    return row
