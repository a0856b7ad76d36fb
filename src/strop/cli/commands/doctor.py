"""`strop doctor`: is this machine ready?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from strop.cli.options import Json
from strop.cli.progress import alive
from strop.cli.terminal import console, print_json
from strop.engine.kernels import warmup


def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Print the commands that mend what was found, and no more.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check this machine: its facts, products and their rates, one 4-bit training step, a write to the disk."""
    from strop.machine.doctor import examine
    from strop.planning.tables import print_findings

    def try_out(machine: Any) -> Any:
        warmup.load()
        from strop.planning import calibrate

        return calibrate.examine(machine)

    with alive(console, "loading the libraries"):
        found = examine(try_out)
    errors = [finding for finding in found.findings if finding.level == "error"]
    told: dict[str, Any]
    if fix:
        fixes = list(dict.fromkeys(finding.fix for finding in found.findings if finding.fix))
        told = {"fixes": fixes}
        if fixes and not as_json:
            print("\n".join(fixes))
        elif not as_json:
            bad = any(finding.level != "ok" for finding in found.findings)
            console.print("no command mends what was found: see strop doctor" if bad else "nothing to mend")
    else:
        print_findings(found, console)
        told = found.as_json()
    if errors:
        first = errors[0]
        told["error"] = {"kind": "NotReady", "message": first.what, "fix": first.fix, "where": []}
    print_json(told, as_json)
    if errors:
        raise typer.Exit(1)
