"""The help of every command as an 80-column terminal shows it.

python -m tests.support.helptexts      writes tests/cli/help.txt again, after an intended change
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

from strop.cli.app import COMMANDS, GROUPS
from tests import ROOT

FILE = ROOT / "tests" / "cli" / "help.txt"
WIDTH = 80
_ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")
_RENDER_ALL = """
import sys
from strop.cli.app import COMMANDS, GROUPS, build
in_groups = [[group, name] for group, (_, commands) in GROUPS.items() for name in commands]
for words in [[], *([name] for name in [*COMMANDS, *GROUPS]), *in_groups]:
    print("$ strop", *words, "--help", flush=True)
    build([*words, "--help"])([*words, "--help"], standalone_mode=False, prog_name="strop")
    sys.stdout.flush()
print("$ strop train --help-all --help", flush=True)
build(["train", "--help-all"])(["train", "--help-all"], standalone_mode=False, prog_name="strop")
"""


def show_in_terminal(*command: str, width: int = WIDTH) -> str:
    """Run a command in a pseudo-terminal, and return what it prints, without colours."""
    import pty

    main, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(width), "LINES": "50", "TERM": "xterm-256color"}
    for name in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "TERMINAL_WIDTH"):
        environment.pop(name, None)
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        output = b""
        while True:
            try:
                block = os.read(main, 1 << 16)
            except OSError:  # Linux reports the end of a terminal as an error
                break
            if not block:
                break
            output += block
    os.close(main)
    assert process.returncode == 0, output.decode()
    return _ANSI.sub("", output.decode("utf-8"))


@functools.cache
def help_by_command(width: int = WIDTH) -> dict[str, str]:
    """Return the rendered help by command, such as "strop export gguf", and that of "strop train --help-all"."""
    shown = show_in_terminal(sys.executable, "-c", _RENDER_ALL, width=width)
    parts = re.split(r"^\$ (strop.*) --help\n", shown, flags=re.M)
    texts = {name: text.strip("\n") + "\n" for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    assert len(texts) == 2 + len(COMMANDS) + len(GROUPS) + sum(len(commands) for _, commands in GROUPS.values())
    return texts


def helptexts() -> str:
    """Return the help of all commands."""
    texts = []
    for name, text in help_by_command().items():
        texts.append(f"$ {name} --help\n" + "\n".join(line.rstrip() for line in text.splitlines()) + "\n")
    return "\n".join(texts)


if __name__ == "__main__":
    FILE.write_text(helptexts(), encoding="utf-8")
