"""``siloweave silo personalise``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from configs.printing import answer


def personalise(
    config: Annotated[Path, typer.Option("--config", "-c", help="The silo.toml.")],
    adapter: Annotated[Path, typer.Option(help="The shared adapter: the folder adapter/ of a finished federation.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Training units a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 1e-3,
    rank: Annotated[int, typer.Option(min=1, help="Of the personal adapter.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Trains an adapter for this silo alone, on top of the shared one.

    It is trained without noise: it stays in the state directory, has no guarantee, and its outputs are private data.
    """
    from configs.silo import load_silo
    from federated.personal import PersonalSettings
    from federated.personal import personalise as train

    silo = load_silo(config)
    settings = PersonalSettings(steps, batch_size, learning_rate, rank, 2.0 * rank, silo.silo.micro_batch_size)
    result = train(silo, adapter, settings)
    answer(
        as_json,
        {**asdict(result), "folder": str(result.folder)},
        f"silo {silo.silo.id}: {result.folder}: held-out bits per character {result.shared_bits_per_char:.3f} with the "
        f"shared adapter, {result.personal_bits_per_char:.3f} with the personal one; adapter and figures are private",
    )
