"""Take screenshots of the page of `strop dash` from real runs, for the docs.

    python tools/dash_pictures.py runs --run demo-1 --other small-rank --data train.jsonl

Run it where the data paths of the runs are valid. Needs Chromium and playwright. Writes docs/pictures/dash-*.png, each
at most 300 kB; fails if a screen does not load or a picture is larger.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.browser import PHONE, at, open_browser
from tests.support.dash import run_dash

ROOT = Path(__file__).parents[1]
LARGEST = 300_000  # bytes
WIDE = {"width": 1280, "height": 760}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", required=True, help="a finished run with an evaluation")
    parser.add_argument("--other", required=True, help="another, to compare with it")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    options = quote(json.dumps({"model.name": args.model, "data.train": args.data}))
    run, other = quote(args.run, safe=""), quote(args.other, safe="")
    # name -> (address, text of the complete screen, light or dark, size)
    screens = {
        "runs": ("/runs", "table .spark", "light", {**WIDE, "height": 380}),
        "run": (f"/run/{run}", ".plot canvas >> nth=3", "light", {**WIDE, "height": 980}),
        "run-phone": (f"/run/{run}", ".plot canvas >> nth=3", "dark", PHONE),
        "data": (f"/data?options={options}", ".tokens .stop >> nth=5", "light", {**WIDE, "height": 900}),
        "plan": (f"/new?options={options}", ".bars .phase >> nth=4", "light", {**WIDE, "height": 900}),
        "answers": (f"/run/{run}/answers?filter=changed", ".sample >> nth=3", "light", {**WIDE, "height": 980}),
        "compare": (f"/compare?runs={run},{other}", ".plot canvas >> nth=1", "dark", {**WIDE, "height": 980}),
    }
    out = ROOT / "docs" / "pictures"
    out.mkdir(parents=True, exist_ok=True)
    with run_dash(args.folder, Path.cwd()) as dash, open_browser() as browser:
        for name, (address, whole, scheme, size) in screens.items():
            context = browser.new_context(viewport=size, color_scheme=scheme)
            page = context.new_page()
            page.goto(at(dash, address))
            page.wait_for_selector(whole)
            page.wait_for_selector(".screen:not([aria-busy])")
            page.wait_for_timeout(1500)  # the first events of streams
            file = out / f"dash-{name}.png"
            page.screenshot(path=file)
            context.close()
            assert file.stat().st_size <= LARGEST, f"{file}: {file.stat().st_size} bytes"
            print(file.relative_to(ROOT), f"{file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
