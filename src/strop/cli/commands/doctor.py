"""`strop doctor`: check whether this machine is ready."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from strop.cli.options import Json
from strop.cli.progress import status_line
from strop.cli.tables import console, print_json
from strop.engine.kernels import warmup


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Print only the commands that fix the findings.")] = False,
    as_json: Json = False,
) -> None:
    """Check this machine: hardware, libraries, matmul rates, one 4-bit training step, and a write to the disk."""
    from strop.machine.doctor import examine
    from strop.planning.tables import print_findings

    def try_out(machine: Any) -> Any:
        warmup.load()
        from strop.planning import calibrate

        return calibrate.examine(machine)

    with status_line("loading the libraries"):
        examination = examine(try_out)
    findings = examination.findings
    errors = [finding for finding in findings if finding.level == "error"]
    result: dict[str, Any]
    if fix:
        fixes = list(dict.fromkeys(finding.fix for finding in findings if finding.fix))
        result = {"fixes": fixes}
        if fixes and not as_json:
            print("\n".join(fixes))
        elif not as_json:
            problems = any(finding.level != "ok" for finding in findings)
            console.print("no command fixes the findings: see `strop doctor`" if problems else "nothing to fix")
    else:
        print_findings(examination, console)
        result = examination.as_json()
    if errors:
        first = errors[0]
        result["error"] = {"kind": "NotReady", "message": first.what, "fix": first.fix, "where": []}
    print_json(result, as_json)
    if errors:
        raise typer.Exit(1)
