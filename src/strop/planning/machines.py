"""Machines by name: memory, bandwidth and dense matrix rate, from their makers' data sheets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from strop.errors import RecipeError


@dataclass(frozen=True)
class Card:
    """memory_gb: GiB, as makers count them; of Apple and CPUs shared with the system. bandwidth_gbs: GB/s (10^9 bytes).

    tflops: dense products in the type strop would use there, summed in fp32: bf16, or fp32 where `bf16` is False.
    """

    name: str
    kind: str  # consumer, workstation, data center, Apple, CPU
    memory_gb: float
    bandwidth_gbs: float
    tflops: float
    device: str = "cuda"
    bf16: bool = True

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * (1 << 30))


def _cards(kind: str, rows: str, device: str = "cuda") -> list[Card]:
    found = []
    for row in rows.strip().splitlines():
        name, memory, bandwidth, rate, *rest = (part.strip() for part in row.split("|"))
        found.append(Card(name, kind, float(memory), float(bandwidth), float(rate), device, "fp32" not in rest))
    return found


_OTHERS = {"ti", "super", "laptop", "mobile", "max", "sff", "d", "xt", "nvl"}  # words of another card of that name
# GeForce cards run at half their rate where products are summed in fp32: that half is given here.
CARDS = [
    *_cards("consumer", """
        RTX 3060 | 12 | 360 | 25.5
        RTX 3060 Ti | 8 | 448 | 32.4
        RTX 3070 | 8 | 448 | 40.6
        RTX 3070 Ti | 8 | 608 | 43.5
        RTX 3080 | 10 | 760 | 59.5
        RTX 3080 Ti | 12 | 912 | 68.2
        RTX 3090 | 24 | 936 | 71
        RTX 3090 Ti | 24 | 1008 | 80
        RTX 4060 | 8 | 272 | 30.2
        RTX 4060 Ti | 16 | 288 | 44.1
        RTX 4070 | 12 | 504 | 58.3
        RTX 4070 Ti | 12 | 504 | 80.2
        RTX 4070 Ti Super | 16 | 672 | 88.2
        RTX 4080 | 16 | 717 | 97.5
        RTX 4080 Super | 16 | 736 | 104.4
        RTX 4090 | 24 | 1008 | 165.2
        RTX 5060 Ti | 16 | 448 | 47.4
        RTX 5070 | 12 | 672 | 61.7
        RTX 5070 Ti | 16 | 896 | 87.9
        RTX 5080 | 16 | 960 | 112.6
        RTX 5090 | 32 | 1792 | 209.5
        RX 7900 XTX | 24 | 960 | 122.8
    """),
    *_cards("workstation", """
        RTX A4000 | 16 | 448 | 76.7
        RTX A5000 | 24 | 768 | 111.1
        RTX A6000 | 48 | 768 | 154.8
        RTX 4000 Ada | 20 | 360 | 106.9
        RTX 5000 Ada | 32 | 576 | 261.1
        RTX 6000 Ada | 48 | 960 | 364.2
        RTX PRO 6000 Blackwell | 96 | 1792 | 503.8
    """),
    *_cards("data center", """
        T4 | 16 | 320 | 8.1 | fp32
        V100 16GB | 16 | 900 | 15.7 | fp32
        V100 32GB | 32 | 900 | 15.7 | fp32
        A10 | 24 | 600 | 125
        A10G | 24 | 600 | 70
        A30 | 24 | 933 | 165
        L4 | 24 | 300 | 121
        L40 | 48 | 864 | 181
        L40S | 48 | 864 | 362
        A100 40GB | 40 | 1555 | 312
        A100 80GB | 80 | 2039 | 312
        H100 PCIe | 80 | 2000 | 756
        H100 SXM | 80 | 3350 | 989
        H200 | 141 | 4800 | 989
        B200 | 180 | 8000 | 2250
        MI210 | 64 | 1638 | 181
        MI300X | 192 | 5300 | 1307
    """),
    *_cards("Apple", """
        M1 | 16 | 68 | 2.6 | fp32
        M1 Max | 32 | 400 | 10.4 | fp32
        M2 | 24 | 100 | 3.6 | fp32
        M2 Ultra | 192 | 800 | 27.2 | fp32
        M3 Max | 64 | 400 | 14.2 | fp32
        M4 | 32 | 120 | 4.3 | fp32
        M4 Max | 64 | 546 | 17.2 | fp32
    """, "mps"),
    *_cards("CPU", """
        CPU 8 cores AVX2 | 32 | 60 | 0.6 | fp32
        CPU 16 cores AVX512-BF16 | 64 | 80 | 3.2
        CPU 32 cores AMX | 256 | 300 | 30
    """, "cpu"),
]  # fmt: skip


def find_card(name: str) -> Card:
    """The card of this name, however it is spelled ("rtx4090", "NVIDIA GeForce RTX 4090"). Raises RecipeError."""
    wanted = _plain(name)
    by_name = {_plain(card.name): card for card in CARDS}
    if wanted in by_name:
        return by_name[wanted]
    within = [card for plain, card in by_name.items() if wanted and plain.startswith(wanted)]
    if within:
        return min(within, key=lambda card: (len(card.name), card.memory_gb))
    known_as = recognise(name)
    if known_as is not None:
        return known_as
    near = difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.5)
    hint = f" (did you mean {by_name[near[0]].name}?)" if near else ""
    known = ", ".join(card.name for card in CARDS)
    raise RecipeError(
        f"--gpu {name}: not in the table{hint}", fix=f"choose among {known}; or give --memory and --device"
    )


def recognise(name: str) -> Card | None:
    """The card behind a driver's name for it ("NVIDIA A100-SXM4-80GB, 81920 MiB"), if it is in the table: the most of
    its words. What makes another card of a name (Ti, Super, Laptop) must be in both."""
    said = re.findall(r"[a-z0-9]+", name.partition(",")[0].lower())

    def words(card: Card) -> list[str]:
        return card.name.lower().replace(" sxm", "").split()

    def fits(card: Card) -> bool:
        own = words(card)
        return set(own) <= set(said) and not (_OTHERS & set(said)) - set(own)

    found = [card for card in CARDS if card.device == "cuda" and fits(card)]
    return max(found, key=lambda card: len(words(card)), default=None)


def _plain(name: str) -> str:
    plain = re.sub(r"nvidia|geforce|amd|radeon|apple|tesla|instinct", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", plain)
