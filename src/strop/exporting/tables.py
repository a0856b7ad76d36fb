"""Print how a merged or exported model differs from the base with the adapter."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from strop.exporting.parity import Parity


def print_base_losses(losses: Mapping[str, float], base: str, out: Console) -> None:
    """Print the loss on each candidate for the base weights. base: the candidate that was used."""
    for candidate, loss in losses.items():
        out.print(f"[bold]base[/]     {candidate}: loss {loss:.4f}{' (used)' if base == candidate else ''}")


def print_parity(parity: Parity | None, out: Console) -> None:
    """Print how the outputs of a merged or exported model differ from those of the base with the adapter."""
    if parity is None:
        out.print("[bold]parity[/]   not measured")
        return
    flips = f"{parity.clear_flips} clear flip{'s' * (parity.clear_flips != 1)} in {parity.positions:,} positions"
    effect = "" if parity.effect is None else f"; {parity.effect.value:.1%} of the adapter's effect"
    effect += "" if parity.cosine_min is None else f"; lowest cosine {parity.cosine_min:.6f}"
    verdict = "predicts like the adapter on its base" if parity.passed else "predicts otherwise than the adapter"
    out.print(f"[bold]parity[/]   {verdict}, {'within' if parity.passed else 'beyond'} the limits")
    out.print(
        f"         mean KL {parity.kl_mean:.2g}, max {parity.kl_max:.2g}; {flips} (top-1 agreement "
        f"{parity.top1_agreement:.2%}){effect}; loss {parity.loss_difference:+.1e}"
    )
    out.print(f"[bold]limits[/]   {parity.describe_limits()}")
