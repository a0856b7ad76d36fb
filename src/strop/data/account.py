"""The account of a store: what became of its rows, and why a run would not start on them, if it would not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from strop.config.schema import DataSection
from strop.data.reading.sources import RowFault
from strop.data.rendering.faults import FIXES
from strop.data.rendering.render import Renderer
from strop.data.report import DataReport, Tokens, padding
from strop.data.store import Examples, Indices, Store
from strop.errors import DataError, Where

TOO_LONG = "too-long"
MAX_LOST_SHARE = 0.01


def account(
    data: DataSection,
    renderer: Renderer,
    store: Store,
    examples: Examples,
    rows: Indices,
    *,
    role: str,
    shared: bool = False,
) -> DataReport:
    """The account of a store, of which `examples` are used for `role`; shared: its rows are accounted elsewhere."""
    facts = store.facts
    faults = [] if shared else [RowFault(code, Where(*where)) for code, *where in facts["faults"]]
    outcomes = {name: 0 if shared else int(facts["outcomes"].get(name, 0)) for name in ("used", "truncated", "split")}
    counts = {"read": facts["read"], **outcomes, "dropped": int(facts["outcomes"].get("dropped", 0))}
    if shared:
        counts = {"read": len(rows), "used": len(rows), "truncated": 0, "split": 0, "dropped": 0}
    assert counts["read"] == sum(counts.values()) - counts["read"], f"rows without an outcome: {counts}"
    kept = len(store.row_records)
    digests = store.row_records["digest"][rows]
    within = len(digests) - len(np.unique(digests))
    warnings = [] if shared else [*renderer.warnings, *_warnings(facts)]
    if 0 < facts["thinking"] < facts["chats"] and not shared:
        some, others = facts["thinking"], facts["chats"] - facts["thinking"]
        warnings.append(f"{some} {role} rows have reasoning and {others} have none: each is trained as it is")
    if within:
        warnings.append(f"{within} {role} rows repeat an earlier one")
    return DataReport(
        rows=counts,
        by_reason=dict(Counter(fault.code for fault in faults).most_common()),
        dropped=[
            {"file": at.file, "line": at.line, "reason": code, "what": at.what}
            for code, at in ((fault.code, fault.where) for fault in faults)
        ],
        tokens=Tokens.of(examples.lengths, examples.supervised),
        stop_token={"rows": facts["stops"], "share": facts["stops"] / kept if kept else 0.0},
        duplicates={"within": within, "across": 0},
        padding=padding(examples.lengths, data.max_length),
        formats=facts["formats"],
        warnings=warnings,
        template=renderer.told(thinking=facts["thinking"], rows=facts["chats"]) if facts["chats"] else [],
        refusal=_refusal(data, facts, faults, counts, num_left=len(rows), role=role),
    )


def _warnings(facts: dict[str, Any]) -> list[str]:
    found = [f"{count} rows hold {note} ({place})" for note, count, place in facts["notes"]]
    if facts["unused"]:
        columns = ", ".join(f"{name} ({count} rows)" for name, count in sorted(facts["unused"].items()))
        found.append(f"columns not read: {columns}")
    return found + [f"{count} rows of {path} left out by its weight" for path, count in facts["left_out"].items()]


def _refusal(
    data: DataSection,
    facts: dict[str, Any],
    faults: list[RowFault],
    counts: dict[str, int],
    *,
    num_left: int,
    role: str,
) -> DataError | None:
    """Why a run would not start on these rows, if it would not."""
    if "preference" in facts["formats"].values():
        return DataError(
            "preference pairs are read and checked, but not trained on",
            fix="train on the better answers alone: --data.columns prompt=prompt,completion=chosen",
        )
    long = [fault for fault in faults if fault.code == TOO_LONG]
    bad = [fault for fault in faults if fault.code != TOO_LONG]
    if bad and data.bad_rows == "refuse":
        codes = {fault.code for fault in bad}
        advice = [FIXES[code] for code in codes if code in FIXES] or ["mend them"]
        return DataError(
            f"{len(bad)} of {counts['read']} {role} rows cannot be used",
            fix=f"{'; '.join(sorted(advice))}; or leave such rows out with --data.bad_rows drop",
            where=[fault.where for fault in bad],
        )
    places = [fault.where for fault in long]
    if long and data.overlong == "refuse":
        return DataError(
            f"{len(long)} of {counts['read']} {role} rows are longer than data.max_length {data.max_length}",
            fix=f"--data.max_length {facts['longest']}, or choose --data.overlong drop, truncate-start or split",
            where=places,
        )
    if long and data.overlong != "drop" and len(long) > MAX_LOST_SHARE * counts["read"] and data.bad_rows == "refuse":
        return DataError(
            f"{len(long)} of {counts['read']} {role} rows cannot be brought down to data.max_length {data.max_length}",
            fix="raise --data.max_length, or leave such rows out with --data.overlong drop",
            where=places,
        )
    if not num_left:
        where = [fault.where for fault in faults]
        return DataError(f"0 of {counts['read']} {role} rows are left", fix="give more rows", where=where)
    return None
