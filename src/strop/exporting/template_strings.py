"""Two hundred strings that tokenizers like to disagree on, and ten conversations."""

from __future__ import annotations

from strop.data.types import Message

_PIECES = (
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'll say we've DON'T-ed it; it's o'clock",
    "3 33 333 3333 33333 3.14159 1,000,000 -42 1e-9 0x1F",
    "def f(x):\n    return x**2  # squared\n\n\nf(3)",
    '{"intent": "PlayMusic", "artist": "Björk", "year": 1993}',
    "SELECT * FROM t WHERE a<>'b' AND c>=10;",
    "naïve café, über Straße, señor, garçon",
    "Привет, как дела? Это пример.",
    "今天天气很好，我们去公园吧。",
    "こんにちは、元気ですか？カタカナ",
    "안녕하세요 반갑습니다",
    "مرحبا كيف حالك اليوم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Γειά σου Κόσμε",
    "😀 👍🏽 👨‍👩‍👧 🇫🇷 ❤️",
    "a\tb\t\tc\n\n\nd   e    f",
    "trailing blanks   ",
    "   leading",
    "https://example.com/a_b-c?d=e&f=%20#g",
    "user@example.com",
    "C:\\Users\\me\\file.txt",
    "snake_case camelCase PascalCase",
    "(((nested)))[[brackets]]{{braces}}",
    "!!!???...;;;:::---___",
    "“curly” ‘quotes’ – dash — dash … dots",
    "5€ £3 ¥100 ±2 × ÷ ≈ ∞",
    "# Title\n\n- one\n- two\n\n```py\nprint('x')\n```",
    "<html><body class='a'>x &amp; y</body></html>",
    "2024-02-29T23:59:60Z",
    "Mr. Smith's e-mail isn't re-opened.",
    "AAAAaaaa BBBBbbbb",
    "supercalifragilisticexpialidocious",
    "line one\r\nline two\r\n",
    "x = y + z; a += b * c / d % e",
    "~/.bashrc && echo $HOME | grep -v '^#'",
    "E = mc^2, a_1 <= b_2",
    "Ünïcödé ŵïth ďïáčřïťïčš",
    "end",
)
_FRAMES = ("{}", " {}", "{}\n\n {}", "({}), 12 {}", "\n{}!\t{}")
STRINGS = [frame.format(piece, piece) for piece in _PIECES for frame in _FRAMES]


def conversations(system: bool) -> list[list[Message]]:
    """Ten, each ending with a user turn; system prompts in some, where the template has them."""
    said = [
        ("Hello!",),
        ("What is 3 + 4?", "7", "And 5?"),
        ("Give me JSON.", '{"a": [1, 2]}', "Now YAML."),
        ("Line one.\nLine two.",),
        ("Übersetze: naïve café", "Klar.", "Danke, und weiter?", "Gern.", "Noch eins."),
        ("say \"quoted\" and 'single' {{ braces }}",),
        ("<b>bold</b> & more", "ok", "go on"),
        ("今天天气很好",),
        ("😀?", "👍", "ok"),
        ("def f():\n    return 1\n\nExplain.",),
    ]
    systems = ("Be brief.", None, "You answer\nin two lines.", None, None)
    made = []
    for number, turns in enumerate(said):
        first = systems[number % len(systems)] if system else None
        told = [] if first is None else [Message("system", first)]
        made.append([*told, *(Message("assistant" if n % 2 else "user", text) for n, text in enumerate(turns))])
    return made
